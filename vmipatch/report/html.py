"""One self-contained HTML page: summary, map of the text, table of places, bytes side by side.

The page fetches nothing and opens from ``file://``.  Its data is one JSON document, deflated, in base64; style and
script are in ``templates/``.  What a page shows is said by :class:`Page`, which report.pages makes.
Imports nothing of the package but its version and report.jsontext.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from vmipatch.report.jsontext import dumps, whole

_EXACT = 1 << 53
"""JavaScript's numbers are exact below this."""


class Kind(NamedTuple):
    """What places are told apart by: a cause, or a rule.

    ``colours`` are CSS colours on light and on dark; a ``loud`` kind wins wherever it shares a cell of the map.
    """

    name: str
    amount: str
    help: str
    colours: tuple[str, str]
    loud: bool = False


class Code(NamedTuple):
    """Some bytes, and the size and text of each of their instructions."""

    data: bytes
    lines: Sequence[tuple[int, str]]


class Row(NamedTuple):
    """One place: ``kind`` is a number of :attr:`Page.kinds`; ``codes`` one a title of :attr:`Page.titles`, or none."""

    address: int | None
    length: int | None
    kind: int
    symbol: str | None
    offset: int
    section: str
    what: str
    note: str
    codes: tuple[Code | None, ...]


class Column(NamedTuple):
    """A column of the table: what it shows (``address``, ``where``, ``kind``, ``what``, ``length``, ``change``)."""

    id: str
    title: str
    width: str
    mono: bool = False


@dataclass
class TextMap:
    """The text: ``ranges`` are offset, length and kind, ``symbols`` offset and name, both ascending."""

    length: int
    ranges: Iterable[tuple[int, int, int]]
    symbols: Iterable[tuple[int, str]]


