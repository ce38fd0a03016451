"""Builds small ELF files in code, for tests that need a kernel or a module of known content.

    elf = ElfWriter(bits=32)                                  # kind="exec": a vmlinux
    elf.section(".text", code, address=0xC1000000, flags="ax")
    elf.section(".bss", address=0xC1100000, flags="aw", type="nobits", size=0x2000)
    elf.symbol("native_cli", 0xC1000010, ".text", size=2)
    data = elf.build()

    ko = ElfWriter(bits=32, kind="rel")                       # a module
    ko.section(".text", code, flags="ax").section(".smp_locks", bytes(4), flags="a")
    ko.symbol("f", 0, ".text")                                # value: offset in the section
    ko.relocation(".smp_locks", 0, R_386_32, ".text", addend=3)
    data = ko.build()

Layouts follow the System V gABI, chapters 4 and 5, and share no code with the
reader under test.  Every method returns the writer, so calls can be chained.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

R_386_32, R_386_PC32, R_386_PLT32 = 1, 2, 4
R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, R_X86_64_32, R_X86_64_32S = 1, 2, 4, 10, 11

_KIND = {"rel": 1, "exec": 2, "dyn": 3, "core": 4}
_TYPE = {"progbits": 1, "symtab": 2, "strtab": 3, "rela": 4, "note": 7, "nobits": 8, "rel": 9}
_SYMBOL_TYPE = {"notype": 0, "object": 1, "func": 2, "section": 3, "file": 4}
_BIND = {"local": 0, "global": 1, "weak": 2}
_FLAG = {"w": 1, "a": 2, "x": 4, "m": 0x10, "s": 0x20}


@dataclass
class _Section:
    name: str
    data: bytes
    address: int
    flags: int
    type: int
    size: int
    align: int
    link: int | str = 0
    info: int | str = 0
    entry_size: int = 0
    physical: int | None = None
    offset: int = 0


@dataclass
class _Symbol:
    name: str
    value: int
    section: str | int
    size: int
    type: int
    bind: int


@dataclass
class ElfWriter:
    """One ELF file in the making.

    ``page_offset`` is what PT_LOAD's physical addresses are below the virtual
    ones: 0xC0000000 or, for 64 bits, 0xFFFFFFFF80000000 unless given.
    ``segments`` False leaves the program headers out.
    """

    bits: int = 32
    kind: str = "exec"
    entry: int = 0
    page_offset: int | None = None
    segments: bool = True
    machine: int | None = None
    _sections: list[_Section] = field(default_factory=list)
    _symbols: list[_Symbol] = field(default_factory=list)
    _relocations: dict[str, list[tuple[int, int, str, int]]] = field(default_factory=dict)

    def section(
        self,
        name: str,
        data: bytes = b"",
        *,
        address: int = 0,
        flags: str = "",
        type: str | int = "progbits",
        size: int | None = None,
        align: int = 1,
        link: int | str = 0,
        info: int | str = 0,
        entry_size: int = 0,
        physical: int | None = None,
    ) -> ElfWriter:
        """A section; ``flags`` of ``a`` (in memory), ``w``, ``x``; ``size`` is for ``nobits``.

        ``physical`` is where its segment is loaded, ``page_offset`` below its address unless given.
        """
        bits = sum(_FLAG[f] for f in flags)
        number = _TYPE[type] if isinstance(type, str) else type
        length = len(data) if size is None else size
        self._sections.append(
            _Section(name, bytes(data), address, bits, number, length, align, link, info, entry_size, physical)
        )
        return self

    def symbol(
        self,
        name: str,
        value: int = 0,
        section: str | int | None = None,
        *,
        size: int = 0,
        type: str = "func",
        bind: str = "global",
    ) -> ElfWriter:
        """A symbol; ``section`` None is undefined, ``"*ABS*"`` absolute, a number is taken as it is."""
        index: str | int = 0 if section is None else 0xFFF1 if section == "*ABS*" else section
        self._symbols.append(_Symbol(name, value, index, size, _SYMBOL_TYPE[type], _BIND[bind]))
        return self

    def relocation(self, section: str, offset: int, type: int, symbol: str, addend: int = 0) -> ElfWriter:
        """A relocation in ``section`` against a symbol, or against the section of that name.

        32 bits: REL, so the addend must be in the section's bytes, and a given one is stored there.
        64 bits: RELA.
        """
        self._relocations.setdefault(section, []).append((offset, type, symbol, addend))
        return self

    def build(self) -> bytes:
        """The file."""
        sections = [_Section("", b"", 0, 0, 0, 0, 0), *(_copy(s) for s in self._sections)]
        index = {s.name: i for i, s in reversed(list(enumerate(sections)))}
        if self._symbols or self._relocations:
            self._add_symbols(sections, index)
        sections.append(_Section(".shstrtab", b"", 0, 0, _TYPE["strtab"], 0, 1))
        names = bytearray(b"\0")
        name_at = []
        for s in sections:
            name_at.append(len(names) if s.name else 0)
            if s.name:
                names += s.name.encode() + b"\0"
        sections[-1].data, sections[-1].size = bytes(names), len(names)

        loads = [s for s in sections if s.flags & 2 and s.size]
        loads = loads if self.segments and self.kind in ("exec", "dyn") else []
        header_size, segment_size, section_size = (52, 32, 40) if self.bits == 32 else (64, 56, 64)
        out = bytearray(header_size + segment_size * len(loads))
        for s in sections[1:]:
            out += bytes(-len(out) % (0x1000 if s in loads and s.align >= 0x1000 else max(s.align, 1)))
            s.offset = len(out)
            out += s.data
        out += bytes(-len(out) % 8)
        table = len(out)
        for s, name in zip(sections, name_at, strict=True):
            link = index[s.link] if isinstance(s.link, str) else s.link
            info = index[s.info] if isinstance(s.info, str) else s.info
            row = (name, s.type, s.flags, s.address, s.offset, s.size, link, info, s.align, s.entry_size)
            out += struct.pack("<10I" if self.bits == 32 else "<IIQQQQIIQQ", *row)
        base = self.page_offset
        if base is None:
            base = 0xC0000000 if self.bits == 32 else 0xFFFFFFFF80000000
        for i, s in enumerate(loads):
            flags = 4 | (2 if s.flags & 1 else 0) | (1 if s.flags & 4 else 0)
            physical = s.physical
            if physical is None:
                physical = s.address - base if s.address >= base else s.address
            place = (s.offset, s.address, physical, 0 if s.type == _TYPE["nobits"] else s.size, s.size)
            header = (1, *place, flags, 1) if self.bits == 32 else (1, flags, *place, 1)
            at = header_size + i * segment_size
            struct.pack_into("<8I" if self.bits == 32 else "<IIQQQQQQ", out, at, *header)
        machine = self.machine or (3 if self.bits == 32 else 62)
        ident = b"\x7fELF" + bytes([self.bits // 32, 1, 1]) + bytes(9)
        phoff = header_size if loads else 0
        out[:header_size] = ident + struct.pack(
            "<HHIIIIIHHHHHH" if self.bits == 32 else "<HHIQQQIHHHHHH",
            _KIND[self.kind], machine, 1, self.entry, phoff, table, 0, header_size,
            segment_size if loads else 0, len(loads), section_size, len(sections), len(sections) - 1,
        )  # fmt: skip
        return bytes(out)

    def _add_symbols(self, sections: list[_Section], index: dict[str, int]) -> None:
        symbols = [_Symbol("", 0, 0, 0, 0, 0)]
        targets = {name for rows in self._relocations.values() for _, _, name, _ in rows}
        named = {s.name for s in self._symbols}
        for missing in sorted(targets - named):
            if missing not in index:
                raise ValueError(f"a relocation against {missing!r}, which is neither symbol nor section")
            symbols.append(_Symbol(missing, 0, missing, 0, _SYMBOL_TYPE["section"], 0))
        symbols += sorted(self._symbols, key=lambda s: s.bind != 0)
        number = {s.name: i for i, s in reversed(list(enumerate(symbols)))}
        strings = bytearray(b"\0")
        table = bytearray()
        for s in symbols:
            name_at = 0
            if s.name and s.type != _SYMBOL_TYPE["section"]:
                name_at = len(strings)
                strings += s.name.encode() + b"\0"
            where = index[s.section] if isinstance(s.section, str) else s.section
            info = s.bind << 4 | s.type
            table += (
                struct.pack("<IIIBBH", name_at, s.value, s.size, info, 0, where)
                if self.bits == 32
                else struct.pack("<IBBHQQ", name_at, info, 0, where, s.value, s.size)
            )
        for name, rows in self._relocations.items():
            blob = b""
            target = sections[index[name]]
            for offset, kind, symbol, addend in rows:
                if self.bits == 32:
                    blob += struct.pack("<II", offset, number[symbol] << 8 | kind)
                    if addend:
                        data = bytearray(target.data)
                        struct.pack_into("<i", data, offset, addend)
                        target.data = bytes(data)
                else:
                    blob += struct.pack("<QQq", offset, number[symbol] << 32 | kind, addend)
            prefix, kind, size = (".rel", _TYPE["rel"], 8) if self.bits == 32 else (".rela", _TYPE["rela"], 24)
            added = _Section(prefix + name, blob, 0, 0, kind, len(blob), 4, ".symtab", name, size)
            index[added.name] = len(sections)
            sections.append(added)
        first_global = next((i for i, s in enumerate(symbols) if i and s.bind), len(symbols))
        size = 16 if self.bits == 32 else 24
        index[".symtab"] = len(sections)
        sections.append(
            _Section(".symtab", bytes(table), 0, 0, _TYPE["symtab"], len(table), 4, ".strtab", first_global, size)
        )
        index[".strtab"] = len(sections)
        sections.append(_Section(".strtab", bytes(strings), 0, 0, _TYPE["strtab"], len(strings), 1))


def _copy(section: _Section) -> _Section:
    return replace(section)
