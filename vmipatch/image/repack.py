"""A bzImage with another payload of the same unpacked size, or a refusal.

The decompressor has the lengths of its payload compiled in, so the new payload
takes exactly the old one's place, with the unpacked size in its last four bytes.  What the packed bytes leave of it
is filled: in gzip by the file name of its header, in front of the data; in xz and zstd by zeros behind the
stream, where the kernel's decompressors stop at its end (lib/decompress_*.c).  Other formats are refused.

The kernel unpacks in place, from the end of a buffer into its beginning, and keeps the two a distance
apart: of that what is filled behind a stream takes a part (:func:`_spare`).
Imports errors and image.model.
"""

from __future__ import annotations

import zlib

from vmipatch.errors import ImageError
from vmipatch.image.image import Image

# RFC 1952, section 2.3: the flags, the bit FNAME among them, and where the name begins.
_GZIP_FLAGS, _FNAME, _GZIP_NAME = 3, 0x08, 10
_SIZE = 4
# What scripts/xz_wrap.sh gives for x86: the branch filter, a 32 MiB dictionary, CRC32.
_XZ_DICTIONARY = 32 << 20


def repack(image: Image, container: bytes, data: bytes) -> bytes:
    """``container`` with ``data`` as its unpacked payload: the file that ``image``, bzImage or UKI, was opened from.

    Raises :class:`ImageError` if the image is no bzImage of a known payload length,
    its format cannot be padded, ``data`` has another size, or the packed bytes do
    not fit.  A signature that follows the image (Secure Boot) no longer holds.
    """
    payload = image.payload
    if payload is None or payload.length is None:
        raise ImageError("only a bzImage that says how long its payload is can be packed again", file=image.path)
    if len(data) != len(image.data):
        raise ImageError("the payload's unpacked size must stay what it is", file=image.path)
    whole = _pack(payload.compression, data, image.path)
    length = payload.length
    if len(whole) > length:
        raise ImageError(
            f"packed, the payload takes {len(whole)} bytes, and there is room for {length}",
            file=image.path, offset=payload.offset,
        )  # fmt: skip
    if payload.compression == "gzip":
        body = _named(whole, length - len(whole))
    elif length - len(whole) <= _spare(len(data)):
        body = whole[:-_SIZE] + bytes(length - len(whole)) + whole[-_SIZE:]
    else:
        raise ImageError(
            f"packed, the payload leaves {length - len(whole)} bytes empty: too many to be unpacked in place",
            file=image.path, offset=payload.offset,
        )  # fmt: skip
    result = bytearray(container)
    result[payload.offset : payload.offset + payload.length] = body
    # arch/x86/boot/tools/build.c (up to 6.9) ends the image with the complement of the CRC-32 of all before it.
    begin, end = payload.begin, len(container) if payload.end is None else payload.end
    if zlib.crc32(container[begin : end - 4]) ^ 0xFFFFFFFF == int.from_bytes(container[end - 4 : end], "little"):
        result[end - 4 : end] = (zlib.crc32(result[begin : end - 4]) ^ 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(result)


def _pack(compression: str, data: bytes, path: str) -> bytes:
    """The packed bytes, with the unpacked size in the last four: gzip has it there itself."""
    if compression == "gzip":
        import deflate

        return bytes(deflate.gzip_compress(data, 12))
    size = len(data).to_bytes(_SIZE, "little")
    if compression == "xz":
        import lzma

        filters = [
            {"id": lzma.FILTER_X86},
            {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _XZ_DICTIONARY},
        ]
        return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters) + size
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=22, threads=0).compress(data) + size
    raise ImageError(f"a payload packed with {compression} cannot be padded: it cannot be packed again", file=path)


def _spare(size: int) -> int:
    """Bytes of the distance kept for a payload of an unpacked size that neither xz nor zstd needs.

    arch/x86/boot/header.S (7.3; 4.8 to 5.8 with 64 KiB): size / 256 + 128 KiB, so that any format is safe.  xz needs
    size / 4096 + 64 KiB + 128 (lib/decompress_unxz.c), zstd next to nothing more than 128 KiB.
    """
    return max(0, (size >> 8) - (size >> 12) - 128)


def _named(stream: bytes, more: int) -> bytes:
    """A gzip stream made ``more`` bytes longer by a file name; its header has no optional part yet."""
    if not more:
        return stream
    head = bytearray(stream[:_GZIP_NAME])
    head[_GZIP_FLAGS] |= _FNAME
    return bytes(head) + b"-" * (more - 1) + b"\0" + stream[_GZIP_NAME:]
