"""A kernel module (ET_REL): addresses for its sections, and its relocations applied for reading.

A module has no addresses before it is loaded.  Here its sections in memory get
some, one behind the other in the order of the file, each aligned as it asks,
from where the kernel's own module area is: 0xF8000000 (i386: VMALLOC_START of
a kernel with 896 MiB of low memory) or 0xFFFFFFFFC0000000 (x86-64:
MODULES_VADDR, Documentation/arch/x86/x86_64/mm.rst).  Relocations against the
module's own symbols are applied to a copy, as apply_relocate of
arch/x86/kernel/module.c does; fields that refer to the kernel or another
module keep what the file has there.  Imports errors and its sisters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image.elf import Elf
from vmipatch.image.model import SHT_REL, SHT_RELA, Section
from vmipatch.image.symtab import SHN_ABS, SHN_LORESERVE, STB_WEAK, STT_SECTION, Rows

BASE = {32: 0xF8000000, 64: 0xFFFFFFFFC0000000}
# All of i386's module area below the fixed mappings; more than any x86-64 module.
_ROOM = {32: 0x07000000, 64: 0x20000000}
_MAX_ALIGN = 1 << 16
_MAX_RELOCATIONS = 1 << 19

_32, _64 = (1 << 32) - 1, (1 << 64) - 1
# System V ABI, Intel386 and AMD64 supplements, "Relocation Types": number to the bytes of the field,
# whether it is relative to its own address, and a mask of its width.
_TYPES: dict[int, dict[int, tuple[int, bool, int]]] = {
    32: {1: (4, False, _32), 2: (4, True, _32), 4: (4, True, _32)},  # R_386_32, _PC32, _PLT32
    64: {
        1: (8, False, _64), 2: (4, True, _32), 4: (4, True, _32),  # R_X86_64_64, _PC32, _PLT32
        10: (4, False, _32), 11: (4, False, _32), 24: (8, True, _64),  # R_X86_64_32, _32S, _PC64
    },
}  # fmt: skip
_NONE = 0
SHN_UNDEF, SHN_LIVEPATCH = 0, 0xFF20


@dataclass(frozen=True, slots=True)
class Relocation:
    """One field that the module loader fills in.

    ``address`` of the field; ``symbol`` its name, for a section's own symbol the
    section's; ``target`` the symbol's address, None if the module does not
    have it; ``type`` the number of the ABI.
    """

    address: int
    symbol: str
    addend: int
    type: int
    target: int | None


def place(elf: Elf, path: str) -> tuple[Section, ...]:
    """The sections with addresses; raises :class:`ImageError` where they cannot all have one."""
    at = BASE[elf.bits]
    end = at + _ROOM[elf.bits]
    found = []
    for section in elf.sections:
        if section.alloc:
            align = section.align or 1
            if align > _MAX_ALIGN or align & (align - 1):
                raise ImageError(f"an alignment of {align} bytes", file=path, section=section.name)
            at = -(-at // align) * align
            section = replace(section, address=at)
            at += section.size
            if at > end:
                raise ImageError(
                    f"the sections need more than the {_ROOM[elf.bits]} bytes that modules can have",
                    file=path, section=section.name,
                )  # fmt: skip
        found.append(section)
    return tuple(found)


class Linked:
    """A module's relocations, and its bytes with those applied that can be.

    ``memory`` is as long as the file; ``undefined`` names the symbols that
    relocations want from elsewhere and that ``resolve`` does not know.  ``percpu`` is the number of a
    section whose symbols have addresses of their own, and what those are relative to.  Relocations of sections
    whose name ``without`` is true for are left alone: a third of a module's are the unwinder's.
    """

    def __init__(
        self,
        data: bytes | mmap,
        path: str,
        bits: int,
        sections: tuple[Section, ...],
        symbols: Rows,
        resolve: Callable[[str], int | None] | None = None,
        percpu: tuple[int, int] | None = None,
        without: Callable[[str], bool] | None = None,
    ) -> None:
        self._bits = bits
        self._path = path
        self._sections = {s.index: s for s in sections}
        self._symbols = symbols
        self._percpu = percpu
        self._values = [self._value(value, index) for _, value, _, index in symbols.rows]
        if resolve is not None:
            self._resolve(resolve)
        # Address of the field: number of the symbol, addend, type.
        self._rows: dict[int, tuple[int, int, int]] = {}
        self.memory = bytearray(data)
        missing: set[int] = set()
        for table in sections:
            target = self._sections.get(table.info)
            if without is not None and target is not None and without(target.name):
                continue
            if table.type in (SHT_REL, SHT_RELA) and target is not None and target.alloc:
                missing |= self._link(data, table, target)
        self.undefined = tuple(sorted({self._name(number) for number in missing}))

    def relocation(self, address: int) -> Relocation | None:
        """The relocation of the field at a virtual address."""
        row = self._rows.get(address)
        if row is None:
            return None
        number, addend, kind = row
        return Relocation(address, self._name(number), addend, kind, self._values[number])

    def relocations(self) -> Iterator[Relocation]:
        """All of them, by address."""
        for address in sorted(self._rows):
            found = self.relocation(address)
            assert found is not None
            yield found

    def _link(self, data: bytes | mmap, table: Section, target: Section) -> set[int]:
        """Apply one table; returns the numbers of the symbols that the module does not have."""
        bits = self._bits
        types, values, memory, rows = _TYPES[bits], self._values, self.memory, self._rows
        with_addend = table.type == SHT_RELA
        form = ("<II" if bits == 32 else "<QQ") + (("i" if bits == 32 else "q") if with_addend else "")
        size = struct.calcsize(form)
        if table.size % size or table.size // size + len(rows) > _MAX_RELOCATIONS:
            raise ImageError(
                f"{table.size} bytes are no relocations of {size} bytes each, or too many",
                file=self._path, section=table.name, offset=table.offset,
            )  # fmt: skip
        shift, low = (8, 0xFF) if bits == 32 else (32, 0xFFFFFFFF)
        missing = set()
        room, start, base = target.file_size, target.offset, target.address
        blob = data[table.offset : table.offset + table.size]
        for i, row in enumerate(struct.iter_unpack(form, blob)):
            place, number, kind = row[0], row[1] >> shift, row[1] & low
            if kind == _NONE:
                continue
            width, relative, mask = types.get(kind, (0, False, 0))
            if not width or number >= len(values) or place + width > room:
                raise ImageError(
                    f"relocation {i} cannot be: type {kind}, symbol {number}, {target.name} + {place:#x}",
                    file=self._path, section=table.name, offset=table.offset + i * size,
                )  # fmt: skip
            offset = start + place
            addend = row[2] if with_addend else _signed(data[offset : offset + width])
            rows[base + place] = (number, addend, kind)
            value = values[number]
            if value is None:
                missing.add(number)
                continue
            value += addend - base - place if relative else addend
            memory[offset : offset + width] = (value & mask).to_bytes(width, "little")
        return missing

    def _resolve(self, resolve: Callable[[str], int | None]) -> None:
        """Give the symbols that the module does not have the values that they have elsewhere."""
        for number, (name, _, info, index) in enumerate(self._symbols.rows):
            if number and name and index in (SHN_UNDEF, SHN_LIVEPATCH):
                value = resolve(self._symbols.name(number))
                # A weak symbol that nobody has is 0 (simplify_symbols).
                self._values[number] = 0 if value is None and info >> 4 == STB_WEAK else value

    def _name(self, number: int) -> str:
        name_at, _, info, index = self._symbols.rows[number]
        if info & 15 == STT_SECTION and not name_at:
            section = self._sections.get(index)
            return section.name if section else ""
        return self._symbols.name(number)

    def _value(self, value: int, index: int) -> int | None:
        if index == SHN_ABS:
            return value
        if self._percpu is not None and index == self._percpu[0]:
            return value + self._percpu[1]
        section = self._sections.get(index) if index < SHN_LORESERVE else None
        return section.address + value if section is not None and section.alloc else None


def _signed(field: bytes) -> int:
    return int.from_bytes(field, "little", signed=True)
