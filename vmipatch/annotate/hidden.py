"""Tables that the linker has merged into another section: found by what their entries say.

A kernel without data symbols does not tell where its mcount table, its jump
table or its static-call sites begin.  Their entries do: each names code whose
bytes are what the family says.  Samples are taken all over the sections that can
hold the table; where several entries in a row make sense, the run is followed
to both ends.  Imports image, facts and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vmipatch import facts
from vmipatch.annotate.tables import Layout, Reason, Table, find_tables, load_format
from vmipatch.image import Image, Section
from vmipatch.image.model import SHF_ALLOC, SHT_PROGBITS

IN_A_ROW = 6
"""Entries that must make sense one after the other before a run is followed."""

STEP = 64
"""Entries between two samples: a table of twice as many cannot be missed."""

OUTSIDE = Reason("entry-outside-image", "names no code of the image")

Valid = Callable[[int, bytes, int], bool]
"""Whether the entry at a virtual address makes sense, given a section's bytes and the entry's offset in them."""


Ahead = Callable[[Layout, int, bytes, int], int]
"""How many entries from one at a virtual address on, at an offset in a section's bytes, make sense, or fewer."""


class Found(NamedTuple):
    """A table, its layout, and how it was found (empty: by a section or symbols of its own)."""

    table: Table
    layout: Layout
    found: str


