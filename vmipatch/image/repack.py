"""A bzImage with another payload of the same unpacked size, or a refusal.

The decompressor has the lengths of its payload compiled in, so the new payload
takes exactly the old one's place: the stream, zeros, and the unpacked size in the
last four bytes.  Formats whose kernel decompressor stops at the stream's own end
can be padded so (gzip, xz, zstd: lib/decompress_*.c); the others are refused.
Imports errors and image.model.
"""

from __future__ import annotations

import zlib

from vmipatch.errors import ImageError
from vmipatch.image.image import Image

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
    stream = _pack(payload.compression, data, image.path)
    room = payload.length - 4
    if len(stream) > room:
        raise ImageError(
            f"packed, the payload takes {len(stream)} bytes, and there is room for {room}",
            file=image.path, offset=payload.offset,
        )  # fmt: skip
    # gzip's own trailer holds the size at the stream's end; the padding needs the size again behind it.
    body = stream + bytes(room - len(stream)) + len(data).to_bytes(4, "little")
    result = bytearray(container)
    result[payload.offset : payload.offset + payload.length] = body
    # arch/x86/boot/tools/build.c (up to 6.9) ends the image with the complement of the CRC-32 of all before it.
    begin, end = payload.begin, len(container) if payload.end is None else payload.end
    if zlib.crc32(container[begin : end - 4]) ^ 0xFFFFFFFF == int.from_bytes(container[end - 4 : end], "little"):
        result[end - 4 : end] = (zlib.crc32(result[begin : end - 4]) ^ 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(result)


def _pack(compression: str, data: bytes, path: str) -> bytes:
    if compression == "xz":
        import lzma

        filters = [
            {"id": lzma.FILTER_X86},
            {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _XZ_DICTIONARY},
        ]
        return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)
    if compression == "gzip":
        packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9)
        return packer.compress(data) + packer.flush()
    if compression == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=22, threads=0).compress(data)
    raise ImageError(f"a payload packed with {compression} cannot be padded: it cannot be packed again", file=path)
