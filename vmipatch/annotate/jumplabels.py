"""``__jump_table``: branches that static keys decide (2.6.37 on)."""

from __future__ import annotations

from functools import cache

from vmipatch import facts
from vmipatch.annotate.hidden import CodeBytes, Found, Valid, find
from vmipatch.annotate.mcount import nops as five_byte_nops
from vmipatch.annotate.site import JumpLabel, Site, TableInfo
from vmipatch.annotate.tables import FamilyScan, Layout
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "jump_labels"

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
    names: dict[int, str] = {}
    for found in _tables(image, code):
        tables.append(_info(found))
        for entry in found.layout.entries(found.table, image.bits):
            address, target, word = entry.values
            body = code.read(address, 5) or code.read(address, 2)
            length = branch_length(body)
            if not length:
                continue
            key = word & ~FLAGS
            if key not in names:
                names[key] = name_of(image, key)
            where = code.section(address)
            detail = JumpLabel(target, key, bool(word & LIKELY))
            sites.append(Site(FAMILY, address, length, names[key], where, found.table.name, entry.address, detail))
    return tables, sites, []


def count(image: Image) -> FamilyScan:
    """The table alone."""
    return [_info(found) for found in _tables(image, CodeBytes(image))], [], []


def branch_length(body: bytes) -> int:
    """2 or 5 where ``body`` begins with what such a site can hold, else 0."""
    if body[:1] == b"\xe9" or body[:5] in nops():
        return 5
    return 2 if body[:1] == b"\xeb" or body[:2] in nops() else 0


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

    return find(image, FAMILY, validator)


def _info(found: Found) -> TableInfo:
    table = found.table
    count = len(table.data) // found.layout.size
    return TableInfo(FAMILY, table.name, table.address, len(table.data), found.layout.name, count, found=found.found)
