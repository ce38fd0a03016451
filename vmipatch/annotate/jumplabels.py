"""``__jump_table``: branches that static keys decide (2.6.37 on)."""

from __future__ import annotations

import struct
from functools import cache

from vmipatch import facts
from vmipatch.annotate.hidden import CodeBytes, Found, Valid, find
from vmipatch.annotate.mcount import nops as five_byte_nops
from vmipatch.annotate.site import JumpLabel, Site, TableInfo, many
from vmipatch.annotate.tables import FamilyScan, Layout
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "jump_labels"

LONGEST = 5
FLAGS = 3
LIKELY = 1


@cache
def nops() -> frozenset[bytes]:
    """Every nop of two or five bytes that stands for a branch not taken."""
    two = {
        bytes.fromhex(rows["sequences"][1]) for rows in facts.load("isa", "nops").values() if len(rows["sequences"]) > 1
    }
    return five_byte_nops() | two


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every branch; ``op`` is the key's name, or its address where no symbol tells."""
    sites: list[Site] = []
    tables: list[TableInfo] = []
    code = CodeBytes(image)
    names = _Names(image)
    for found in _tables(image, code):
        tables.append(_info(found))
        rows = [(entry.address, *entry.values) for entry in found.layout.entries(found.table, image.bits)]
        bodies = code.read_all([row[1] for row in rows], 5, 2)
        there = [(row, n) for row, body in zip(rows, bodies, strict=True) if (n := branch_length(body))]
        addresses = [row[1] for row, _ in there]
        sites += many(
            FAMILY, addresses, [length for _, length in there], [names[row[3] & ~FLAGS] for row, _ in there],
            code.sections(addresses), found.table.name, [row[0] for row, _ in there],
            [JumpLabel(target, word & ~FLAGS, bool(word & LIKELY)) for (_, _, target, word), _ in there],
        )  # fmt: skip
    return tables, sites, []


class _Names(dict[int, str]):
    """What :func:`name_of` says, of each key once."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self._image = image

    def __missing__(self, key: int) -> str:
        name = self[key] = name_of(self._image, key)
        return name


def count(image: Image) -> FamilyScan:
    """The table alone."""
    return [_info(found) for found in _tables(image, CodeBytes(image))], [], []


def branch_length(body: bytes) -> int:
    """2 or 5 where ``body`` begins with what such a site can hold, else 0."""
    lead = body[:1]
    if lead == b"\xe9":
        return 5
    if lead == b"\xeb":
        return 2
    known = _lengths()
    return known.get(body[:5], 0) or known.get(body[:2], 0)


@cache
def _lengths() -> dict[bytes, int]:
    """The length of each nop."""
    return {nop: len(nop) for nop in nops()}


def name_of(image: Image, address: int) -> str:
    """A data symbol that begins at an address, or the address itself."""
    named = image.symbols.at(address)
    return named[0] if named is not None and named[1] == 0 else f"{address:#x}"


def _tables(image: Image, code: CodeBytes) -> list[Found]:
    bits = image.bits
    mask = (1 << bits) - 1
    data_ranges = [(s.address, s.end) for s in image.sections if s.alloc and s.write]
    module = image.container == "module"

    def validator(layout: Layout) -> Valid:
        unpack, relative = layout.form.unpack_from, bool(layout.relative)
        places = dict(layout.relative)
        target_at, key_at = places.get(1, 0), places.get(2, 0)
        low, high = code.low, code.high

        def valid(start: int, data: bytes, at: int) -> bool:
            address, target, key = unpack(data, at)
            if relative:
                address = (address + start) & mask
            if not low <= address < high:
                return False
            if relative:
                target, key = (target + start + target_at) & mask, (key + start + key_at) & mask
            body = code.read(address, 5) or code.read(address, 2)
            length = branch_length(body)
            if not length or code.offset(target, 1) < 0:
                return False
            if body[0] in (0xE9, 0xEB) and branch.target_of(body, address, bits) != target:
                return False
            return module or any(low <= key < high for low, high in data_ranges)

        return valid

    low, high = code.ranges[0][:2] if code.ranges else (0, 0)
    text = code.read(low, high - low)
    signed = struct.Struct("<i").unpack_from

    def ahead(layout: Layout, place: int, data: bytes, at: int) -> int:
        """Entries of the largest section of code: nearly all are."""
        count, room, size = 0, len(text) - LONGEST, layout.size
        first_key = last_key = 0
        places = dict(layout.relative)
        target_at, key_at = places.get(1, 0), places.get(2, 0)
        if not places or mask >> 32 == 0:
            return 0
        rest = memoryview(data)[at : len(data) - (len(data) - at) % size]
        for first, second, third in layout.form.iter_unpack(rest):
            target = second + place + target_at
            where = first + place - low
            if not (0 <= where < room and low <= target < high):
                break
            key = third + place + key_at
            if not first_key <= key < last_key:
                first_key, last_key = next((one for one in data_ranges if one[0] <= key < one[1]), (0, 0))
                if not last_key:
                    break
            lead = text[where]
            if lead == branch.JMP:
                goes = where + low + LONGEST + signed(text, where + 1)[0]
            elif lead == branch.JMP_SHORT:
                goes = where + low + 2 + (text[where + 1] ^ 0x80) - 0x80
            else:
                goes = target if branch_length(text[where : where + LONGEST]) else -1
            if goes != target:
                break
            place += size
            count += 1
        return count

    return find(image, FAMILY, validator, None if module else ahead)


def _info(found: Found) -> TableInfo:
    table = found.table
    count = len(table.data) // found.layout.size
    return TableInfo(FAMILY, table.name, table.address, len(table.data), found.layout.name, count, found=found.found)
