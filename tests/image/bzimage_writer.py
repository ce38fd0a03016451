"""Builds bzImages around a payload, for tests, after Documentation/arch/x86/boot.rst.

Shares no code with the reader.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

SETUP_SECTS = 4


def compress(data: bytes, format: str) -> bytes:
    """A payload as the kernel's build makes it, with the size suffix where the format has none."""
    suffix = struct.pack("<I", len(data))
    if format == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if format == "bzip2":
        return bz2.compress(data) + suffix
    if format == "xz":
        x86 = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]
        return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=x86) + suffix
    if format == "lzma":
        return lzma.compress(data, lzma.FORMAT_ALONE, preset=1) + suffix
    if format == "lz4":
        return lz4_legacy(data) + suffix
    if format == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=3, write_content_size=False).compress(data) + suffix
    raise ValueError(format)


def lz4_legacy(data: bytes) -> bytes:
    """The legacy frame of lz4(1): the magic, and blocks of up to 8 MiB with their packed size."""
    import lz4.block

    out = struct.pack("<I", 0x184C2102)
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def bzimage(payload: bytes, *, protocol: int = 0x20F, declared: bool = True, front: int = 0x300) -> bytes:
    """Setup sectors, ``front`` bytes of decompressor, the payload, and more decompressor.

    ``declared`` False leaves payload_offset and payload_length 0, as before protocol 2.08.
    """
    setup = bytearray((SETUP_SECTS + 1) * 512)
    setup[0x1F1] = SETUP_SECTS
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    setup[0x211] = 1
    struct.pack_into("<I", setup, 0x214, 0x100000)
    if declared:
        struct.pack_into("<II", setup, 0x248, front, len(payload))
    return bytes(setup) + b"\x90" * front + payload + b"\xcc" * 0x800
