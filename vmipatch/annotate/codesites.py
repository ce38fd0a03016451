"""Tables of nothing but addresses of instructions: one self-relative word each.

What is shared by returns, retpolines, direct calls and ENDBR instructions.  Their findings are
warnings: no image is patched by these tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from vmipatch import facts
from vmipatch.annotate import alternatives, bycontent
from vmipatch.annotate.hidden import OUTSIDE, CodeBytes
from vmipatch.annotate.site import Detail, Finding, Places, Site, TableInfo, Thunk, many
from vmipatch.annotate.tables import MOST_FINDINGS, FamilyScan, Layout, Reason, Table, find_tables, load_format
from vmipatch.image import Image

SAMPLE = 64
WORD = 4
"""Bytes of an entry."""
LENGTHS = (6, 5, 4)
"""How many bytes are read of a site: of the last in a section fewer."""

Row = tuple[int, str, Detail]
"""Length, op and detail of a site."""

Read = Callable[[bytes, int], Row | None]
"""The site whose first bytes (at most six) and virtual address are given, or None."""

ReadAll = Callable[[Sequence[bytes], Sequence[int]], list[Row | None]]
"""The same for many; of a site without bytes None."""


def bulk(image: Image, family: str, read: Read, wrong: str, leads: bytes, length: int) -> list[Places] | None:
    """Every site of every table, where all begin with one of the bytes ``leads`` and so are ``length`` bytes long.

    None where one does not, or names no code: :func:`scan` says which.
    """
    code = CodeBytes(image)
    tables, _, findings = count(image, family, read, wrong)
    found = []
    for info, table in zip(tables, find_tables(image, load_format(family)), strict=True):
        named = _named(table, image.bits)
        if findings or not code.all_begin(named, leads, length):
            return None

        def make(number: int, address: int, table: Table = table) -> Site:
            site = read(_body(code, address), address)
            assert site is not None
            entry = table.address + 4 * number
            return Site(family, address, site[0], site[1], code.section(address), table.name, entry, site[2])

        found.append(Places(info, length, named, make))
    return found


def scan(
    image: Image,
    family: str,
    read: Read,
    wrong: str,
    read_all: ReadAll | None = None,
    final: re.Pattern[bytes] | None = None,
) -> FamilyScan:
    """A site for every entry that ``read`` understands, a finding for every other; ``wrong`` is its identifier.

    ``read_all`` is the same for many sites at once; ``final`` as in :func:`count`.
    """
    code = CodeBytes(image)
    tables, sites, findings = count(image, family, read, wrong, final)
    if any(f.id == "table-layout" for f in findings):
        return tables, [], findings
    findings = [f for f in findings if f.id == "table-size"]
    bad = 0
    for info, table in zip(tables, find_tables(image, load_format(family)), strict=True):
        if info.sealed:
            continue
        named = _named(table, image.bits)
        entries: Sequence[int] = range(table.address, table.address + WORD * len(named), WORD)
        bodies = code.read_all(named, *LENGTHS)
        if read_all is not None:
            rows = read_all(bodies, named)
        else:
            rows = [read(body, address) if body else None for body, address in zip(bodies, named, strict=True)]
        good = [row for row in rows if row is not None]
        if len(good) < len(rows):
            odd = [place for place in zip(entries, named, bodies, rows, strict=True) if place[3] is None]
            if _alternatives_sealed(image):
                # Where an alternative was put in, the kernel too finds no branch any more.
                odd = [place for place in odd if not place[2]]
            findings += [_wrong(wrong, table, *place[:3]) for place in odd[: max(0, MOST_FINDINGS - bad)]]
            bad += len(odd)
            named, entries = ([x for x, row in zip(column, rows, strict=True) if row] for column in (named, entries))
        lengths, ops, details = zip(*good, strict=True) if good else ((), (), ())
        sites += many(family, named, lengths, ops, code.sections(named), table.name, entries, details)
    if bad > MOST_FINDINGS:
        text = f"{bad - MOST_FINDINGS} more entries make no sense"
        findings.append(Finding("table-entries", "warning", text, tables[0].section, tables[0].address))
    return tables, sites, findings


def _alternatives_sealed(image: Image) -> bool:
    """Whether the file has its alternatives put in, and their table emptied."""
    tables, _, _ = alternatives.scan(image)
    return bool(tables) and all(table.sealed for table in tables)


def count(image: Image, family: str, read: Read, wrong: str, final: re.Pattern[bytes] | None = None) -> FamilyScan:
    """The tables alone, some entries of each looked at.

    Where most sites begin as ``final`` they have been written in the file, and the table is sealed: it names no site.
    """
    form = load_format(family)
    layout = form.layouts[0]
    code = CodeBytes(image)
    if image.reconstructed and layout.relative:
        _locate(image, family, code, read)
    tables, findings = [], list[Finding]()
    for table in find_tables(image, form):
        entries = len(table.data) // layout.size
        tables.append(TableInfo(family, table.name, table.address, len(table.data), layout.name, entries))
        if len(table.data) % layout.size:
            text = f"{len(table.data)} bytes are no whole number of entries of {layout.size} bytes"
            findings.append(Finding("table-size", "warning", text, table.name, table.address))
        sampled = list(addresses(table, image.bits, max(1, entries // SAMPLE)))
        bad = [(e, a) for e, a in sampled if not (body := _body(code, a)) or read(body, a) is None]
        if final is not None and sum(final.match(_body(code, a)) is not None for _, a in bad) * 2 > len(sampled):
            tables[-1] = replace(tables[-1], sealed=True)
            continue
        if len(bad) * 2 > len(sampled):
            text = f"fits no layout ({layout.name}): {_wrong(wrong, table, *bad[0], _body(code, bad[0][1])).message}"
            findings.append(Finding("table-layout", "warning", text, table.name, bad[0][0]))
    return tables, [], findings


def _locate(image: Image, family: str, code: CodeBytes, read: Read) -> None:
    """Look for the table in an image without section headers; of branches, by where they must go."""
    spec = facts.load("tables", family)
    needed = [spec[key] for key in ("target", "reader") if key in spec]
    if any(image.symbols.lookup(name) is None for name in needed):
        return
    target = image.symbols.lookup(spec["target"]) if "target" in spec else None
    wants_register = "array" in spec

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        body = _body(code, values[0])
        return None if body and read(body, values[0]) else OUTSIDE

    def strict(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        body = _body(code, values[0])
        found = read(body, values[0]) if body else None
        if found is None:
            return OUTSIDE
        detail = found[2]
        if isinstance(detail, Thunk):
            if target is not None and detail.target != target:
                return OUTSIDE
            if wants_register and detail.register is None:
                return OUTSIDE
        return None

    # A branch of any kind is no evidence: where a table must be of one kind, it is followed as strictly.
    bycontent.locate(image, family, strict if target is not None or wants_register else check, strict)


def addresses(table: Table, bits: int, step: int = 1) -> list[tuple[int, int]]:
    """Every ``step``-th entry's own virtual address and the one that it names."""
    return list(zip(range(table.address, 1 << bits, WORD * step), _named(table, bits, step), strict=False))


def _named(table: Table, bits: int, step: int = 1) -> list[int]:
    """The virtual address that every ``step``-th entry names."""
    mask = (1 << bits) - 1
    words = memoryview(table.data[: len(table.data) // WORD * WORD]).cast("i")[::step]
    return [at + word & mask for at, word in zip(range(table.address, 1 << bits, WORD * step), words, strict=False)]


def _body(code: CodeBytes, address: int) -> bytes:
    return code.read_first(address, LENGTHS)


def _wrong(id: str, table: Table, entry: int, address: int, body: bytes) -> Finding:
    if not body:
        return Finding(
            "entry-outside-image", "warning", f"names {address:#x}, which is no code of it", table.name, entry
        )
    return Finding(id, "warning", f"names {address:#x}, which holds {body.hex(' ')}", table.name, entry)
