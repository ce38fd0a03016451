"""What the HTML pages of the commands show.  Imports report.html and the rooms whose results it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from vmipatch.annotate import FAMILIES
from vmipatch.explain import Explanation
from vmipatch.explain.listing import listing
from vmipatch.explain.places import UNEXPLAINED, Place, places, ranges
from vmipatch.image import Image
from vmipatch.patch.compare import Row as Compared
from vmipatch.report.html import Code, Column, Kind, Page, Row, TextMap

RED = ("#d3281c", "#ff6a5a")
COLOURS = {
    UNEXPLAINED: RED,
    "wrong": RED,
    **{family.name: family.colour for family in FAMILIES.values()},
    "ftrace": ("#008da0", "#2cc0d4"),
    "kprobe": ("#cf3f95", "#f078bd"),
    "optimised kprobe": ("#a32a74", "#d763a6"),
    "its-thunk": ("#5a6b2f", "#95aa5c"),
}
OTHER = (("#7b5ea7", "#a58bd0"), ("#3d7f78", "#69b0a8"), ("#a8683c", "#d4946a"), ("#5b6f93", "#8fa3c7"))
_HELP = {
    UNEXPLAINED: "Differs from what should stand there, and nothing in the dump accounts for it.",
    **{family.name: family.help for family in FAMILIES.values()},
    "ftrace": "Calls of tracers, proved by ftrace's records.",
    "kprobe": "Breakpoints, proved by the kernel's kprobes.",
    "optimised kprobe": "Jumps to detours, proved by the kernel's kprobes.",
}
WRONG = "wrong"
_DIFF_HELP = {**_HELP, WRONG: "The patched image holds something else than the kernel's own patcher would write."}
MOST_SYMBOLS = 400_000
ADDRESS_WIDTH = {32: "88px", 64: "150px"}


def explain_page(image: Image, memory: str, found: Explanation) -> Page:
    """Of an explanation: every byte by cause, every place that changed."""
    bad = found.unexplained_bytes
    names = sorted(found.by_cause, key=lambda c: -found.by_cause[c])
    kinds = kinds_of(([UNEXPLAINED] if bad else []) + names, {**found.by_cause, UNEXPLAINED: bad}, _HELP)
    number = {kind.name: i for i, kind in enumerate(kinds)}
    changed = places(found)
    facts = [
        ("Image", [image.path, f"SHA-256 {image.sha256()}", image.banner or ""]),
        ("Memory", [memory]),
        ("Text", [f"{found.total:,} bytes at {found.start:#x} as linked" + _moved(found.slide)]),
        ("Evidence", found.evidence),
        *[
            (f"States of {family}", [", ".join(f"{count:,} {state}" for state, count in states.items())])
            for family, states in found.states.items()
        ],
    ]
    if found.proved:
        facts.append(("Switched on", [f"{cause} {count:,}" for cause, count in _tally(found)]))
    return Page(
        kicker="vmipatch explain",
        heading=f"{_bytes(bad)} without a cause" if bad else "Every byte has a cause",
        tone="bad" if bad else "good",
        lead=f"{image.banner or image.path}{_moved(found.slide)}",
        tiles=[
            ("Kernel text", f"{found.total:,}", "bytes", ""),
            ("Pristine", f"{found.pristine:,}", _share(found.pristine, found.total), ""),
            ("Legally rewritten", f"{found.explained:,}", _share(found.explained, found.total), ""),
            ("Unexplained", f"{bad:,}", f"in {_count(found.runs, 'run')}" if bad else "", "bad" if bad else ""),
        ],
        bits=image.bits,
        base=found.start,
        kinds=kinds,
        plain=("pristine", f"{found.pristine:,}"),
        map_title="The kernel's text",
        map_about="Low addresses first. A cell has the colour of the cause that rewrote most of it; unexplained "
        "bytes win everywhere. Click a cell to open the place, a cause to hide it (with Alt, to see it alone).",
        table_title="Places that changed",
        table_about="A place is a patch site, or a run of changed bytes outside all sites.",
        noun="places",
        columns=[
            Column("address", "Address", ADDRESS_WIDTH[image.bits], True),
            Column("where", "Symbol", "minmax(0, 2.2fr)", True),
            Column("kind", "Cause", "minmax(0, 1.1fr)"),
            Column("what", "Operation", "minmax(0, 1.5fr)", True),
            Column("length", "Bytes", "44px"),
            Column("change", "On disk → in memory", "minmax(0, 1.9fr)", True),
        ],
        titles=("On disk", "In memory", "Expected"),
        rows=(_place_row(image, number, place) for place in changed),
        text=TextMap(
            found.total,
            ((r.address - found.start, r.length, number[r.cause]) for r in ranges(found)),
            symbols_of(image, found.start, found.start + found.total),
        ),
        facts=facts,
        warnings=found.warnings,
    )


def diff_page(image: Image, patched: str, rows: Sequence[Compared]) -> Page:
    """Of a comparison of two images: every site that changed, or should have."""
    shown = [row for row in rows if not row.right or row.original != row.patched]
    wrong = sum(1 for row in shown if not row.right)
    counts = Counter(_diff_kind(row) for row in shown)
    kinds = kinds_of(sorted(counts, key=lambda k: (k != WRONG, -counts[k])), dict(counts), _DIFF_HELP)
    number = {kind.name: i for i, kind in enumerate(kinds)}
    text = image.section(".text")
    base, length = (text.address, text.file_size) if text is not None else (0, 0)
    marks = sorted(
        (row.site.address - base, row.site.length, number[_diff_kind(row)])
        for row in shown
        if base <= row.site.address < base + length
    )
    return Page(
        kicker="vmipatch diff",
        heading=f"{_count(wrong, 'site')} not as expected" if wrong else "Every site is as expected",
        tone="bad" if wrong else "good",
        lead=f"{patched} against {image.path}",
        tiles=[
            ("Sites", f"{len(rows):,}", "", ""),
            ("Patched as expected", f"{len(shown) - wrong:,}", "", ""),
            ("As on disk", f"{len(rows) - len(shown):,}", "", ""),
            ("Wrong", f"{wrong:,}", "", "bad" if wrong else ""),
        ],
        bits=image.bits,
        base=base,
        kinds=kinds,
        plain=("as on disk", ""),
        map_title="The kernel's text",
        map_about="Low addresses first; .text only. A cell has the colour of the family with most bytes in it; wrong "
        "sites win everywhere. Click a cell to open the site, a family to hide it (with Alt, to see it alone).",
        table_title="Sites that changed",
        table_about="",
        noun="sites",
        columns=[
            Column("address", "Address", ADDRESS_WIDTH[image.bits], True),
            Column("where", "Symbol", "minmax(0, 2.2fr)", True),
            Column("kind", "Family", "minmax(0, 1.1fr)"),
            Column("what", "Operation", "minmax(0, 1.5fr)", True),
            Column("length", "Bytes", "44px"),
            Column("change", "Original → patched", "minmax(0, 1.9fr)", True),
        ],
        titles=("Original", "Patched", "Expected"),
        rows=(_diff_row(image, number, row) for row in shown),
        text=TextMap(length, marks, symbols_of(image, base, base + length)) if length else None,
        facts=[("Original", [image.path, f"SHA-256 {image.sha256()}", image.banner or ""]), ("Patched", [patched])],
    )


def _diff_kind(row: Compared) -> str:
    return row.site.family if row.right else WRONG


def _diff_row(image: Image, number: dict[str, int], row: Compared) -> Row:
    site = row.site
    symbol, offset = image.symbols.at(site.address) or (None, 0)
    note = row.patch.cause.reason if row.patch is not None else "nothing changes this site"
    codes = codes_of(image, site.address, row.original, row.patched, row.expected)
    kind = number[_diff_kind(row)]
    return Row(site.address, site.length, kind, symbol, offset, site.section, site.op, note, codes)


def kinds_of(names: Iterable[str], counts: dict[str, int], helps: dict[str, str]) -> list[Kind]:
    """Kinds of causes with their colours; what has none of its own gets one in turn."""
    result = []
    spare = 0
    for name in names:
        colours = COLOURS.get(name)
        if colours is None:
            colours = OTHER[spare % len(OTHER)]
            spare += 1
        result.append(Kind(name, f"{counts[name]:,}", helps.get(name, ""), colours, name in (UNEXPLAINED, WRONG)))
    return result


def symbols_of(image: Image, start: int, end: int) -> Iterator[tuple[int, str]]:
    """Offset and name of the symbols of a range, one an address; a damaged table has no end of them."""
    last = None
    for address, _, name in islice((s for s in image.symbols.all() if start <= s[0] < end), MOST_SYMBOLS):
        if address != last:
            yield address - start, name
            last = address


def code_of(image: Image, data: bytes, address: int) -> Code:
    """Bytes at a virtual address with their instructions."""
    return Code(data, listing(image, data, address))


def codes_of(image: Image, address: int, *sides: bytes) -> tuple[Code, ...]:
    """The same place on several sides; what is the same bytes is looked at once."""
    known: dict[bytes, Code] = {}
    for side in sides:
        if side not in known:
            known[side] = code_of(image, side, address)
    return tuple(known[side] for side in sides)


def _place_row(image: Image, number: dict[str, int], place: Place) -> Row:
    symbol, offset = image.symbols.at(place.address) or (None, 0)
    return Row(
        address=place.address,
        length=len(place.original),
        kind=number[place.cause],
        symbol=symbol,
        offset=offset,
        section="",
        what=place.op,
        note=place.note,
        codes=codes_of(image, place.address, place.original, place.found, place.expected),
    )


def _tally(found: Explanation) -> list[tuple[str, int]]:
    return Counter(p.cause for p in found.proved).most_common()


def _bytes(count: int) -> str:
    return _count(count, "byte")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.2f} %" if total else ""


def _moved(slide: int) -> str:
    return f", moved by {slide:#x}" if slide else ""
