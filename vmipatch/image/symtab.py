"""The symbol table of an ELF file.  Imports errors and image.model.

Layout: System V gABI chapter 4 "Symbol Table".  Kind letters are those of nm(1).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image.model import SHT_NOBITS, SHT_SYMTAB, Section

SHN_UNDEF, SHN_LORESERVE, SHN_ABS = 0, 0xFF00, 0xFFF1
STB_LOCAL, STB_WEAK = 0, 2
STT_NOTYPE, STT_OBJECT, STT_SECTION, STT_FILE = 0, 1, 3, 4

# 32: st_name, st_value, st_size, st_info, st_other, st_shndx; 64: name, info, other, shndx, value, size.
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
# A kernel with all its debugging symbols has half a million.
_MAX_SYMBOLS = 1 << 20


@dataclass(frozen=True, slots=True)
class RawSymbol:
    """One entry; ``value`` is an address or, in a relocatable file, an offset in section number ``index``."""

    name: str
    value: int
    info: int
    index: int

    @property
    def type(self) -> int:
        """STT_…"""
        return self.info & 15

    @property
    def bind(self) -> int:
        """STB_…"""
        return self.info >> 4


def read(data: bytes | mmap, path: str, bits: int, sections: tuple[Section, ...]) -> list[RawSymbol]:
    """Every entry of the symbol table, the empty first one too; empty when there is no table."""
    table = next((s for s in sections if s.type == SHT_SYMTAB), None)
    if table is None:
        return []
    form = _SYMBOL[bits]
    if table.size % form.size or table.size // form.size > _MAX_SYMBOLS:
        raise ImageError(
            f"a symbol table of {table.size} bytes is not one of up to {_MAX_SYMBOLS} entries of {form.size}",
            file=path, section=table.name, offset=table.offset,
        )  # fmt: skip
    strings = next((s for s in sections if s.index == table.link), None)
    if strings is None or strings.type == SHT_NOBITS:
        raise ImageError("the symbol table has no names", file=path, section=table.name, offset=table.offset)
    names = data[strings.offset : strings.offset + strings.size]
    rows = form.iter_unpack(data[table.offset : table.offset + table.size])
    if bits == 32:
        return [RawSymbol(_name(names, n), v, info, index) for n, v, _, info, _, index in rows]
    return [RawSymbol(_name(names, n), v, info, index) for n, info, _, index, v, _ in rows]


def _name(names: bytes, at: int) -> str:
    if not at:
        return ""
    stop = names.find(b"\0", at, at + 4096)
    return names[at : stop if stop >= 0 else at + 4096].decode("utf-8", "replace")


def placed(symbols: list[RawSymbol], sections: tuple[Section, ...], *, relocatable: bool) -> Iterator[
    tuple[int, int, str, str]
]:  # fmt: skip
    """The symbols that name a place: virtual address, rank among aliases (least first), kind letter, name."""
    by_index = {s.index: s for s in sections}
    for symbol in symbols:
        if not symbol.name or symbol.index == SHN_UNDEF or symbol.type in (STT_SECTION, STT_FILE):
            continue
        section = by_index.get(symbol.index) if symbol.index < SHN_LORESERVE else None
        if relocatable and (section is None or not section.alloc):
            continue
        address = symbol.value + (section.address if relocatable and section else 0)
        letter = "a" if section is None else kind(section)
        if symbol.bind == STB_WEAK:
            letter = "v" if symbol.type == STT_OBJECT else "w"
        if symbol.bind != STB_LOCAL:
            letter = letter.upper()
        # As a reader expects: global before local, weak last, and a typed symbol before a bare label.
        rank = 2 * (symbol.bind == STB_LOCAL) + 4 * (symbol.bind == STB_WEAK) + (symbol.type == STT_NOTYPE)
        yield address, rank, letter, symbol.name


def kind(section: Section) -> str:
    """The letter of nm(1), lower case, for a symbol in a section."""
    if section.exec:
        return "t"
    if section.type == SHT_NOBITS:
        return "b"
    return "d" if section.write else "r"
