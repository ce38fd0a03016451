"""Raw memory with a base, the version banner, and PAGE_OFFSET."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from elfwriter import ElfWriter
from kallsyms_writer import build, symbols

from vmipatch.errors import AddressError, ImageError, UsageError
from vmipatch.image import Image, banner, open_image

DEBIAN_6_1 = (
    "Linux version 6.1.0-50-686 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0, "
    "GNU ld (GNU Binutils for Debian) 2.40) #1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-07-02)"
)
DEBIAN_2_6_32 = (
    "Linux version 2.6.32-5-686 (Debian 2.6.32-48squeeze20) (jmm@debian.org) (gcc version 4.3.5 (Debian 4.3.5-4) ) "
    "#1 SMP Thu Apr 11 20:29:39 UTC 2013"
)


def raw(tmp_path: Path, data: bytes, base: int) -> Image:
    (tmp_path / "memory").write_bytes(data)
    return open_image(tmp_path / "memory", base=base)


def elf64(tmp_path: Path, text: bytes, rodata: bytes = b"\0") -> Image:
    elf = ElfWriter(bits=64)
    elf.section(".text", text, address=0xFFFFFFFF81000000, flags="ax")
    elf.section(".rodata", rodata, address=0xFFFFFFFF82000000, flags="a")
    (tmp_path / "vmlinux").write_bytes(elf.build())
    return open_image(tmp_path / "vmlinux")


@pytest.mark.parametrize(
    ("base", "bits", "page_offset", "physical"),
    [
        (0xC1000000, 32, 0xC0000000, 0x1000000),
        (0xB0100000, 32, 0xB0000000, 0x100000),
        (0x80100000, 32, 0x80000000, 0x100000),
        (0x78100000, 32, 0x78000000, 0x100000),
        (0x40100000, 32, 0x40000000, 0x100000),
        (0xFFFFFFFF81000000, 64, None, 0x1000000),
    ],
)
def test_raw_memory(tmp_path: Path, base: int, bits: int, page_offset: int | None, physical: int) -> None:
    tables = build(symbols(300, base), bits=bits, addresses="relative", era="6.4")
    data = tables + b"Linux version 6.9.3 (x)\n\0"
    image = raw(tmp_path, data, base)
    assert (image.container, image.bits, image.reconstructed) == ("raw", bits, True)
    assert sum(s.size for s in image.sections) == len(data)
    assert image.read(base + 4, 8) == data[4:12]
    assert image.offset_of(base + 9) == 9
    assert image.address_of(9) == base + 9
    assert image.physical_of(base) == physical
    assert image.version == (6, 9, 3)
    assert image.symbols.sources == ("kallsyms",)
    if page_offset is not None:
        assert image.page_offset == page_offset
    with pytest.raises(AddressError):
        image.read(base + len(data) - 1, 2)


def test_with_a_base_an_elf_file_is_raw_memory_too(tmp_path: Path) -> None:
    data = ElfWriter().section(".text", bytes(100), address=0xC1000000, flags="ax").build()
    image = raw(tmp_path, data, 0xC8000000)
    assert image.container == "raw"
    assert image.read(0xC8000000, 4) == b"\x7fELF"


@pytest.mark.parametrize("base", [-1, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 64])
def test_raw_memory_that_does_not_fit(tmp_path: Path, base: int) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        raw(tmp_path, bytes(100), base)


def test_low_raw_memory_has_no_page_offset(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="PAGE_OFFSET"):
        _ = raw(tmp_path, bytes(100), 0x1000).page_offset


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (DEBIAN_6_1, (6, 1, 176)),
        (DEBIAN_2_6_32, (2, 6, 32)),
        ("Linux version 2.6.21.7 (me) #3", (2, 6, 21, 7)),
        ("Linux version 6.12-rc1+ (me)", (6, 12, 0)),
        ("Linux version 5.4.0-42-generic (buildd@x) (gcc version 9.3.0 (Ubuntu 9.3.0-10ubuntu2)) #46", (5, 4, 0)),
        ("6.1.0-50-686", (6, 1, 0)),
    ],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert banner.version(text) == version


def test_the_banner_is_not_the_format_string(tmp_path: Path) -> None:
    decoys = b"Linux version %s (%s)\n\0" * 3 + b"Linux version \0"
    image = raw(tmp_path, bytes(5000) + decoys + DEBIAN_6_1.encode() + b"\n\0", 0xC1000000)
    assert image.banner == DEBIAN_6_1
    assert raw(tmp_path, bytes(50) + decoys, 0xC1000000).banner is None
    assert raw(tmp_path, bytes(50) + decoys, 0xC1000000).version is None


def movabs(register: int, value: int) -> bytes:
    return bytes([0x48 | register >> 3, 0xB8 | register & 7]) + struct.pack("<Q", value)


def test_page_offset_of_64_bits_is_what_the_code_loads(tmp_path: Path) -> None:
    code = movabs(0, 0xFFFF888000000000) + movabs(9, 0xFFFF880000000000) * 3 + movabs(2, 0x1122334455667788) * 9
    image = elf64(tmp_path, code)
    assert image.page_offset == 0xFFFF880000000000
    assert image.text_map == 0xFFFFFFFF80000000
    # The same eight bytes, but as no instruction's operand.
    with pytest.raises(ImageError, match="PAGE_OFFSET"):
        _ = elf64(tmp_path, struct.pack("<Q", 0xFFFF880000000000) * 4).page_offset


@pytest.mark.parametrize(
    ("version", "page_offset"),
    [("6.1.5", 0xFFFF888000000000), ("4.19.0", 0xFFFF880000000000), ("2.6.26", 0xFFFF810000000000)],
)
def test_page_offset_of_64_bits_by_version(tmp_path: Path, version: str, page_offset: int) -> None:
    image = elf64(tmp_path, bytes(100), f"Linux version {version} (x)\0".encode())
    assert image.page_offset == page_offset


def test_page_offset_base_is_read_where_it_is_exported(tmp_path: Path) -> None:
    elf = ElfWriter(bits=64)
    elf.section(".text", movabs(0, 0xFFFF888000000000), address=0xFFFFFFFF81000000, flags="ax")
    elf.section(".data", struct.pack("<Q", 0xFFFF9000C0000000), address=0xFFFFFFFF82000000, flags="aw")
    elf.symbol("page_offset_base", 0xFFFFFFFF82000000, ".data", type="object")
    (tmp_path / "vmlinux").write_bytes(elf.build())
    assert open_image(tmp_path / "vmlinux").page_offset == 0xFFFF9000C0000000
