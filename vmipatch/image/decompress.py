"""The compressions that kernels and modules come in, unpacked with a bound on what they may become.

Imports errors.  The formats a kernel can have: lib/decompress.c; what
scripts/Makefile.lib appends to all but gzip is the unpacked size in 4 bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator
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
# What is read of a stream at first: a file may be thousands of small ones.
_FIRST_STEP = 1 << 16
_MAX_STREAMS = 1 << 16
# pzstd writes one of 4 bytes before each frame (RFC 8878, 3.1.2).
_ZSTD_SKIPPABLE = b"\x50\x2a\x4d\x18"
_LZ4_BLOCK = 8 << 20  # the legacy format's block, unpacked


def sniff(head: bytes) -> str | None:
    """The name of the format that these bytes start, or None."""
    if head.startswith(_ZSTD_SKIPPABLE):
        return "zstd"
    return next((name for name, magic in MAGICS.items() if head.startswith(magic)), None)


def unpack(packed: bytes, format: str, *, file: str, offset: int = 0, limit: int = MAX_UNPACKED) -> bytes:
    """The unpacked bytes of a stream and of all of its format that follow it, with nothing but zeros between.

    Parallel packers write many members, streams or frames, and files can be joined; what else follows is ignored.
    ``offset`` is where ``packed`` begins in ``file``, for errors only.  Raises
    :class:`ImageError` for a damaged or truncated stream, for what unpacks
    to more than ``limit`` bytes, and for LZO, which no library at hand reads.
    """
    out = io.BytesIO()  # hands over its buffer without a copy
    try:
        for piece in _pieces(packed, format):
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


# Gives the pieces of the stream at an offset, and in the end the offset behind it.
_Stream = Callable[[bytes, int], Generator[bytes, None, int]]


def _pieces(packed: bytes, format: str) -> Iterator[bytes]:
    reader = _READERS.get(format)
    if reader is None:
        raise _Damaged("no library reads this format: unpack it first (for LZO, with lzop -d)")
    at = yield from reader(packed, 0)
    for _ in range(_MAX_STREAMS):
        at = _behind_zeros(packed, at)
        # A stream of .lzma begins with bytes that anything may begin with: it is the only one.
        if format == "lzma" or sniff(packed[at : at + 16]) != format:
            return
        at = yield from reader(packed, at)
    raise _Damaged(f"it is more than {_MAX_STREAMS} streams")


def _behind_zeros(packed: bytes, at: int) -> int:
    while at < len(packed):
        piece = packed[at : at + _STEP]
        left = len(piece.lstrip(b"\0"))
        at += len(piece) - left
        if left:
            break
    return at


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _xz(packed: bytes, at: int) -> Generator[bytes, None, int]:
    import lzma

    # The kernel's own dictionaries are at most 128 MiB (scripts/xz_wrap.sh).
    return (yield from _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=192 << 20), packed, at))


def _lzma(packed: bytes, at: int) -> Generator[bytes, None, int]:
    import lzma

    return (yield from _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=192 << 20), packed, at))


def _bzip2(packed: bytes, at: int) -> Generator[bytes, None, int]:
    import bz2

    return (yield from _bounded(bz2.BZ2Decompressor(), packed, at))


def _bounded(decoder: _Decoder, packed: bytes, at: int) -> Generator[bytes, None, int]:
    step = _FIRST_STEP
    while not decoder.eof:
        feed = b""
        if decoder.needs_input:
            feed = packed[at : at + step]
            step = min(2 * step, _STEP)
            at += len(feed)
            if not feed:
                raise _Damaged("it ends early")
        yield decoder.decompress(feed, _STEP)
    return at - len(decoder.unused_data)


def _gzip(packed: bytes, at: int) -> Generator[bytes, None, int]:
    import zlib

    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    while not decoder.eof:
        feed = decoder.unconsumed_tail
        if not feed:
            feed = packed[at : at + (_STEP >> 4)]
            at += len(feed)
        piece = decoder.decompress(feed, _STEP)
        if not feed and not piece:
            raise _Damaged("it ends early")
        yield piece
    return at - len(decoder.unused_data)


def _zstd(packed: bytes, at: int) -> Generator[bytes, None, int]:
    """One frame, and the skippable frame that parallel packers put before it."""
    import zstandard

    if packed[at : at + 4] == _ZSTD_SKIPPABLE:
        return min(at + 8 + int.from_bytes(packed[at + 4 : at + 8], "little"), len(packed))
    end = _zstd_frame_end(packed, at)
    frame = memoryview(packed)[at:end]
    try:
        # The kernel packs itself with a window of up to 128 MiB (zstd -22 --ultra).
        size = zstandard.frame_content_size(packed[at : at + 32])
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(frame) as reader:
            done = 0
            while piece := reader.read(_STEP):
                done += len(piece)
                yield piece
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from error
    if size >= 0 and done != size:
        raise _Damaged("it ends early")
    return end


def _zstd_frame_end(packed: bytes, at: int) -> int:
    """The offset behind a frame: RFC 8878, 3.1.1."""
    descriptor = packed[at + 4] if at + 4 < len(packed) else 0
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    content = (single, 2, 4, 8)[descriptor >> 6]
    at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + content
    last = 0
    while not last:
        header = int.from_bytes(packed[at : at + 3], "little")
        last = header & 1
        # Of a run of one byte (type 1) the size is the unpacked one.
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if at > len(packed):
            break
    at += 4 * checksum
    if at > len(packed):
        raise _Damaged("it ends early")
    return at


def _lz4(packed: bytes, at: int) -> Generator[bytes, None, int]:
    """The legacy frame: the magic, then blocks of a 4-byte size and that many bytes."""
    import lz4.block

    at += 4
    while at + 4 <= len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        at += 4
        if size == int.from_bytes(MAGICS["lz4"], "little"):
            continue
        if size == 0:
            return at
        if at + size > len(packed):
            raise _Damaged("it ends early")
        try:
            piece = lz4.block.decompress(packed[at : at + size], uncompressed_size=_LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise _Damaged(str(error)) from error
        yield piece
        at += size
    return at


_READERS: dict[str, _Stream] = {
    "gzip": _gzip, "xz": _xz, "bzip2": _bzip2, "lzma": _lzma, "lz4": _lz4, "zstd": _zstd,
}  # fmt: skip
