"""ELF headers, sections, segments and addresses: against readelf, pyelftools and LIEF, and with damage."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from elfwriter import ElfWriter
from hypothesis import given
from hypothesis import strategies as st

from vmipatch.errors import AddressError, ImageError
from vmipatch.image import Image, open_image

TEXT = bytes(range(256)) * 16
DATA = b"\xa5" * 0x1234


def vmlinux(bits: int = 32) -> ElfWriter:
    top = 0xC1000000 if bits == 32 else 0xFFFFFFFF81000000
    elf = ElfWriter(bits=bits, entry=0x1000000)
    elf.section(".text", TEXT, address=top, flags="ax", align=0x1000)
    elf.section(".rodata", b"constant\0" * 10, address=top + 0x10000, flags="a")
    elf.section(".data", DATA, address=top + 0x20000, flags="aw", align=32)
    elf.section(".smp_locks", bytes(8), address=top + 0x28000, flags="a", align=4)
    elf.section(".bss", address=top + 0x30000, flags="aw", type="nobits", size=0x5000)
    elf.section(".comment", b"made by hand\0", flags="ms", entry_size=1)
    return elf


def opened(tmp_path: Path, data: bytes, name: str = "vmlinux") -> Image:
    path = tmp_path / name
    path.write_bytes(data)
    return open_image(path)


def readelf(option: str, path: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("GNU readelf (package binutils) is not on this machine: no oracle for ELF headers")
    return subprocess.run(["readelf", option, path], check=True, capture_output=True, text=True).stdout


SECTION_LINE = re.compile(
    r"^\s*\[\s*\d+\] (\S+)\s+([A-Z_0-9]+)\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) [0-9a-f]+ +([A-Za-z]*) +\d",
    re.MULTILINE,
)
LOAD_LINE = re.compile(
    r"^  LOAD +0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+) ([RWE ]+) 0x", re.MULTILINE
)


@pytest.mark.parametrize("bits", [32, 64])
def test_sections_and_segments_are_those_of_readelf(tmp_path: Path, bits: int) -> None:
    image = opened(tmp_path, vmlinux(bits).build())
    rows = SECTION_LINE.findall(readelf("-SW", tmp_path / "vmlinux"))
    assert [row[0] for row in rows] == [s.name for s in image.sections]
    for row, section in zip(rows, image.sections, strict=True):
        assert [int(x, 16) for x in row[2:5]] == [section.address, section.offset, section.size]
        assert ("A" in row[5], "W" in row[5], "X" in row[5]) == (section.alloc, section.write, section.exec)
        assert (row[1] == "NOBITS") == (section.type == 8)
    loads = LOAD_LINE.findall(readelf("-lW", tmp_path / "vmlinux"))
    assert len(loads) == len(image.segments) == 5
    for load, segment in zip(loads, image.segments, strict=True):
        assert [int(x, 16) for x in load[:5]] == [
            segment.offset, segment.address, segment.physical, segment.file_size, segment.memory_size
        ]  # fmt: skip
        assert ("E" in load[5]) == segment.exec


@pytest.mark.parametrize("bits", [32, 64])
def test_pyelftools_and_lief_read_the_same(tmp_path: Path, bits: int) -> None:
    import lief
    from elftools.elf.elffile import ELFFile

    data = vmlinux(bits).build()
    image = opened(tmp_path, data)
    ours = [(s.name, s.address, s.offset, s.size) for s in image.sections]
    theirs = [
        (s.name, s["sh_addr"], s["sh_offset"], s["sh_size"])
        for s in ELFFile(io.BytesIO(data)).iter_sections()
        if s["sh_type"] != "SHT_NULL"
    ]
    assert ours == theirs
    parsed = lief.ELF.parse(list(data))
    assert parsed is not None
    assert ours == [(s.name, s.virtual_address, s.file_offset, s.size) for s in list(parsed.sections)[1:]]
    assert [(s.address, s.physical, s.offset, s.file_size) for s in image.segments] == [
        (s.virtual_address, s.physical_address, s.file_offset, s.physical_size) for s in parsed.segments
    ]


@pytest.mark.parametrize("bits", [32, 64])
def test_addresses_go_there_and_back(tmp_path: Path, bits: int) -> None:
    image = opened(tmp_path, vmlinux(bits).build())
    text = image.section(".text")
    data = image.section(".data")
    bss = image.section(".bss")
    assert text is not None
    assert data is not None
    assert bss is not None
    assert image.container == "elf"
    assert image.bits == bits
    assert image.entry == 0x1000000
    assert image.read(text.address, 4) == TEXT[:4]
    assert image.read(data.end - 4, 4) == DATA[-4:]
    assert image.read(data.address, 0) == b""
    offset = image.offset_of(data.address + 5)
    assert image.data[offset : offset + 3] == DATA[5:8]
    assert image.address_of(offset) == data.address + 5
    assert image.physical_of(text.address + 7) == 0x1000007
    assert image.virtual_of_physical(0x1000007) == text.address + 7
    assert image.physical_of(bss.address + 1) == bss.address + 1 - image.text_map
    assert image.section_at(text.address) is text
    assert image.section_at(text.end - 1) is text
    assert image.section_at(text.end) is None
    assert image.section_at(bss.end - 1) is bss
    assert image.section_at(0) is None
    assert image.text_map == (0xC0000000 if bits == 32 else 0xFFFFFFFF80000000)
    assert image.section("nothing") is None
    assert text.address in text
    assert text.end not in text


def test_bytes_that_the_file_does_not_have_are_an_error_with_the_address(tmp_path: Path) -> None:
    image = opened(tmp_path, vmlinux().build())
    for address, length in ((0xC1030000, 1), (0xC1020000 + len(DATA) - 2, 4), (0, 1), (0xFFFFFFFF, 9)):
        with pytest.raises(AddressError) as caught:
            image.read(address, length)
        assert caught.value.address == address
        assert caught.value.file == str(tmp_path / "vmlinux")
    for wrong in (image.offset_of, image.physical_of, image.virtual_of_physical, image.address_of):
        with pytest.raises(AddressError):
            wrong(0x13)


def test_an_elf_without_segments_is_addressed_by_its_sections(tmp_path: Path) -> None:
    elf = vmlinux()
    elf.segments = False
    image = opened(tmp_path, elf.build())
    assert image.segments == ()
    assert image.read(0xC1000001, 3) == TEXT[1:4]
    assert image.address_of(image.offset_of(0xC1020010)) == 0xC1020010
    assert image.page_offset == 0xC0000000


def test_per_cpu_data_has_the_address_of_its_link_and_that_of_its_load(tmp_path: Path) -> None:
    elf = ElfWriter(bits=64)
    elf.section(".text", TEXT, address=0xFFFFFFFF81000000, flags="ax")
    elf.section(".data..percpu", DATA, address=0, flags="aw", physical=0x1020000)
    image = opened(tmp_path, elf.build())
    assert image.read(4, 4) == DATA[4:8]
    assert image.read(0xFFFFFFFF81020004, 4) == DATA[4:8]
    assert image.offset_of(4) == image.offset_of(0xFFFFFFFF81020004)
    assert image.physical_of(4) == 0x1020004
    assert image.virtual_of_physical(0x1020004) == 4
    with pytest.raises(AddressError):
        image.read(0xFFFFFFFF81020000 + len(DATA), 1)


def test_other_page_offsets(tmp_path: Path) -> None:
    elf = ElfWriter(page_offset=0x80000000)
    elf.section(".text", TEXT, address=0x80100000, flags="ax")
    image = opened(tmp_path, elf.build())
    assert image.page_offset == image.text_map == 0x80000000
    assert image.physical_of(0x80100000) == 0x100000


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    image = opened(tmp_path, vmlinux().build())
    import hashlib

    assert image.sha256() == hashlib.sha256((tmp_path / "vmlinux").read_bytes()).hexdigest()


@pytest.mark.parametrize("bits", [32, 64])
def test_a_file_cut_short_anywhere_is_an_error_with_file_and_offset(tmp_path: Path, bits: int) -> None:
    data = vmlinux(bits).build()
    path = tmp_path / "cut"
    for length in [*range(0, 0x100, 7), *range(0x100, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert caught.value.file == str(path)
        assert caught.value.offset is not None
        assert "\n" not in str(caught.value)


def field(data: bytes, form: str, at: int, value: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(form, out, at, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("form", "at", "value", "words"),
    [
        ("<B", 4, 3, "little-endian ELF file of 32 or 64 bits"),
        ("<B", 5, 2, "little-endian ELF file of 32 or 64 bits"),
        ("<H", 18, 40, "another machine"),
        ("<H", 18, 62, "another machine"),
        ("<H", 16, 4, "neither a kernel nor a module"),
        ("<H", 42, 33, "program headers of 33 bytes"),
        ("<H", 46, 41, "section headers of 41 bytes"),
        ("<H", 44, 60000, "program headers reach past the end"),
        ("<H", 48, 60000, "section headers reach past the end"),
        ("<H", 50, 60000, "cannot hold the section names"),
        ("<I", 32, 0x7FFFFFFF, "past the end"),
    ],
)
def test_headers_that_cannot_be(tmp_path: Path, form: str, at: int, value: int, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        opened(tmp_path, field(vmlinux().build(), form, at, value))


def test_a_section_past_the_end_is_named(tmp_path: Path) -> None:
    data = vmlinux().build()
    table = struct.unpack_from("<I", data, 32)[0]
    with pytest.raises(ImageError, match="past the end") as caught:
        opened(tmp_path, field(data, "<I", table + 3 * 40 + 20, 0x10000000))
    assert caught.value.section == ".data"
    with pytest.raises(ImageError, match="segment of 4096 bytes at offset 0x10000000 reaches past the end"):
        opened(tmp_path, field(data, "<I", 52 + 4, 0x10000000))
    with pytest.raises(ImageError, match="more bytes in the file than in memory"):
        opened(tmp_path, field(data, "<I", 52 + 20, 1))


def test_sections_counted_in_the_first_header(tmp_path: Path) -> None:
    data = vmlinux().build()
    table, count, names = struct.unpack_from("<I", data, 32)[0], *struct.unpack_from("<HH", data, 48)
    extended = field(field(data, "<H", 48, 0), "<H", 50, 0xFFFF)
    extended = field(field(extended, "<I", table + 20, count), "<I", table + 24, names)
    assert [s.name for s in opened(tmp_path, extended).sections] == [
        s.name for s in opened(tmp_path, data, "plain").sections
    ]
    with pytest.raises(ImageError, match="more than any kernel"):
        opened(tmp_path, field(extended, "<I", table + 20, 1 << 30))


def test_files_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        open_image(tmp_path / "missing")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="empty"):
        opened(tmp_path, b"")
    with pytest.raises(ImageError, match="raw memory needs its base"):
        opened(tmp_path, b"just some text\n" * 100)
    with pytest.raises(ImageError):
        open_image("bad\0name")


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300), st.booleans()), min_size=1, max_size=12))
def test_any_layout_of_sections_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, bool]]
) -> None:
    elf = ElfWriter()
    address = 0xC1000000
    placed = []
    for i, (gap, size, executable) in enumerate(rows):
        address += gap
        body = bytes((i * 31 + j) & 255 for j in range(size))
        elf.section(f".s{i}", body, address=address, flags="ax" if executable else "aw")
        placed.append((address, body))
        address += size
    image = opened(tmp_path_factory.mktemp("elf"), elf.build())
    for i, (address, body) in enumerate(placed):
        assert image.read(address, len(body)) == body
        section = image.section_at(address)
        if body:
            assert section is not None
            assert section.name == f".s{i}"


def test_names_that_do_not_print_are_made_to(tmp_path: Path) -> None:
    elf = ElfWriter().section(".te\nxt\x1b[31m", TEXT, address=0xC1000000, flags="ax")
    elf.symbol("new\nline", 0xC1000000, 1)
    image = opened(tmp_path, elf.build())
    assert image.sections[0].name == ".te?xt?[31m"
    assert image.symbols.at(0xC1000000) == ("new?line", 0)
