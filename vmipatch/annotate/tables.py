"""Annotation tables: finding them in an image, and deciding their layout by the evidence in the bytes.

Layouts are data (``specs/tables/``).  A candidate is right when every entry
makes sense to its family: the caller's ``check`` says of one entry why it does
not, or None.  Imports image, facts and errors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from vmipatch import facts
from vmipatch.annotate.site import Finding, Site, TableInfo
from vmipatch.errors import AddressError, UsageError
from vmipatch.image import Image

SAMPLE = 64
"""How many entries of each candidate are looked at before one is read whole."""

MOST_FINDINGS = 50
"""Bad entries that are named one by one; the rest are counted."""


class Entry(NamedTuple):
    """One raw entry: its virtual address, its number, and its fields in the order of :attr:`Layout.fields`."""

    address: int
    number: int
    values: tuple[int, ...]


class Reason(NamedTuple):
    """Why an entry makes no sense: a stable identifier and a message."""

    id: str
    message: str


Check = Callable[["Layout", tuple[int, ...]], Reason | None]


@dataclass(frozen=True)
class Layout:
    """How the entries of a table lie in memory; ``tail`` bytes may be missing from the last one."""

    name: str
    bits: int
    form: struct.Struct
    fields: tuple[str, ...]
    relative: tuple[tuple[int, int], ...]
    tail: int

    @property
    def size(self) -> int:
        """The size of one entry in bytes."""
        return self.form.size

    def fits(self, size: int, bits: int) -> bool:
        """Whether a table of ``size`` bytes in a kernel of ``bits`` bits can have this layout."""
        missing = -size % self.size
        return self.bits in (0, bits) and (missing == 0 or missing <= self.tail)

    def entries(self, table: Table, bits: int, step: int = 1) -> Iterator[Entry]:
        """Every ``step``-th entry, relative fields resolved to virtual addresses."""
        data = table.data + b"\0" * (-len(table.data) % self.size)
        wrap = (1 << bits) - 1
        size = self.size
        if step == 1:
            relative = [(position, offset + table.address) for position, offset in self.relative]
            address = table.address
            for index, values in enumerate(self.form.iter_unpack(data)):
                if relative:
                    fields = list(values)
                    for position, offset in relative:
                        if fields[position]:
                            fields[position] = fields[position] + offset & wrap
                    relative = [(position, offset + size) for position, offset in relative]
                    values = tuple(fields)
                yield Entry(address, index, values)
                address += size
            return
        for index in range(0, len(data) // size, step):
            at = index * size
            fields = list(self.form.unpack_from(data, at))
            address = table.address + at
            for position, offset in self.relative:
                if fields[position]:
                    fields[position] = (fields[position] + address + offset) & wrap
            yield Entry(address, index, tuple(fields))


@dataclass(frozen=True)
class Table:
    """The bytes of one table; ``name`` is its section, or its start symbol in an image without sections."""

    name: str
    address: int
    data: bytes


@dataclass(frozen=True)
class Format:
    """All that ``specs/tables/`` knows of one family."""

    sections: tuple[str, ...]
    symbols: tuple[tuple[str, str], ...]
    layouts: tuple[Layout, ...]

    def layout(self, name: str) -> Layout:
        """A layout by name; :class:`UsageError` with the names there are."""
        for layout in self.layouts:
            if layout.name == name:
                return layout
        raise UsageError(f"no layout named {name!r}; there are: {', '.join(x.name for x in self.layouts)}")


@cache
def load_format(family: str) -> Format:
    """The layouts of a family, from ``specs/tables/<family>.toml``."""
    spec = facts.load("tables", family)
    layouts = []
    for row in spec["layout"]:
        fields = tuple(row["fields"])
        codes = row["format"].replace("x", "")
        offsets, position = [], 0
        for code in codes:
            offsets.append(position)
            position += struct.calcsize("<" + code)
        relative = tuple((fields.index(f), offsets[fields.index(f)]) for f in row.get("relative", ()))
        form = struct.Struct("<" + row["format"])
        layouts.append(Layout(row["name"], row["bits"], form, fields, relative, row.get("tail", 0)))
    pairs = tuple((start, end) for start, end in spec["symbols"])
    return Format(tuple(spec["sections"]), pairs, tuple(layouts))


def find_tables(image: Image, form: Format) -> list[Table]:
    """The family's tables: by section name, or in an image without sections by the symbols around them."""
    found = []
    for section in image.sections:
        if section.file_size and any(fnmatchcase(section.name, pattern) for pattern in form.sections):
            data = bytes(image.data[section.offset : section.offset + section.size])
            if image.container == "module":
                data = image.read(section.address, section.size)
            found.append(Table(section.name, section.address, data))
    if found or image.sections:
        return found
    for start, end in form.symbols:
        first, last = image.symbols.lookup(start), image.symbols.lookup(end)
        if first is not None and last is not None and last > first:
            found.append(Table(start, first, image.read(first, last - first)))
            break
    return found