class CodeBytes:
    """The image's instructions by virtual address, fast: executable sections, the largest first."""

    def __init__(self, image: Image) -> None:
        placed = sorted(image.code_sections, key=lambda s: -s.size)
        ranges = [(s.address, s.end, s.offset, s.name) for s in placed]
        if not image.sections:
            ranges = [(s.address, s.address + s.file_size, s.offset, "") for s in image.segments]
        self.ranges = ranges
        odd = [s for s in image.sections if s.may_hold_code and not s.exec and s.file_size]
        self._readable = [*ranges, *((s.address, s.end, s.offset, s.name) for s in odd)]
        # Most of what is asked while a table is searched lies nowhere near.
        self.low = min((r[0] for r in self._readable), default=0)
        self.high = max((r[1] for r in self._readable), default=0)
        self._data = image.data
        self._image = image if image.container == "module" else None
        # The largest, which holds nearly all that is asked for; none of it where each read needs the image.
        self._start, self._end, self._move = 0, 0, 0
        if ranges and self._image is None:
            start, end, offset, _ = ranges[0]
            self._start, self._end, self._move = start, end, offset - start

    def offset(self, address: int, length: int) -> int:
        """The offset in the image's data of ``length`` instruction bytes at an address, or -1."""
        if self.low <= address < self.high:
            for start, end, offset, _ in self._readable:
                if start <= address and address + length <= end:
                    return address - start + offset
        return -1

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes of instructions at a virtual address; empty where the image has none there."""
        if self._start <= address <= self._end - length and length > 0:
            at = address + self._move
            return self._data[at : at + length]
        at = self.offset(address, length)
        if at < 0:
            return b""
        if self._image is not None:
            return self._image.read(address, length)
        return self._data[at : at + length]

    def read_first(self, address: int, lengths: Sequence[int]) -> bytes:
        """As many bytes as the first of ``lengths`` that the image has there; empty where it has none of them."""
        return next((body for length in lengths if (body := self.read(address, length))), b"")

    def read_all(self, addresses: Iterable[int], *lengths: int) -> list[bytes]:
        """What :meth:`read_first` gives, for many addresses: nearly all lie in the largest section."""
        data, start, last = self._data, self._start, self._end - lengths[0]
        move, behind = self._move, self._move + lengths[0]
        return [data[a + move : a + behind] if start <= a <= last else self.read_first(a, lengths) for a in addresses]

    def all_begin(self, addresses: Iterable[int], leads: bytes | None, length: int) -> bool:
        """Whether ``length`` bytes at each address are instructions, the first of them one of ``leads`` (None: any)."""
        rest = list(addresses)
        if leads is not None and self._image is not None:
            return all((body := self.read(address, length)) and body[0] in leads for address in rest)
        for start, end, offset, _ in self.ranges:
            own = [address for address in rest if start <= address <= end - length]
            if leads is not None and own:
                data = self._data[offset : offset + end - start]
                if bytes([data[address - start] for address in own]).translate(None, leads):
                    return False
            if len(own) == len(rest):
                return True
            rest = [address for address in rest if not start <= address <= end - length]
        return not rest

    def section(self, address: int) -> str:
        """The name of the executable section that an address is in."""
        return next((name for start, end, _, name in self._readable if start <= address < end), "")

    def sections(self, addresses: Iterable[int]) -> list[str]:
        """What :meth:`section` gives, for many addresses."""
        if not self.ranges:
            return ["" for _ in addresses]
        start, end, _, name = self.ranges[0]
        return [name if start <= a < end else self.section(a) for a in addresses]


def find(image: Image, family: str, validator: Callable[[Layout], Valid], ahead: Ahead | None = None) -> list[Found]:
    """The family's tables: by section, by symbols in an image without sections, else by content.

    ``ahead`` counts entries faster than ``validator`` does one by one; where it stops, that is asked again.
    """
    form = load_format(family)
    layouts = [x for x in form.layouts if x.bits in (0, image.bits)]
    known = find_tables(image, form)
    result = []
    for table in known:
        best = max(layouts, key=lambda layout: _share(table, layout, validator(layout)), default=None)
        if best is not None:
            result.append(Found(table, best, ""))
    if known or image.container == "module":
        return result
    spec = facts.load("tables", family)
    names = spec.get("hidden", ())
    places = [s for name in names if (s := image.section(name)) is not None]
    if image.reconstructed:
        # What the linker put where is not known either.
        places = [s for s in image.sections if unknown(s)]
    longest: Found | None = None
    for section in places:
        if not section.file_size:
            continue
        # A made-up section begins where the last one ended, aligned or not.
        skip = -section.address % (image.bits // 8) if image.reconstructed else 0
        data = bytes(image.data[section.offset + skip : section.offset + section.file_size])
        for layout in layouts:
            run = search(
                section.address + skip,
                data,
                layout,
                spec.get("align", image.bits // 8),
                validator(layout),
                ahead=ahead,
            )
            if run is None:
                continue
            start, count = run
            at = start - section.address - skip
            table = Table(section.name, start, data[at : at + count * layout.size])
            found = Found(table, layout, f"by content: {count} entries in a row, {spec['evidence']}")
            if not image.reconstructed:
                return [found]
            if longest is None or len(table.data) > len(longest.table.data):
                longest = found
    if longest is None:
        return []
    # The next family that is looked for shall not take these entries for its own.
    name = form.sections[0]
    image.add_section(Section(name, longest.table.address, 0, len(longest.table.data), SHF_ALLOC, SHT_PROGBITS))
    return [longest._replace(table=Table(name, longest.table.address, longest.table.data))]


def unknown(section: Section) -> bool:
    """Of an image without section headers: whether nobody knows what a made-up section holds."""
    return bool(section.file_size) and (section.is_data or section.name.startswith(".rodata"))


def _share(table: Table, layout: Layout, valid: Valid) -> float:
    count = len(table.data) // layout.size
    if not count or len(table.data) % layout.size:
        return 0.0
    step = max(1, count // 64)
    tried = range(0, count, step)
    return sum(valid(table.address + i * layout.size, table.data, i * layout.size) for i in tried) / len(tried)


def search(
    start: int,
    data: bytes,
    layout: Layout,
    align: int,
    valid: Valid,
    follows: Valid | None = None,
    *,
    step: int = STEP,
    ahead: Ahead | None = None,
) -> tuple[int, int] | None:
    """The longest run of entries: its virtual address and how many they are.

    ``valid`` must hold of several in a row; the run is followed as far as ``follows`` does (the same, if not given).
    """
    size = layout.size
    follows = follows or valid
    best: tuple[int, int] | None = None
    done = 0
    for sample in range(0, len(data) - size * IN_A_ROW, size * step):
        for shift in range(0, size, align):
            at = sample + shift
            # Nearly all fail at once: the first entry alone is asked first.
            if at < done or not valid(start + at, data, at):
                continue
            if not all(valid(start + at + i * size, data, at + i * size) for i in range(1, IN_A_ROW)):
                continue
            first = at
            while first >= size and follows(start + first - size, data, first - size):
                first -= size
            last = at
            while last + size <= len(data) and follows(start + last, data, last):
                last += size
                if ahead is not None:
                    last += size * ahead(layout, start + last, data, last)
            done = last
            count = (last - first) // size
            if best is None or count > best[1]:
                best = start + first, count
            break
    return best
