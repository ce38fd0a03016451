"""``__mcount_loc``: the call that every traceable function begins with (2.6.27 on)."""

from __future__ import annotations

import struct
from functools import cache

from vmipatch import facts
from vmipatch.annotate.hidden import CodeBytes, Found, Valid, find
from vmipatch.annotate.site import Mcount, Site, TableInfo
from vmipatch.annotate.tables import FamilyScan, Layout
from vmipatch.image import Image

FAMILY = "mcount"

LENGTH = 5
_CALL = 0xE8


@cache
def nops() -> frozenset[bytes]:
    """The five-byte nops that a kernel may have put there."""
    return frozenset(bytes.fromhex(code) for code in facts.load("tables", FAMILY)["nops"].values())


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every mcount site; ``op`` is ``fentry``, and the detail's target what the site calls on disk."""
    sites: list[Site] = []
    tables: list[TableInfo] = []
    code = CodeBytes(image)
    for found in _tables(image, code):
        tables.append(_info(found))
        table, size = found.table, found.layout.size
        mask = (1 << image.bits) - 1
        details: dict[int, Mcount] = {}
        for index, (address,) in enumerate(found.layout.form.iter_unpack(_whole(found))):
            body = code.read(address, LENGTH) if address else b""
            if not body:
                continue
            target = 0
            if body[0] == _CALL:
                target = (address + LENGTH + int.from_bytes(body[1:], "little", signed=True)) & mask
            detail = details.setdefault(target, Mcount(target))
            where = code.section(address)
            sites.append(
                Site(FAMILY, address, LENGTH, "fentry", where, table.name, table.address + index * size, detail)
            )
    return tables, sites, []


def count(image: Image) -> FamilyScan:
    """The table alone."""
    return [_info(found) for found in _tables(image, CodeBytes(image))], [], []


def _tables(image: Image, code: CodeBytes) -> list[Found]:
    known = nops()
    mask = (1 << image.bits) - 1
    counts: dict[int, int] = {}
    main, most = -1, 0
    start, end = code.ranges[0][:2] if code.ranges else (0, 0)
    text = code.read(start, end - start)
    signed = struct.Struct("<i").unpack_from

    def validator(layout: Layout) -> Valid:
        word = layout.form.unpack_from

        def valid(_: int, data: bytes, at: int) -> bool:
            nonlocal main, most
            (address,) = word(data, at)
            place = address - start
            if 0 <= place < len(text) - LENGTH and text[place] == _CALL:
                target = address + LENGTH + signed(text, place + 1)[0] & mask
            else:
                body = code.read(address, LENGTH)
                if not body or body[0] != _CALL:
                    return body in known
                target = address + LENGTH + signed(body, 1)[0] & mask
            if target == main:
                most += 1
                return True
            # Any function may be called somewhere: the one that the table is about is called most.
            counts[target] = counts.get(target, 0) + 1
            if counts[target] > most:
                if main >= 0:
                    counts[main] = most
                main, most = target, counts[target]
                return True
            return False

        return valid

    return find(image, FAMILY, validator)


def _info(found: Found) -> TableInfo:
    table = found.table
    count = len(table.data) // found.layout.size
    return TableInfo(FAMILY, table.name, table.address, len(table.data), found.layout.name, count, found=found.found)


def _whole(found: Found) -> bytes:
    data = found.table.data
    return data[: len(data) - len(data) % found.layout.size]
