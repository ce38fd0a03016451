"""The compressions that kernels and modules come in, unpacked with a bound on what they may become.

Imports errors.  The formats a kernel can have: lib/decompress.c; what
scripts/Makefile.lib appends to all but gzip is the unpacked size in 4 bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Protocol

from vmipatch.errors import ImageError

# The first bytes of each format (lib/decompress.c); .lzma has none of its own: properties 5D, a
# dictionary size that is a power of two of at least 64 KiB.
MAGICS = {
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\0",
    "bzip2": b"BZh",
    "lzma": b"\x5d\0\0",
    "lz4": b"\x02\x21\x4c\x18",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lzo": b"\x89LZO\0\r\n\x1a\n",
}
# Enough for any kernel without debugging symbols, and what a hostile file may cost.
MAX_UNPACKED = 160 << 20
_STEP = 1 << 20
_LZ4_BLOCK = 8 << 20  # the legacy format's block, unpacked


def sniff(head: bytes) -> str | None:
    """The name of the format that these bytes start, or None."""
    return next((name for name, magic in MAGICS.items() if head.startswith(magic)), None)


def unpack(packed: bytes, format: str, *, file: str, offset: int = 0, limit: int = MAX_UNPACKED) -> bytes:
    """The unpacked bytes of one stream; what follows the stream is ignored.

    ``offset`` is where ``packed`` begins in ``file``, for errors only.  Raises
    :class:`ImageError` for a damaged or truncated stream, for one that unpacks
    to more than ``limit`` bytes, and for LZO, which no library at hand reads.
    """
    out = io.BytesIO()  # hands over its buffer without a copy
    try:
        for piece in _pieces(packed, format, limit):
            out.write(piece)
            if out.tell() > limit:
                raise ImageError(f"the {format} stream unpacks to more than {limit} bytes", file=file, offset=offset)
    except _damage() as error:
        raise ImageError(f"the {format} stream is damaged: {error}", file=file, offset=offset) from error
    return out.getvalue()


class _Damaged(Exception):
    pass


def _damage() -> tuple[type[Exception], ...]:
    import lzma
    import zlib

    # OSError and ValueError: what bz2 raises.
    return (_Damaged, zlib.error, lzma.LZMAError, OSError, ValueError)


def _pieces(packed: bytes, format: str, limit: int) -> Iterator[bytes]:
    if format == "gzip":
        yield from _gzip(packed)
    elif format == "zstd":
        yield from _zstd(packed)
    elif format == "lz4":
        yield from _lz4(packed)
    elif format == "bzip2":
        import bz2

        yield from _bounded(bz2.BZ2Decompressor(), packed)
    elif format in ("xz", "lzma"):
        import lzma

        kind = lzma.FORMAT_XZ if format == "xz" else lzma.FORMAT_ALONE
        # The kernel's own dictionaries are at most 128 MiB (scripts/xz_wrap.sh).
        yield from _bounded(lzma.LZMADecompressor(kind, memlimit=192 << 20), packed)
    else:
        raise _Damaged("no library reads this format: unpack it first (for LZO, with lzop -d)")


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _bounded(decoder: _Decoder, packed: bytes) -> Iterator[bytes]:
    at = 0
    while not decoder.eof:
        feed = b""
        if decoder.needs_input:
            feed = packed[at : at + _STEP]
            at += len(feed)
            if not feed:
                raise _Damaged("it ends early")
        yield decoder.decompress(feed, _STEP)


def _gzip(packed: bytes) -> Iterator[bytes]:
    import zlib

    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    at = 0
    while not decoder.eof:
        feed = decoder.unconsumed_tail
        if not feed:
            feed = packed[at : at + (_STEP >> 4)]
            at += len(feed)
        piece = decoder.decompress(feed, _STEP)
        if not feed and not piece:
            raise _Damaged("it ends early")
        yield piece


def _zstd(packed: bytes) -> Iterator[bytes]:
    import zstandard

    try:
        # The kernel packs itself with a window of up to 128 MiB (zstd -22 --ultra).
        size = zstandard.frame_content_size(packed[:32])
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed) as reader:
            done = 0
            while piece := reader.read(_STEP):
                done += len(piece)
                yield piece
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from error
    if size >= 0 and done != size:
        raise _Damaged("it ends early")


def _lz4(packed: bytes) -> Iterator[bytes]:
    """The legacy frame: the magic, then blocks of a 4-byte size and that many bytes."""
    import lz4.block

    at = 4
    while at + 4 <= len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        at += 4
        if size == int.from_bytes(MAGICS["lz4"], "little"):
            continue
        if size == 0:
            return
        if at + size > len(packed):
            raise _Damaged("it ends early")
        try:
            piece = lz4.block.decompress(packed[at : at + size], uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise _Damaged(str(error)) from error
        yield piece
        at += size
