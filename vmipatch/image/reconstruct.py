"""Sections for an image that has no section headers, from the bounds that its own symbols name.

The rest of the package asks for ``.text`` or ``.altinstructions``; a kernel whose headers were stripped, or that is
bare memory, still has the linker's symbols around most of them (``specs/images/sections.toml``, ``specs/tables``).
What lies between is made into sections named by their place: nobody knows what they hold, so they may hold sites and
are not read as code.  Tables that no symbol bounds are looked for by content (vmipatch.annotate.bycontent), which then
adds them here.  Imports facts and its sisters in ``image/``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from mmap import mmap

from vmipatch import facts
from vmipatch.image.kallsyms import Kallsyms
from vmipatch.image.model import SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS, SHT_PROGBITS, Section, Segment
from vmipatch.image.search import find_all

_START, _STOP = "__start_", "__stop_"
_EXPORTS, _MAX_NAME = ("__ksymtab", "__ksymtab_gpl"), 512
# Of exports that are found by content: the names that they can have, how many there must be, and how many places of a
# name, and of a pointer to it, are looked at.
_NAME = re.compile(rb"(?<!\w)[A-Za-z_]\w{0,511}\0")
_LEAST_EXPORTS, _MAX_PLACES = 8, 32
_MOST_EXPORTS = 1 << 20  # bytes


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


def memory(data: bytes | mmap, segment: Segment, bits: int, symbols: Kallsyms) -> tuple[Section, ...]:
    """Sections of a kernel before 2.6.26 that is bare memory: those of :func:`sections`, kallsyms, and the exports.

    Such a kernel's symbols are those of its code alone, and only its exports name the paravirt objects in its data.
    Its kallsyms are addresses of code one behind the other, as some tables are, and must not be taken for one.
    """
    found = list(sections(data, (segment,), symbols))
    start = segment.address + symbols.extent.start - segment.offset
    found = list(add(found, Section(".kallsyms", start, 0, len(symbols.extent), SHF_ALLOC, SHT_PROGBITS)))
    if not any(s.name in _EXPORTS for s in found):
        for part in _exports_by_content(data, segment, bits // 8):
            found = list(add(found, part))
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


def _exports_by_content(data: bytes | mmap, segment: Segment, long: int) -> Iterator[Section]:
    """All tables of exports, which follow each other, and their names: two longs an entry, the value and the name.

    Begun at the entry of a function that every kernel exports, and followed to both ends
    (include/linux/module.h and include/asm-generic/vmlinux.lds.h of 2.6.21 to 2.6.25).
    """
    start, size = segment.offset, segment.file_size

    def name_at(entry: int) -> int | None:
        """The offset of an entry's name, if the entry can be one."""
        value, name = (int.from_bytes(data[entry + i * long : entry + i * long + long], "little") for i in (0, 1))
        at = name - segment.address
        if not value or not 0 < at < size:
            return None
        return start + at if _NAME.match(data, start + at) else None

    for name in facts.load("images", "sections")["exported"]:
        for string in find_all(data, b"%s\0" % name.encode(), start, start + size, limit=_MAX_PLACES):
            address = segment.address + string - start
            for field in find_all(data, address.to_bytes(long, "little"), start, start + size, limit=_MAX_PLACES):
                first = last = field - long
                if (first - start) % long:
                    continue
                low, high = max(start, field - _MOST_EXPORTS), min(start + size, field + _MOST_EXPORTS)
                while first - 2 * long >= low and name_at(first - 2 * long) is not None:
                    first -= 2 * long
                while last + 2 * long <= high and name_at(last) is not None:
                    last += 2 * long
                places = [at for entry in range(first, last, 2 * long) if (at := name_at(entry)) is not None]
                if len(places) < _LEAST_EXPORTS:
                    continue
                low, high = min(places), max(places)
                high = data.find(b"\0", high) + 1
                move = segment.address - start
                yield Section(_EXPORTS[0], first + move, 0, last - first, SHF_ALLOC, SHT_PROGBITS)
                yield Section("__ksymtab_strings", low + move, 0, high - low, SHF_ALLOC, SHT_PROGBITS)
                return


def _part(name: str, start: int | None, end: int | None, flags: int) -> Iterator[Section]:
    if start is not None and end is not None and start < end:
        yield Section(name, start, 0, end - start, flags, SHT_PROGBITS)
