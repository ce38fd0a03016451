"""Exported symbols in every layout of the __ksymtab tables."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from elfwriter import ElfWriter

from vmipatch.image import Image, open_image

TOP = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
NAMES = ["boot_cpu_data", "cpu_data", "empty_zero_page", "init_task", "kmalloc", "pv_ops", "x86_platform"]


def strings(names: list[str]) -> tuple[bytes, dict[str, int]]:
    """The names, the empty namespace first; one that ends another shares its bytes, as the linker has it."""
    blob, at = b"\0", {"": 0}
    for name in sorted(names, key=len, reverse=True):
        found = blob.find(name.encode() + b"\0")
        if found < 0:
            found = len(blob)
            blob += name.encode() + b"\0"
        at[name] = found
    return blob, at


def kernel(bits: int, relative: bool, fields: int, tables: dict[str, dict[str, int]]) -> bytes:
    """``tables``: section name to name and address of the symbols in it."""
    top = TOP[bits]
    elf = ElfWriter(bits=bits)
    elf.section(".text", bytes(0x1000), address=top, flags="ax")
    elf.section(".data", bytes(0x1000), address=top + 0x100000, flags="aw")
    names_address = top + 0x60000
    blob, at = strings([name for table in tables.values() for name in table])
    code = "i" if relative else "I" if bits == 32 else "Q"
    width = struct.calcsize(code)
    for i, (section, symbols) in enumerate(tables.items()):
        address = here = top + 0x50000 + 0x1000 * i
        data = b""
        for name, value in symbols.items():
            row = [value, names_address + at[name], names_address + at[""]]
            if relative:
                row = [target - here - width * k for k, target in enumerate(row)]
            data += struct.pack(f"<{fields}{code}", *row[:fields])
            here += width * fields
        elf.section(section, data, address=address, flags="a")
    elf.section("__ksymtab_strings", blob, address=names_address, flags="ams", entry_size=1)
    return elf.build()


def opened(tmp_path: Path, data: bytes) -> Image:
    (tmp_path / "vmlinux").write_bytes(data)
    return open_image(tmp_path / "vmlinux")


def exported(bits: int) -> dict[str, int]:
    return {name: TOP[bits] + (0x100000 if i % 2 else 0) + 16 * i for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(("bits", "relative", "fields"), list(itertools.product((32, 64), (True, False), (2, 3))))
def test_every_layout(tmp_path: Path, bits: int, relative: bool, fields: int) -> None:
    symbols = exported(bits)
    halves = {"__ksymtab": dict(list(symbols.items())[:4]), "__ksymtab_gpl": dict(list(symbols.items())[4:])}
    image = opened(tmp_path, kernel(bits, relative, fields, halves))
    assert image.symbols.sources == ("exports",)
    assert {name: image.symbols.lookup(name) for name in NAMES} == symbols
    assert image.symbols.lookup("data") is None
    assert image.symbols.at(symbols["pv_ops"] + 4) == ("pv_ops", 4)
    assert {name: kind for _, kind, name in image.symbols.all()} == {
        name: "D" if i % 2 else "T" for i, name in enumerate(NAMES)
    }


def test_a_name_inside_another_is_read(tmp_path: Path) -> None:
    symbols = {"boot_cpu_data": 0xC1100000, "data": 0xC1100010, "kfree": 0xC1000000, "vfree": 0xC1000010}
    image = opened(tmp_path, kernel(32, True, 3, {"__ksymtab": symbols}))
    assert {name: image.symbols.lookup(name) for name in symbols} == symbols


def test_older_tables_and_those_of_objects_count_too(tmp_path: Path) -> None:
    names = ["__ksymtab_unused", "__ksymtab_gpl_future", "___ksymtab+kmalloc", "___ksymtab_gpl+pv_ops"]
    tables = {name: {f"from_{i}": 0xC1000000 + 16 * i} for i, name in enumerate(names)}
    image = opened(tmp_path, kernel(32, False, 2, tables))
    assert [image.symbols.lookup(f"from_{i}") for i in range(4)] == [0xC1000000 + 16 * i for i in range(4)]


def test_names_that_start_inside_others_are_not_believed(tmp_path: Path) -> None:
    blob, at = strings(NAMES)
    data = b"".join(struct.pack("<II", 0xC1000000, 0xC1060000 + at[name] + (i > 1)) for i, name in enumerate(NAMES))
    elf = ElfWriter().section(".text", bytes(64), address=0xC1000000, flags="ax")
    elf.section("__ksymtab", data, address=0xC1050000, flags="a")
    elf.section("__ksymtab_strings", blob, address=0xC1060000, flags="ams")
    assert opened(tmp_path, elf.build()).symbols.sources == ()


@pytest.mark.parametrize("damage", ["odd size", "names elsewhere", "no strings"])
def test_tables_that_fit_no_layout_give_nothing(tmp_path: Path, damage: str) -> None:
    data = kernel(32, True, 3, {"__ksymtab": exported(32)})
    elf = ElfWriter()
    image = opened(tmp_path, data)
    for section in image.sections:
        body = image.data[section.offset : section.offset + section.size]
        if damage == "odd size" and section.name == "__ksymtab":
            body = body[:-1]
        if damage == "names elsewhere" and section.name == "__ksymtab":
            body = b"\x7f" * len(body)
        if damage == "no strings" and section.name == "__ksymtab_strings":
            continue
        if section.alloc:
            elf.section(section.name, body, address=section.address, flags="ax" if section.exec else "a")
    assert opened(tmp_path, elf.build()).symbols.sources == ()
