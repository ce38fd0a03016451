"""A payload packed again: where it stands, what fills its room, and what is refused.

The expected layout is what the kernel's decompressors read: lib/decompress_inflate.c, decompress_unxz.c and
decompress_unzstd.c of 7.3.
"""

from __future__ import annotations

import gzip
import random
import zlib
from pathlib import Path

import pytest
from bzimage_writer import bzimage, compress
from elfwriter import ElfWriter

from vmipatch.errors import ImageError
from vmipatch.image import Image, open_image
from vmipatch.image.repack import repack

SIZE = 1 << 18
CHANGED = 0xFFFFFFFF81000100


def opened(folder: Path, form: str, more: int = 0, noise: int = 1 << 16) -> tuple[Image, bytes, bytes]:
    """A bzImage with ``more`` bytes of room than it needs; the file, and its payload with a few bytes changed."""
    text = random.Random(6).randbytes(noise) + b"\x90\xe8\0\1\2\3\xfa\xfb" * ((SIZE - noise) // 8)
    elf = ElfWriter(bits=64)
    elf.section(".text", text, address=0xFFFFFFFF81000000, flags="ax")
    elf.section(".rodata", b"Linux version 6.1.0-test (us) #1\n\0", address=0xFFFFFFFF81800000, flags="a")
    plain = elf.build()
    packed = gzip.compress(plain, 1) if form == "gzip" else compress(plain, form)
    if form != "gzip":
        packed = packed[:-4] + bytes(more) + packed[-4:]
    path = folder / "bzImage"
    path.write_bytes(bzimage(packed))
    image = open_image(path)
    assert (image.compression, bytes(image.data)) == (form, plain)
    data = bytearray(plain)
    at = image.offset_of(CHANGED)
    data[at : at + 8] = bytes(8)
    return image, path.read_bytes(), bytes(data)


def room_of(image: Image, file: bytes) -> bytes:
    assert image.payload is not None
    assert image.payload.length is not None
    return file[image.payload.offset : image.payload.offset + image.payload.length]


@pytest.mark.parametrize("form", ["gzip", "xz", "zstd"])
def test_the_changed_payload_comes_out_of_the_same_room(form: str, tmp_path: Path) -> None:
    image, file, data = opened(tmp_path, form, 500)
    again = repack(image, file, data)
    assert len(again) == len(file)
    room = room_of(image, file)
    start = file.index(room)
    assert again[:start] == file[:start]
    assert again[start + len(room) :] == file[start + len(room) :]
    (tmp_path / "again").write_bytes(again)
    assert bytes(open_image(tmp_path / "again").data) == data
    # The size that the decompressor is built with (input_len, output_len) stands in the last four bytes.
    assert room_of(image, again)[-4:] == len(data).to_bytes(4, "little")


def test_gzip_ends_where_its_room_ends(tmp_path: Path) -> None:
    """Unpacked in place: nothing may stand behind the data.  Read as the kernel does, by skipping the header's name."""
    image, file, data = opened(tmp_path, "gzip")
    room = room_of(image, repack(image, file, data))
    assert room[:3] == b"\x1f\x8b\x08"
    assert room[3] == 0x08
    end = room.index(0, 10)
    assert end > 100
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    assert reader.decompress(room[end + 1 :]) == data
    assert reader.unused_data == zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")


@pytest.mark.parametrize("form", ["xz", "zstd"])
def test_too_much_room_behind_a_stream_is_refused(form: str, tmp_path: Path) -> None:
    """The spare part of what arch/x86/boot/header.S keeps is a 256th of the size, less a 4096th and 128 bytes."""
    image, file, data = opened(tmp_path, form, 40_000)
    with pytest.raises(ImageError, match="too many to be unpacked in place"):
        repack(image, file, data)


@pytest.mark.parametrize("form", ["gzip", "xz", "zstd"])
def test_what_does_not_fit_is_refused(form: str, tmp_path: Path) -> None:
    image, file, data = opened(tmp_path, form)
    noisy = data[:0x2000] + random.Random(7).randbytes(len(data) - 0x4000) + data[-0x2000:]
    with pytest.raises(ImageError, match="there is room for"):
        repack(image, file, noisy)


def test_formats_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    image, file, data = opened(tmp_path, "lz4")
    with pytest.raises(ImageError, match="cannot be padded"):
        repack(image, file, data)
