"""The symbol table of an ELF file.  Imports errors and image.model.

Layout: System V gABI chapter 4 "Symbol Table".  Kind letters are those of nm(1).
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from functools import cached_property
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image.model import SHT_NOBITS, SHT_SYMTAB, Section
from vmipatch.image.text import printable

SHN_LORESERVE, SHN_ABS = 0xFF00, 0xFFF1
STB_LOCAL, STB_WEAK = 0, 2
STT_NOTYPE, STT_OBJECT, STT_SECTION, STT_FILE = 0, 1, 3, 4
_RANK = {STB_LOCAL: 2, STB_WEAK: 4}

# 32: st_name, st_value, st_size, st_info, st_other, st_shndx; 64: name, info, other, shndx, value, size.
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
# A kernel with all its static symbols has a quarter of a million.
_MAX_SYMBOLS = 1 << 19
# KSYM_NAME_LEN; a longer name is cut.
_MAX_NAME = 512


class Rows:
    """The entries of a symbol table as they stand in the file, names read when asked for.

    ``rows`` are (offset of the name, value, info, section number); a value is an
    address or, in a relocatable file, an offset in its section.
    """

    def __init__(self, rows: list[tuple[int, int, int, int]], names: bytes) -> None:
        self.rows = rows
        self._names = names

    def name(self, number: int) -> str:
        """The name of an entry."""
        at = self.rows[number][0]
        stop = self._names.find(b"\0", at, at + _MAX_NAME)
        return printable(self._names[at : stop if stop >= 0 else at + _MAX_NAME])

    def named(self, name: str) -> set[int]:
        """The offsets of a name in the strings; it may be the end of a longer one."""
        wanted = name.encode("utf-8", "surrogateescape") + b"\0"
        found = set()
        at = self._names.find(wanted)
        while at >= 0:
            found.add(at)
            at = self._names.find(wanted, at + 1)
        return found


def read(data: bytes | mmap, path: str, bits: int, sections: tuple[Section, ...]) -> Rows:
    """Every entry of the symbol table, the empty first one too; none when there is no table.

    Raises :class:`ImageError` for a table of a wrong or absurd size or without names.
    """
    table = next((s for s in sections if s.type == SHT_SYMTAB), None)
    if table is None:
        return Rows([], b"")
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
    entries = form.iter_unpack(data[table.offset : table.offset + table.size])
    if bits == 32:
        return Rows([(n, v, info, index) for n, v, _, info, _, index in entries], names)
    return Rows([(n, v, info, index) for n, info, _, index, v, _ in entries], names)


class SymbolTable:
    """The symbols that name a place, by address and by name."""

    def __init__(self, table: Rows, sections: tuple[Section, ...], *, relocatable: bool) -> None:
        self._table = table
        letters = {s.index: kind(s) for s in sections}
        bases = {s.index: s.address if relocatable else 0 for s in sections if s.alloc or not relocatable}
        if not relocatable:
            letters[SHN_ABS], bases[SHN_ABS] = "a", 0
        self._letters = letters
        # Virtual address, rank among aliases (least first), number: as a reader expects, global
        # before local, weak last, and a typed symbol before a bare label.
        self._placed = sorted(
            (
                value + bases[index],
                _RANK.get(info >> 4, 0) + (info & 15 == STT_NOTYPE),
                number,
            )
            for number, (name, value, info, index) in enumerate(table.rows)
            if name and index in bases and info & 15 not in (STT_SECTION, STT_FILE)
        )
        self.addresses = [row[0] for row in self._placed]

    def floor(self, address: int) -> int:
        """The number of the symbol that an address is in, or -1; of aliases that of the least rank."""
        i = bisect_right(self.addresses, address) - 1
        return i if i < 0 else bisect_left(self.addresses, self.addresses[i])

    def entry(self, index: int) -> str:
        """Kind letter of nm(1) and name of a symbol, as one string."""
        number = self._placed[index][2]
        _, _, info, section = self._table.rows[number]
        letter = self._letters[section]
        if info >> 4 == STB_WEAK:
            letter = "v" if info & 15 == STT_OBJECT else "w"
        return (letter if info >> 4 == STB_LOCAL else letter.upper()) + self._table.name(number)

    def lookup(self, name: str) -> int | None:
        """The address of a name; of symbols with one name that of the least rank, then the lowest."""
        best = min((self._by_name[at] for at in self._table.named(name) if at in self._by_name), default=None)
        return best[1] if best else None

    @cached_property
    def _by_name(self) -> dict[int, tuple[int, int]]:
        """Offset of a name in the strings to the best rank and address that have it."""
        rows = self._table.rows
        ordered = sorted(((rank, address, number) for address, rank, number in self._placed), reverse=True)
        return {rows[number][0]: (rank, address) for rank, address, number in ordered}


def kind(section: Section) -> str:
    """The letter of nm(1), lower case, for a symbol in a section."""
    if section.exec:
        return "t"
    if section.type == SHT_NOBITS:
        return "b"
    return "d" if section.write else "r"
