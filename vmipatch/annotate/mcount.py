"""``__mcount_loc``: the call that every traceable function begins with (2.6.27 on)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import repeat

from vmipatch import facts
from vmipatch.annotate.hidden import CodeBytes, Found, Valid, find
from vmipatch.annotate.site import Mcount, Places, Site, TableInfo, many
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
    tables: list[TableInfo] = []
    sites: list[Site] = []
    code = CodeBytes(image)
    for found in _tables(image, code):
        tables.append(_info(found))
        sites += _sites(image, code, found)
    return tables, sites, []


def _sites(image: Image, code: CodeBytes, found: Found) -> list[Site]:
    table, size, mask = found.table, found.layout.size, (1 << image.bits) - 1
    numbers, named = _named(found)
    bodies = code.read_all(named, LENGTH)
    there = [row for row in zip(numbers, named, bodies, strict=True) if row[2]]
    targets = [
        address + LENGTH + int.from_bytes(body[1:], "little", signed=True) & mask if body[0] == _CALL else 0
        for _, address, body in there
    ]
    details = {target: Mcount(target) for target in set(targets)}
    addresses = [address for _, address, _ in there]
    return many(
        FAMILY, addresses, repeat(LENGTH), repeat("fentry"), code.sections(addresses), table.name,
        [table.address + number * size for number, _, _ in there], [details[target] for target in targets],
    )  # fmt: skip


def bulk(image: Image) -> list[Places] | None:
    """The same in bulk; None where an entry names no code."""
    code = CodeBytes(image)
    places = []
    for found in _tables(image, code):
        numbers, addresses = _named(found)
        if not code.all_begin(addresses, None, LENGTH):
            return None
        places.append(Places(_info(found), LENGTH, addresses, partial(_numbered, _maker(image, code, found), numbers)))
    return places


def _named(found: Found) -> tuple[Sequence[int], list[int]]:
    """The number of each entry and the virtual address that it names, but for entries that were emptied."""
    words = memoryview(_whole(found))
    addresses = (words.cast("I") if found.layout.size == 4 else words.cast("Q")).tolist()
    if all(addresses):
        return range(len(addresses)), addresses
    numbers = [number for number, address in enumerate(addresses) if address]
    return numbers, [addresses[number] for number in numbers]


def _numbered(make: Callable[[int, int], Site], numbers: Sequence[int], index: int, address: int) -> Site:
    return make(numbers[index], address)


def _maker(image: Image, code: CodeBytes, found: Found) -> Callable[[int, int], Site]:
    """What makes a site of an entry's number and the address that it names."""
    table, size, mask = found.table, found.layout.size, (1 << image.bits) - 1
    details: dict[int, Mcount] = {}

    def make(number: int, address: int) -> Site:
        body = code.read(address, LENGTH)
        target = 0
        if body[0] == _CALL:
            target = (address + LENGTH + int.from_bytes(body[1:], "little", signed=True)) & mask
        detail = details.setdefault(target, Mcount(target))
        entry = table.address + number * size
        return Site(FAMILY, address, LENGTH, "fentry", code.section(address), table.name, entry, detail)

    return make


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

    def ahead(layout: Layout, _: int, data: bytes, at: int) -> int:
        count, room = 0, len(text) - LENGTH
        # A view: nothing is copied where this is asked of every entry.
        rest = memoryview(data)[at : len(data) - (len(data) - at) % layout.size]
        for (address,) in layout.form.iter_unpack(rest):
            place = address - start
            if not (0 <= place < room and text[place] == _CALL):
                break
            if address + LENGTH + signed(text, place + 1)[0] != main:
                break
            count += 1
        return count

    return find(image, FAMILY, validator, ahead)


def _info(found: Found) -> TableInfo:
    table = found.table
    count = len(table.data) // found.layout.size
    return TableInfo(FAMILY, table.name, table.address, len(table.data), found.layout.name, count, found=found.found)


def _whole(found: Found) -> bytes:
    data = found.table.data
    return data[: len(data) - len(data) % found.layout.size]
