"""Sections for an image that has no section headers, from the bounds that its own symbols name.

The rest of the package asks for ``.text`` or ``.altinstructions``; a kernel whose headers were stripped, or that is
bare memory, still has the linker's symbols around most of them (``specs/images/sections.toml``, ``specs/tables``).
What lies between is made into sections named by their place: nobody knows what they hold, so they may hold sites and
are not read as code.  Tables that no symbol bounds are looked for by content (vmipatch.annotate.bycontent), which then
adds them here.  Imports facts and its sisters in ``image/``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from mmap import mmap

from vmipatch import facts
from vmipatch.image.kallsyms import Kallsyms
from vmipatch.image.model import SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS, SHT_PROGBITS, Section, Segment

_START, _STOP = "__start_", "__stop_"
_EXPORTS, _MAX_NAME = ("__ksymtab", "__ksymtab_gpl"), 512


def sections(data: bytes | mmap, segments: tuple[Segment, ...], symbols: Kallsyms | None) -> tuple[Section, ...]:
    """Sections that cover every byte of the segments, in the order of their addresses; ``index`` counts from 1."""
    found: list[Section] = []
    for segment in segments:
        if segment.file_size:
            # Of 6.1 .exit.text lies in a segment that is not executable, and what is __ro_after_init in one that
            # is not writable: the flags rule nothing out.
            flags = SHF_ALLOC | SHF_EXECINSTR | SHF_WRITE
            name = f".load{len(found)}"
            whole = Section(name, segment.address, segment.offset, segment.file_size, flags, SHT_PROGBITS)
            found.append(replace(whole, is_data=symbols is not None or not segment.exec))
        if segment.memory_size > segment.file_size:
            start, size = segment.address + segment.file_size, segment.memory_size - segment.file_size
            at = segment.offset + segment.file_size
            found.append(Section(".bss", start, at, size, SHF_ALLOC | SHF_WRITE, SHT_NOBITS))
    if symbols is not None:
        # The large first: the smaller ones are cut out of them.
        for part in sorted(_parts(symbols), key=lambda s: -s.size):
            found = list(add(found, part))
        names = _export_names(data, found)
        if names is not None:
            found = list(add(found, names))
    return tuple(replace(s, index=i) for i, s in enumerate(sorted(found, key=lambda s: s.address), 1))


def add(into: Iterable[Section], part: Section) -> Iterator[Section]:
    """The sections with ``part`` cut out of the one that holds it; as they are where none does."""
    for section in into:
        if not (section.address <= part.address and part.end <= section.end and section.file_size):
            yield section
            continue
        at = section.offset + part.address - section.address
        before = part.address - section.address
        if before:
            yield replace(section, size=before)
        yield replace(part, offset=at)
        if part.end < section.end:
            rest = section.name if not before else f"{section.name.split('@')[0]}@{part.end:x}"
            yield replace(section, name=rest, address=part.end, offset=at + part.size, size=section.end - part.end)


def _parts(symbols: Kallsyms) -> Iterator[Section]:
    for row in facts.load("images", "sections")["part"]:
        write = row.get("write", False)
        flags = SHF_ALLOC | (SHF_EXECINSTR if row.get("code") or write else 0) | (SHF_WRITE if write else 0)
        start = next((a for name in row["starts"] if (a := symbols.lookup(name)) is not None), None)
        end = next((a for name in row["ends"] if (a := symbols.lookup(name)) is not None), None)
        if start is not None and not row["ends"]:
            end = next((a for a in symbols.addresses[symbols.floor(start) :] if a > start), None)
        yield from (replace(p, is_data=write) for p in _part(row["name"], start, end, flags))
    patterns = []
    for family in facts.names("tables"):
        spec = facts.load("tables", family)
        patterns += spec["sections"]
        for start, end in spec["symbols"]:
            yield from _part(spec["sections"][0], symbols.lookup(start), symbols.lookup(end), SHF_ALLOC)
    # The linker's own names for a section that is a C identifier: runtime_ptr_NAME and its kin.
    for entry in symbols.entries:
        name = entry[1:].removeprefix(_START)
        if len(name) < len(entry) - 1 and any(fnmatchcase(name, pattern) for pattern in patterns if "*" in pattern):
            yield from _part(name, symbols.lookup(_START + name), symbols.lookup(_STOP + name), SHF_ALLOC)


def _export_names(data: bytes | mmap, found: list[Section]) -> Section | None:
    """The strings that the relative entries of ``__ksymtab*`` name, which no symbol bounds; None without those."""
    for fields in (3, 2):
        places = []
        for table in found:
            if table.name in _EXPORTS and not table.size % (4 * fields):
                blob = data[table.offset : table.offset + table.size]
                own = range(table.address + 4, table.end, 4 * fields)
                places += [at + row[1] for at, row in zip(own, struct.iter_unpack(f"<{fields}i", blob), strict=True)]
        if not places:
            continue
        low, high = min(places), max(places)
        holder = next((s for s in found if s.file_size and s.address <= low and high < s.end), None)
        if holder is None:
            continue
        last = holder.offset + high - holder.address
        stop = data.find(b"\0", last, last + _MAX_NAME)
        if stop > last:
            return Section("__ksymtab_strings", low, 0, high + stop + 1 - last - low, SHF_ALLOC, SHT_PROGBITS)
    return None


def _part(name: str, start: int | None, end: int | None, flags: int) -> Iterator[Section]:
    if start is not None and end is not None and start < end:
        yield Section(name, start, 0, end - start, flags, SHT_PROGBITS)