@dataclass
class Page:
    """All that a page says.

    ``tone`` colours the heading (``good``, ``bad`` or empty); ``lead`` and ``facts`` are text; ``tiles`` are label,
    number, unit and tone; ``plain`` names the bytes of the map that no kind has, and their count; ``base`` is the
    virtual address that the map begins at; ``what_is_note`` where rows say in ``what`` what they are about.
    """

    kicker: str
    heading: str
    tone: str
    lead: str
    tiles: list[tuple[str, str, str, str]]
    bits: int
    base: int
    kinds: list[Kind]
    plain: tuple[str, str]
    map_title: str
    map_about: str
    table_title: str
    table_about: str
    noun: str
    columns: list[Column]
    titles: tuple[str, ...]
    rows: Iterable[Row]
    text: TextMap | None
    facts: list[tuple[str, list[str]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    what_is_note: bool = False


def render(page: Page) -> str:
    """The page as HTML text."""
    from vmipatch import __version__

    light = "".join(f"--k{i}:{kind.colours[0]};" for i, kind in enumerate(page.kinds))
    dark = "".join(f"--k{i}:{kind.colours[1]};" for i, kind in enumerate(page.kinds))
    tiles = "".join(
        f"<div><dt>{_text(label)}</dt><dd{_class(tone)}>{_text(value)}"
        f"{f'<small>{_text(unit)}</small>' if unit else ''}</dd></div>"
        for label, value, unit, tone in page.tiles
    )
    facts = "".join(
        f"<dt>{_text(label)}</dt><dd><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul></dd>"
        for label, lines in page.facts
    )
    warnings = "".join(f"<li>{_text(line)}</li>" for line in page.warnings)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(page.heading)}: {_text(page.kicker)}</title>
<style>
{_template("page.css")}:root{{{light}}}
:root[data-theme="dark"]{{{dark}}}
</style>
</head>
<body>
<header class="top">
<div>
<p class="kicker">{_text(page.kicker)}</p>
<h1{_class(page.tone)}>{_text(page.heading)}</h1>
<p class="lead">{_text(page.lead)}</p>
</div>
<button id="theme" type="button">Dark</button>
</header>
<main>
<dl class="tiles">{tiles}</dl>
<noscript><p class="away">The map and the table need JavaScript.</p></noscript>
<p id="away" class="away" hidden>This browser cannot unpack the page's data; a newer one can.</p>
<section id="mapsection">
<h2>{_text(page.map_title)}</h2>
<p class="about">{_text(page.map_about)}</p>
<ul id="legend" class="legend"></ul>
<div class="map">
<canvas id="canvas" tabindex="0" height="0" aria-label="{_text(page.map_title)}: arrow keys move, Enter opens, \
plus and minus zoom, 0 shows all"></canvas>
<div class="mapbar"><output id="say" aria-live="polite"></output>
<div class="zoom"><button id="in" type="button">Zoom in</button><button id="out" type="button">Zoom out</button>\
<button id="whole" type="button">All</button></div></div>
</div>
</section>
<section id="tablesection" hidden>
<h2>{_text(page.table_title)}</h2>
<p class="about">{_text(page.table_about)}</p>
<div class="tools"><input id="search" type="search" placeholder="Filter ( / )" aria-label="Filter" \
autocomplete="off" spellcheck="false"><span id="found" class="found" aria-live="polite"></span></div>
<div class="split">
<div class="grid">
<div id="heads" class="heads cells" role="row"></div>
<div id="view" class="view" role="grid" tabindex="0" aria-label="{_text(page.table_title)}"><div id="pad" class="pad">\
</div><p id="none" class="none" hidden>Nothing matches.</p></div>
</div>
<div id="place" class="place" hidden>
<h3 id="placename"></h3>
<div id="meta" class="meta"></div>
<p id="note" class="note"></p>
<p id="help" class="help"></p>
<div id="codes" class="codes"></div>
</div>
</div>
</section>
<section>
<h2>How this is known</h2>
<dl class="facts">{facts}</dl>
{f'<ul class="warnings">{warnings}</ul>' if warnings else ""}
</section>
</main>
<footer>vmipatch {_text(__version__)}</footer>
<script id="data" type="application/octet-stream">{_packed(page)}</script>
<script>
{_template("page.js")}</script>
</body>
</html>
"""


@cache
def _template(name: str) -> str:
    return (files("vmipatch.report") / "templates" / name).read_text("utf-8")


def _text(text: str) -> str:
    return escape(whole(text))


def _class(tone: str) -> str:
    return f' class="{tone}"' if tone else ""


def _packed(page: Page) -> str:
    """The page's data; the same page gives the same text."""
    raw = dumps(_Encoder(page).document()).encode("ascii")
    return b64encode(zlib.compress(raw, 6)).decode("ascii")


class _Encoder:
    """The data by columns, every string and every piece of code once: a hundred thousand rows are common."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._strings: dict[str, int] = {"": 0}
        self._codes: dict[tuple[bytes, tuple[tuple[int, str], ...]], int] = {}
        self._listed: list[list[Any]] = []

    def document(self) -> dict[str, Any]:
        page = self._page
        rows = self._rows(page.rows)
        text = page.text
        return {
            "base": f"{page.base:#x}",
            "bits": page.bits,
            "length": text.length if text is not None else 0,
            "ranges": _deltas(text.ranges) if text is not None else [],
            "symbols": self._symbols(text.symbols) if text is not None else [],
            "kinds": [{"name": k.name, "count": k.amount, "help": k.help, "loud": k.loud} for k in page.kinds],
            "plain": {"name": page.plain[0], "count": page.plain[1]},
            "noun": page.noun,
            "columns": [c._asdict() for c in page.columns],
            "titles": page.titles,
            "showWhat": not page.what_is_note,
            "rows": rows,
            "codes": self._listed,
            "strings": list(self._strings),
        }

    def _rows(self, rows: Iterable[Row]) -> dict[str, list[Any]]:
        names = ("at", "length", "kind", "symbol", "offset", "section", "what", "note", "code")
        table: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            table["at"].append(self._place(row.address))
            table["length"].append(row.length)
            table["kind"].append(row.kind)
            table["symbol"].append(self._string(row.symbol or ""))
            table["offset"].append(row.offset if row.offset < _EXACT else 0)
            table["section"].append(self._string(row.section))
            table["what"].append(self._string(row.what))
            table["note"].append(self._string(row.note))
            table["code"] += [self._code(code) for code in row.codes]
        return table

    def _place(self, address: int | None) -> int | str | None:
        if address is None:
            return None
        distance = address - self._page.base
        return distance if abs(distance) < _EXACT else f"{address:#x}"

    def _symbols(self, symbols: Iterable[tuple[int, str]]) -> list[int]:
        flat: list[int] = []
        last = 0
        for offset, name in symbols:
            flat += (offset - last, self._string(name))
            last = offset
        return flat

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _code(self, code: Code | None) -> int:
        if code is None:
            return -1
        key = (code.data, tuple((size, text) for size, text in code.lines))
        known = self._codes.get(key)
        if known is None:
            known = self._codes[key] = len(self._listed)
            flat: list[Any] = [code.data.hex()]
            for size, text in code.lines:
                flat += (size, self._string(text))
            self._listed.append(flat)
        return known


def _deltas(ranges: Iterable[tuple[int, int, int]]) -> list[int]:
    flat: list[int] = []
    last = 0
    for offset, length, kind in ranges:
        flat += (offset - last, length, kind)
        last = offset + length
    return flat
