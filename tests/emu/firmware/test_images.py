"""What firmware reads from files: ELF, bzImage, Multiboot, option ROMs; damaged ones too."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmipatch.emu.firmware import acpi, bios, boot, elf, linux, memory_map, multiboot, option_rom, pvh, rawrom
from vmipatch.errors import EmulatorError


def make_elf(segments: list[tuple[int, int, bytes, int]], entry: int, notes: bytes = b"", machine: int = 3) -> bytes:
    """(virtual, physical, data, memory size) segments after the headers."""
    count = len(segments) + bool(notes)
    at = 52 + 32 * count
    headers, body = b"", b""
    for virtual, physical, data, size in segments:
        headers += struct.pack("<8I", 1, at + len(body), virtual, physical, len(data), size, 5, 4096)
        body += data
    if notes:
        headers += struct.pack("<8I", 4, at + len(body), 0, 0, len(notes), len(notes), 4, 4)
        body += notes
    head = b"\x7fELF\x01\x01\x01" + bytes(9)
    head += struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, entry, 52, 0, 0, 52, 32, count, 40, 0, 0)
    return head + headers + body


def test_elf_segments_and_entry() -> None:
    parsed = elf.parse(make_elf([(0xC1000000, 0x1000000, b"abc", 0x2000)], 0x1000000), "f")
    assert parsed.segments == (elf.Segment(0xC1000000, 0x1000000, b"abc", 0x2000),)
    assert parsed.physical_entry() == 0x1000000
    assert elf.parse(make_elf([(0xC1000000, 0x1000000, b"a", 9)], 0xC1000004), "f").physical_entry() == 0x1000004
    assert elf.parse(make_elf([(0x1000, 0x1000, b"a", 9)], 0x99), "f").physical_entry() == 0x99


def test_pvh_note() -> None:
    notes = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x1000040)
    parsed = elf.parse(make_elf([(0, 0x1000000, b"a", 1)], 0, b"\4\0\0\0\0\0\0\0\1\0\0\0GNU\0" + notes), "f")
    assert pvh.entry_point(parsed) == 0x1000040
    assert pvh.entry_point(elf.parse(make_elf([(0, 0x1000, b"a", 1)], 0), "f")) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF",
        b"\x7fELF\x02\x01" + bytes(60),
        make_elf([(0, 0x1000, b"a", 1)], 0, machine=62),
        make_elf([], 0),
        make_elf([(0, 0x1000, b"abcd", 2)], 0),
        make_elf([(0, 0x1000, b"abcd", 8)], 0)[:-1],
        make_elf([(0, 0x1000, b"abcd", 8)], 0)[:70],
    ],
)
def test_damaged_elf(data: bytes) -> None:
    with pytest.raises(EmulatorError):
        elf.parse(data, "f")


@given(st.binary(max_size=300), st.integers(0, 300), st.binary(max_size=8))
def test_any_bytes_as_elf(data: bytes, at: int, change: bytes) -> None:
    good = bytearray(make_elf([(0, 0x1000, b"abcd", 8)], 0, b"\4\0\0\0\4\0\0\0\1\0\0\0Xen\0abcd"))
    good[at : at + len(change)] = change
    for candidate in (data, b"\x7fELF\x01\x01" + data, bytes(good)):
        try:
            elf.parse(candidate, "f")
        except EmulatorError:
            continue


def make_bzimage(version: int = 0x20F, loadflags: int = 1) -> bytes:
    data = bytearray(0x400 + 64)
    data[0x1F1] = 1
    struct.pack_into("<H", data, 0x1FE, 0xAA55)
    data[0x200:0x202] = b"\xeb\x66"
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x206, version)
    data[0x211] = loadflags
    struct.pack_into("<I", data, 0x214, 0x100000)
    struct.pack_into("<I", data, 0x22C, 0x37FFFFFF)
    struct.pack_into("<I", data, 0x238, 255)
    struct.pack_into("<Q", data, 0x258, 0x1000000)
    struct.pack_into("<I", data, 0x260, 0x10000)
    return bytes(data)


def test_bzimage_header() -> None:
    image = linux.parse_bzimage(make_bzimage(), "f")
    assert (image.version, image.load_address, image.init_size) == (0x20F, 0x100000, 0x10000)
    assert len(image.kernel) == 64
    assert len(image.header) == 0x268 - 0x1F1  # up to the jump's target, as boot.rst says
    assert image.command_line_max == 255
    assert boot.protocol_of(make_bzimage()) == "linux"


@pytest.mark.parametrize(
    "data", [b"", bytes(4096), make_bzimage(loadflags=0), make_bzimage(version=0x1FF), make_bzimage()[:0x400]]
)
def test_unusable_bzimage(data: bytes) -> None:
    with pytest.raises(EmulatorError):
        linux.parse_bzimage(data, "f")


@given(st.integers(0x1F0, 0x270), st.binary(max_size=16))
def test_any_change_of_a_bzimage(at: int, change: bytes) -> None:
    data = bytearray(make_bzimage())
    data[at : at + len(change)] = change
    try:
        linux.parse_bzimage(bytes(data), "f")
    except EmulatorError:
        return


def test_multiboot_header() -> None:
    head = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF)
    assert multiboot.find_header(bytes(64) + head) == multiboot.Header(64, 3, (0, 0, 0, 0, 0))
    assert multiboot.find_header(bytes(62) + head + bytes(99)) is None  # not aligned
    assert multiboot.find_header(bytes(8192) + head) is None
    assert multiboot.find_header(head[:8] + bytes(4)) is None
    assert boot.protocol_of(make_elf([(0, 0x1000, bytes(8) + head, 64)], 0)) == "multiboot"


def option_rom_image(units: int = 4) -> bytes:
    rom = bytearray(units * 512)
    rom[0:4] = bytes((0x55, 0xAA, units, 0xCB))
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def test_option_rom_scan() -> None:
    area = bytearray(0x20000)
    rom = option_rom_image()
    area[0:2048] = rom
    area[0x1000 : 0x1000 + 2048] = rom
    area[0x1C00 : 0x1C00 + 2048] = rom  # not on a 2 KiB step
    area[0x2800 : 0x2800 + 2048] = rom
    area[0x2900] ^= 1  # wrong sum
    area[0x1FC00:0x1FC03] = b"\x55\xaa\x04"  # past the end
    found = option_rom.scan(bytes(area))
    assert found == [option_rom.Found(0xC0000, 2048), option_rom.Found(0xC1000, 2048)]


def test_a_rom_within_a_rom_is_not_found() -> None:
    area = bytearray(0x4000)
    inner = option_rom_image()
    area[0:3] = b"\x55\xaa\x08"
    area[2048 : 2048 + 2048] = inner
    area[7] = -sum(area[:4096]) & 0xFF
    assert option_rom.scan(bytes(area)) == [option_rom.Found(0xC0000, 4096)]


@given(st.binary(max_size=8192))
def test_any_bytes_as_rom_area(data: bytes) -> None:
    for rom in option_rom.scan(data):
        assert 0xC0000 <= rom.physical < 0xC0000 + len(data)


def test_bios_image_looks() -> None:
    assert rawrom.looks_like_bios(bios.rom_image())
    assert not rawrom.looks_like_bios(bytes(0x10000))
    assert not rawrom.looks_like_bios(bios.rom_image()[1:])
    assert boot.protocol_of(bios.rom_image()) == "bios"
    assert boot.protocol_of(b"hello") == ""


def test_bios_rom_code_is_what_it_says() -> None:
    """The handlers, disassembled by capstone."""
    import capstone

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16)
    rom = bios.rom_image()

    def text(at: int) -> list[str]:
        lines = []
        for instruction in decoder.disasm(rom[at : at + 64], at):
            lines.append(f"{instruction.mnemonic} {instruction.op_str}".strip())
            if instruction.mnemonic in ("iret", "hlt"):
                break
        return lines

    assert text(bios.STUBS) == ["out 0xe8, al", "iret"]
    assert text(bios.RETURN_STUB) == ["out 0xe8, al", "hlt"]
    assert text(bios.IRQ0_HANDLER) == [
        "push ds", "push eax", "xor ax, ax", "mov ds, ax", "inc dword ptr [0x46c]", "int 0x1c", "mov al, 0x20",
        "out 0x20, al", "pop eax", "pop ds", "iret",
    ]  # fmt: skip
    assert text(bios.IRQ_HIGH_HANDLER) == [
        "push ax", "mov al, 0x20", "out 0xa0, al", "out 0x20, al", "pop ax", "iret",
    ]  # fmt: skip
    assert text(bios.IRQ_LOW_HANDLER) == ["push ax", "mov al, 0x20", "out 0x20, al", "pop ax", "iret"]


def test_memory_map_has_no_overlaps() -> None:
    entries = memory_map.e820(64 << 20)
    ends = 0
    for start, length, _ in entries:
        assert start >= ends
        ends = start + length
    assert sum(length for _, length, kind in entries if kind == 1) == 0x9FC00 + (63 << 20)


def test_places() -> None:
    ram = 64 << 20
    memory_map.check_place(0x100000, 0x1000, ram, "x")
    for start, length in ((0, 0x1000), (0x90000, 0x1000), (0xA0000, 1), (0x80000, 0x80000), (ram - 1, 2)):
        with pytest.raises(EmulatorError, match="does not fit"):
            memory_map.check_place(start, length, ram, "x")
    assert memory_map.place_high(0x1001, ram, 0x200000, 0x37FFFFFF, "x", None) == ram - 0x2000
    assert memory_map.place_high(0x1000, 3 << 30, 0x200000, 0x37FFFFFF, "x", None) == 0x37FFF000
    with pytest.raises(EmulatorError, match="more memory"):
        memory_map.place_high(0x1000, ram, ram - 0x800, 0x37FFFFFF, "x", None)


def test_acpi_tables_add_up_and_name_each_other() -> None:
    """ACPI 2.0, 5.2: every sum is 0; RSDP to RSDT to FADT to DSDT, FACS aligned to 64 bytes."""
    data = acpi.tables()
    base = memory_map.BIOS + acpi.TABLES

    def table(address: int, signature: bytes) -> bytes:
        at = address - base
        (length,) = struct.unpack_from("<I", data, at + 4)
        assert data[at : at + 4] == signature
        assert sum(data[at : at + length]) & 0xFF == 0
        return data[at : at + length]

    assert base % 16 == 0
    assert data[:8] == b"RSD PTR "
    assert sum(data[:20]) & 0xFF == 0
    rsdt = table(struct.unpack_from("<I", data, 16)[0], b"RSDT")
    fadt = table(struct.unpack_from("<I", rsdt, 36)[0], b"FACP")
    assert len(fadt) == 116
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert struct.unpack_from("<H", fadt, 46)[0] == 9
    assert struct.unpack_from("<I", fadt, 56)[0] == 0x600
    assert struct.unpack_from("<I", fadt, 64)[0] == 0x604
    assert struct.unpack_from("<I", fadt, 76)[0] == 0x608
    assert struct.unpack_from("<I", fadt, 80)[0] == 0xAFE0
    assert (fadt[88], fadt[89], fadt[91], fadt[92]) == (4, 2, 4, 4)
    assert struct.unpack_from("<H", fadt, 109)[0] == 3
    assert b"_S5_\x12\x06\x04\0\0\0\0" in table(dsdt, b"DSDT")
