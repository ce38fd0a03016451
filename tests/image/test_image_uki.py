"""Unified kernel images: the kernel found, placed in the file, packed again; headers that lie are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from bzimage_writer import bzimage, compress
from elfwriter import ElfWriter
from pe_writer import program

from vmipatch.errors import ImageError
from vmipatch.image import Image, open_image
from vmipatch.image.repack import repack

TEXT = b"\x90\xe8\0\1\2\3\xfa\xfb" * 9000


def kernel(padding: int = 0) -> bytes:
    """A bzImage whose payload has room to spare."""
    elf = ElfWriter(bits=64)
    elf.section(".text", TEXT, address=0xFFFFFFFF81000000, flags="ax")
    elf.section(".rodata", b"Linux version 6.1.0-test (us) #1\n\0", address=0xFFFFFFFF81020000, flags="a")
    packed = compress(elf.build(), "xz")
    return bzimage(packed[:-4] + bytes(padding) + packed[-4:])


def opened(folder: Path, data: bytes) -> Image:
    path = folder / "linux.efi"
    path.write_bytes(data)
    return open_image(path)


def test_the_kernel_of_a_unified_image_is_its_bzimage(tmp_path: Path) -> None:
    inner = kernel()
    whole = program({".text": bytes(100), ".osrel": b"ID=x\n", ".linux": inner, ".initrd": bytes(3000)})
    image = opened(tmp_path, whole)
    (tmp_path / "bzImage").write_bytes(inner)
    plain = open_image(tmp_path / "bzImage")
    assert (image.container, image.compression, image.kind) == ("uki", "xz", "linux")
    assert image.data == plain.data
    assert image.banner == plain.banner
    assert image.payload is not None
    assert plain.payload is not None
    begin = whole.index(inner)
    assert (image.payload.begin, image.payload.end) == (begin, begin + len(inner))
    assert image.payload.offset == begin + plain.payload.offset


def test_packed_again_only_the_payload_differs(tmp_path: Path) -> None:
    inner = kernel(padding=100)
    whole = program({".text": bytes(100), ".linux": inner, ".initrd": b"\1" * 3000})
    image = opened(tmp_path, whole)
    data = bytearray(image.data)
    at = image.offset_of(0xFFFFFFFF81000000)
    data[at : at + 4] = b"\xcc" * 4
    again = repack(image, whole, bytes(data))
    assert len(again) == len(whole)
    assert image.payload is not None
    assert image.payload.length is not None
    changed = [i for i, (a, b) in enumerate(zip(again, whole, strict=True)) if a != b]
    assert changed
    assert image.payload.offset <= changed[0] <= changed[-1] < image.payload.offset + image.payload.length
    assert opened(tmp_path, again).data == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (program({".text": bytes(100)}), "without a Linux kernel in it"),
        (program({".text": b"(XEN) \0"}), "the Xen hypervisor"),
        (program({".linux": bytes(4000)}), "holds no bzImage"),
        (program({".linux": b""}), "are none"),
        (program({".linux": kernel()})[:5000], "reach past the end"),
        (b"MZ\0\0zimg" + bytes(600), "zboot"),
        (b"MZ" + bytes(600), "cut short"),
        (b"MZ", "cut short"),
    ],
)
def test_what_is_none_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        opened(tmp_path, data)


def test_more_sections_than_the_file_holds(tmp_path: Path) -> None:
    data = bytearray(program({".text": bytes(100)}))
    struct.pack_into("<H", data, 0x80 + 4 + 2, 0xFFFF)
    with pytest.raises(ImageError, match="65535 section headers"):
        opened(tmp_path, bytes(data))


def test_an_error_in_the_kernel_names_its_place_in_the_file(tmp_path: Path) -> None:
    inner = bytearray(kernel())
    inner[inner.index(b"\xfd7zXZ") + 100] ^= 0xFF
    whole = program({".text": bytes(100), ".linux": bytes(inner)})
    with pytest.raises(ImageError, match="damaged") as caught:
        opened(tmp_path, whole)
    assert caught.value.offset is not None
    assert caught.value.offset > whole.index(bytes(inner))
