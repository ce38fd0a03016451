"""The symbol map of a built ROM: as text, and as an ELF file for debuggers.  Imports nothing of the builder's
but what it made.

The ELF file holds the image at its linear address as ``.text`` and the names as functions, so that
``add-symbol-file`` needs no address; layout after the System V ABI, Intel386 supplement.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

PAGE_OFFSET = 0xC0000000  # where i386 Linux sees physical memory, by default


class Named(Protocol):
    """A name in an image: offset and size in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...


def as_map(parts: Iterable[tuple[int, str, Sequence[Named]]], base: int) -> str:
    """One line a symbol: linear address, offset in the ROM file, size, name.

    ``parts`` are (offset of the image in the file, ABI, symbols); ``base`` is the ROM's physical address.
    """
    out = [f"# linear address at physical {base:#x} + {PAGE_OFFSET:#x}, offset, size, name\n"]
    for start, abi, symbols in parts:
        out.append(f"# image at {start:#x}, {abi}\n")
        out += [
            f"{PAGE_OFFSET + base + start + s.offset:08x} {start + s.offset:05x} {s.size:5d} {s.name}\n"
            for s in symbols
        ]
    return "".join(out)


def as_elf(rom: bytes, parts: Iterable[tuple[int, str, Sequence[Named]]], base: int) -> bytes:
    """An ELF32 executable with the ROM at PAGE_OFFSET + ``base`` and its symbols."""
    address = PAGE_OFFSET + base
    names = bytearray(b"\0")
    table = bytearray(16)
    for start, _, symbols in parts:
        for symbol in symbols:
            kind = 0x12  # global function
            table += struct.pack("<IIIBBH", len(names), address + start + symbol.offset, symbol.size, kind, 0, 1)
            names += symbol.name.encode("ascii") + b"\0"
    sections = b"\0.text\0.symtab\0.strtab\0.shstrtab\0"
    text_at = 0x1000
    table_at = text_at + len(rom) + -len(rom) % 16
    names_at = table_at + len(table)
    sections_at = names_at + len(names)
    headers_at = sections_at + len(sections) + -(sections_at + len(sections)) % 16
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIIIIIHHHHHH", 2, 3, 1, address, 52, headers_at, 0, 52, 32, 1, 40, 5, 4
    )
    program = struct.pack("<8I", 1, text_at, address, base, len(rom), len(rom), 5, 0x1000)
    out = bytearray((header + program).ljust(text_at, b"\0"))
    out += rom.ljust(table_at - text_at, b"\0") + table + names + sections
    out += bytes(headers_at - len(out))
    for record in (
        (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (1, 1, 6, address, text_at, len(rom), 0, 0, 4096, 0),
        (7, 2, 0, 0, table_at, len(table), 3, 1, 4, 16),
        (15, 3, 0, 0, names_at, len(names), 0, 0, 1, 0),
        (23, 3, 0, 0, sections_at, len(sections), 0, 0, 1, 0),
    ):
        out += struct.pack("<10I", *record)
    return bytes(out)
