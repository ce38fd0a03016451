"""Tables of an image without section headers that no symbol bounds: found by entries that make sense.

Each family says of an entry whether it can be one (its ``check``), and where that is not much, a stricter one finds the
run and the other follows it to both ends.  What is found becomes a section of the image under the family's own name,
so that every later reader finds it there.  Imports annotate.hidden, annotate.tables, image and facts.
"""

from __future__ import annotations

import struct
from fnmatch import fnmatchcase
from math import gcd

from vmipatch import facts
from vmipatch.annotate import hidden
from vmipatch.annotate.tables import Check, Layout, Reason, guarded, load_format
from vmipatch.image import Image, Section
from vmipatch.image.model import SHF_ALLOC, SHT_PROGBITS

_STEP = 8
"""Entries between two samples: few, for some tables are short and not every entry satisfies the strict check."""

LEAST = 8
"""Entries that a table found so must have: fewer are too easily met by chance."""

# The linker script begins each table at a multiple of this (arch/x86/kernel/vmlinux.lds.S of 6.1 and 7.3).
_ALIGN = {32: 4, 64: 8}


def locate(image: Image, family: str, check: Check, strict: Check) -> None:
    """Add the family's table to an image whose sections were made up, if it is not there and can be found.

    Several entries in a row must satisfy ``strict``, which is asked of those whose site (the first field) lies in what
    is known to be code; from there on ``check`` says how far the table goes.
    """
    if not image.reconstructed or family in image.searched:
        return
    image.searched.add(family)
    form = load_format(family)
    if any(fnmatchcase(s.name, pattern) for s in image.sections for pattern in form.sections):
        return
    spec = facts.load("tables", family)
    best: tuple[int, int, int] | None = None
    for layout in form.layouts:
        if layout.bits not in (0, image.bits):
            continue
        ascending = layout.name in spec.get("ascending", ())
        unpadded = _validator(layout, image.bits, check, ascending=ascending)
        follows = _padded(layout, unpadded)
        valid = _padded(layout, _validator(layout, image.bits, _in_code(image, strict), ascending=ascending))
        for section in image.sections:
            if not hidden.unknown(section):
                continue
            # A made-up section begins where the last one ended, aligned or not.
            skip = -section.address % _ALIGN[image.bits]
            origin = section.address + skip
            data = bytes(image.data[section.offset + skip : section.offset + section.file_size])
            align = gcd(layout.size, _ALIGN[image.bits])
            run = hidden.search(origin, data, layout, align, valid, follows, step=_STEP)
            if run is None or run[1] < LEAST:
                continue
            start, size = run[0], run[1] * layout.size
            end = start + size - origin
            if layout.tail and end + layout.size <= len(data) and unpadded(start + size, data, end):
                # The last entry lacks its padding: the next section begins there.
                size, end = size + layout.size - layout.tail, end + layout.size - layout.tail
            # The linker fills the last page with zeros.
            fill = -(start + size) % spec.get("fill", 1)
            if fill and end + fill <= len(data) and not any(data[end : end + fill]):
                size += fill
            if best is None or run[1] * layout.size > best[0]:
                best = run[1] * layout.size, start, size
    if best is not None:
        image.add_section(Section(form.sections[0], best[1], 0, best[2], SHF_ALLOC, SHT_PROGBITS))


def _in_code(image: Image, strict: Check) -> Check:
    places = [(s.address, s.end) for s in sorted(image.code_sections, key=lambda s: -s.size)]
    outside = hidden.OUTSIDE

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        if not any(start <= values[0] < end for start, end in places):
            return outside
        return strict(layout, values)

    return check


def _padded(layout: Layout, valid: hidden.Valid) -> hidden.Valid:
    """The same, of entries whose padding is zero: by that they differ from a table of addresses, such as kallsyms'."""
    padding = _padding(layout)
    if not padding:
        return valid

    def padded(start: int, data: bytes, at: int) -> bool:
        return not any(data[at + offset] for offset in padding) and valid(start, data, at)

    return padded


def _padding(layout: Layout) -> tuple[int, ...]:
    """The offsets of the bytes of an entry that belong to no field."""
    offsets: list[int] = []
    at = 0
    for code in layout.form.format.lstrip("<"):
        if code == "x":
            offsets.append(at)
        at += struct.calcsize("<" + code)
    return tuple(offsets)


def _validator(layout: Layout, bits: int, check: Check, *, ascending: bool) -> hidden.Valid:
    form, relative = layout.form, layout.relative
    mask = (1 << bits) - 1
    size = layout.size
    safe = guarded(check)

    def resolved(start: int, data: bytes, at: int) -> tuple[int, ...]:
        values = list(form.unpack_from(data, at))
        for position, offset in relative:
            if values[position]:
                values[position] = (values[position] + start + offset) & mask
        return tuple(values)

    def valid(start: int, data: bytes, at: int) -> bool:
        values = resolved(start, data, at)
        if not values[0] or safe(layout, values) is not None:
            return False
        if ascending and at + 2 * size <= len(data):
            after = resolved(start + size, data, at + size)
            return after[0] >= values[0] or safe(layout, after) is not None
        return True

    return valid