def choose(
    table: Table, form: Format, bits: int, check: Check, override: str | None
) -> tuple[Layout | None, Reason, int]:
    """The layout under which most entries make sense.

    Returns the layout (None when under the best one fewer than half do), and
    for that case why, and at which virtual address.
    """
    if override is not None:
        layout = form.layout(override)
        if not layout.fits(len(table.data), bits):
            reason = f"{len(table.data)} bytes are no whole number of {layout.size}-byte entries"
            return None, Reason("table-size", reason), table.address
        return layout, Reason("", ""), table.address
    candidates = [x for x in form.layouts if x.fits(len(table.data), bits)]
    if not candidates:
        sizes = sorted({x.size for x in form.layouts if x.bits in (0, bits)})
        reason = f"{len(table.data)} bytes are no whole number of entries of {sizes} bytes"
        return None, Reason("table-size", reason), table.address
    best: tuple[float, Layout, Reason, int] | None = None
    for layout in candidates:
        count = -(-len(table.data) // layout.size)
        bad, seen = 0, 0
        first, where = Reason("", ""), table.address
        for entry in layout.entries(table, bits, max(1, count // SAMPLE)):
            seen += 1
            reason_of = check(layout, entry.values)
            if reason_of is not None:
                bad += 1
                if not first.id:
                    first, where = reason_of, entry.address
        share = bad / seen if seen else 0.0
        if best is None or share < best[0]:
            best = (share, layout, first, where)
        if bad == 0:
            break
    assert best is not None
    share, layout, first, where = best
    if share > 0.5:
        tried = ", ".join(x.name for x in candidates)
        message = f"fits no layout ({tried}); as {layout.name}, the entry here fails: {first.message}"
        return None, Reason("table-layout", message), where
    return layout, Reason("", ""), table.address


Make = Callable[[Table, Layout, Entry], Site | None]
Sealed = Callable[[Layout, Sequence[Entry]], bool]
FamilyScan = tuple[list[TableInfo], list[Site], list[Finding]]


def scan_family(
    image: Image,
    family: str,
    check: Check,
    make: Make,
    override: str | None,
    sealed: Sealed | None = None,
    strict: Check | None = None,
) -> FamilyScan:
    """All of a family's tables: a site for each entry that makes sense, a finding for each that does not.

    By ``strict`` a table is looked for in an image that has no section headers (vmipatch.annotate.bycontent).

    ``make`` may answer None for an entry that is padding; ``sealed`` says whether
    entries that make no sense were emptied by a patch that sealed the image.
    """
    if strict is not None:
        from vmipatch.annotate import bycontent  # which stands on this module

        bycontent.locate(image, family, check, strict)
    form = load_format(family)
    safe = guarded(check)
    tables: list[TableInfo] = []
    sites: list[Site] = []
    findings: list[Finding] = []
    for table in find_tables(image, form):
        layout, why, where = choose(table, form, image.bits, safe, override)
        if layout is None:
            emptied = _sealed_layout(table, form, image.bits, sealed)
            if emptied is None:
                findings.append(Finding(why.id, "error", why.message, table.name, where))
            tables.append(_info(family, table, emptied, sealed=emptied is not None))
            continue
        bad = padding = 0
        for entry in layout.entries(table, image.bits):
            reason = safe(layout, entry.values)
            if reason is None:
                site = make(table, layout, entry)
                if site is not None:
                    sites.append(site)
                else:
                    padding += 1
                continue
            bad += 1
            if bad <= MOST_FINDINGS:
                message = f"entry {entry.number}: {reason.message}"
                findings.append(Finding(reason.id, "error", message, table.name, entry.address))
        if bad > MOST_FINDINGS:
            message = f"{bad - MOST_FINDINGS} more entries make no sense"
            findings.append(Finding("table-entries", "error", message, table.name, table.address))
        info = _info(family, table, layout)
        tables.append(replace(info, count=info.count - padding, padding=padding))
    return tables, sites, findings


def _info(family: str, table: Table, layout: Layout | None, *, sealed: bool = False) -> TableInfo:
    count = -(-len(table.data) // layout.size) if layout else 0
    name = layout.name if layout else None
    return TableInfo(family, table.name, table.address, len(table.data), name, count, sealed)


def _sealed_layout(table: Table, form: Format, bits: int, sealed: Sealed | None) -> Layout | None:
    if sealed is not None:
        for layout in form.layouts:
            if layout.fits(len(table.data), bits) and sealed(layout, list(layout.entries(table, bits))):
                return layout
    return None


def guarded(check: Check) -> Check:
    """A check for which an address outside the image is a reason, not an error."""

    def safe(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        try:
            return check(layout, values)
        except AddressError as error:
            return Reason("entry-outside-image", error.message)

    return safe


class Code:
    """Fast questions about where an address lies, remembering the last section that answered."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._start = self._end = 0
        self.section = ""

    def executable(self, address: int, length: int) -> Reason | None:
        """Why ``length`` bytes at ``address`` are not instructions of this image, or None if they may be."""
        if self._start <= address and address + length <= self._end:
            return None
        image = self.image
        if not image.sections:
            image.offset_of(address + max(length, 1) - 1)
            image.offset_of(address)
            return None
        section = image.section_at(address)
        if section is None or not section.file_size:
            return Reason("entry-outside-image", f"names {address:#x}, which is outside the image")
        if not section.may_hold_code:
            return Reason("site-not-executable", f"names {address:#x} in {section.name}, which is not executable")
        if address + length > section.end:
            return Reason("entry-outside-image", f"{length} bytes at {address:#x} run past the end of {section.name}")
        self._start, self._end, self.section = section.address, section.end, section.name
        return None
