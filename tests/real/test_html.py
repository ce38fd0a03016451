"""The HTML pages in a real browser: they open without a complaint, fetch nothing, and do what they offer."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "report"))

from commands import hostile_kernel, running_kernel
from test_sarif import audit_of

from tests.explain import running as made
from vmipatch.explain import Memory, explain
from vmipatch.explain.places import ranges
from vmipatch.image import open_image
from vmipatch.report.auditreports import audit_page
from vmipatch.report.html import Code, Column, Kind, Page, Row, TextMap, render
from vmipatch.report.pages import explain_page

from .browser import Browser

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("explained")
    kernel, dump = running_kernel(folder)
    image = open_image(kernel)
    found = explain(image, Memory(dump, made.PHYSICAL))
    page = folder / "page.html"
    page.write_text(render(explain_page(image, str(dump), found)), "utf-8")
    return page, found


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("audited")
    image, audit = audit_of(hostile_kernel(folder, 64))
    page = folder / "page.html"
    page.write_text(render(audit_page(image, audit)), "utf-8")
    return page, audit


def pixels(png: bytes) -> tuple[int, int, Counter[bytes]]:
    """Width, height and colours of a PNG of 8-bit RGB or RGBA without interlacing (ISO/IEC 15948)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, b""
    width = height = channels = 0
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        if kind == b"IHDR":
            width, height, depth, form, _, _, interlaced = struct.unpack(">IIBBBBB", png[at + 8 : at + 21])
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[form]
        elif kind == b"IDAT":
            body += png[at + 8 : at + 8 + size]
        at += 12 + size
    raw, stride = zlib.decompress(body), width * channels
    before, colours = bytearray(stride), Counter[bytes]()
    for y in range(height):
        line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        method = raw[y * (stride + 1)]
        for x in range(stride if method else 0):
            left = line[x - channels] if x >= channels else 0
            up, corner = before[x], before[x - channels] if x >= channels else 0
            guess = left + up - corner
            near = min((left, up, corner), key=lambda v: abs(guess - v))
            line[x] = line[x] + (0, left, up, (left + up) // 2, near)[method] & 0xFF
        for x in range(0, stride, channels * 7):  # every seventh pixel says enough
            colours[bytes(line[x : x + 3])] += 1
        before = line
    return width, height, colours


def text(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.getElementById({name!r}).textContent"))


def type_in(browser: Browser, words: str) -> None:
    script = f"search.value = {json.dumps(words)}; search.dispatchEvent(new Event('input'))"
    browser.run(f"(async () => {{ {script}; await new Promise((r) => setTimeout(r, 250)); }})()")


def count(browser: Browser) -> int:
    return int(browser.run("document.getElementById('view').getAttribute('aria-rowcount')"))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["explained", "audited"])
def test_it_opens_and_is_not_blank(
    browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, which: str, dark: bool, size: tuple[int, int]
) -> None:
    page, _ = request.getfixturevalue(which)
    browser.complaints.clear()
    browser.fetched.clear()
    browser.look(*size, dark=dark)
    browser.open(page)
    assert browser.complaints == []
    assert [u for u in browser.fetched if u != "about:blank" and not u.startswith("data:")] == [page.as_uri()]
    # Nothing sticks out to the right, and nothing lies over anything else's text.
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    width, height, colours = pixels(browser.screenshot(tmp_path / "shot.png"))
    assert width <= size[0]
    assert height > size[1]
    paper, share = colours.most_common(1)[0]
    assert (sum(paper) < 200) == dark
    assert share < 0.97 * colours.total()
    assert len(colours) > 30


def test_names_are_text(browser: Browser, explained: tuple[Path, Any], audited: tuple[Path, Any]) -> None:
    browser.look(*DESKTOP)
    for page, _ in (explained, audited):
        browser.open(page)
        assert browser.run("document.querySelectorAll('script').length") == 2
        assert browser.run("document.querySelectorAll('main b, main script, main img').length") == 0
    assert "<script>alert(2)</script>" in text(browser, "pad") + text(browser, "note")
    browser.open(explained[0])
    assert "<script>" in text(browser, "pad") or "<script>" in browser.run("document.body.textContent")


def test_the_map_has_a_pixel_for_each_byte(browser: Browser, explained: tuple[Path, Any]) -> None:
    """The made-up kernel is small: each cell is one byte, and its colour that of the byte's cause."""
    page, found = explained
    browser.look(*DESKTOP)
    browser.open(page)
    cells = browser.run(
        """(() => {
          const canvas = document.getElementById('canvas'), d = canvas.dataset, pen = canvas.getContext('2d');
          const style = getComputedStyle(document.documentElement), seen = {};
          const buttons = [...document.querySelectorAll('.legend button[aria-pressed]')];
          const kinds = buttons.map((b) => b.children[1].textContent);
          const rgb = (name) => {
            const v = style.getPropertyValue(name).trim();
            return [1, 3, 5].map((i) => parseInt(v.slice(i, i + 2), 16)).join();
          };
          const names = Object.fromEntries(kinds.map((kind, k) => [rgb('--k' + k), kind]));
          names[rgb('--cell')] = 'plain';
          for (let n = 0; n < d.high - d.low; n++) {
            const x = Math.floor(+d.gutter + (n % d.columns + 0.5) * d.cell);
            const y = Math.floor((Math.floor(n / d.columns) + 0.5) * d.cell);
            const got = [...pen.getImageData(x, y, 1, 1).data].slice(0, 3).join(), name = names[got] ?? got;
            seen[name] = (seen[name] ?? 0) + 1;
          }
          return { per: +d.per, seen };
        })()"""
    )
    assert cells["per"] == 1
    expected: Counter[str] = Counter()
    for r in ranges(found):
        expected[r.cause] += r.length
    expected["plain"] = found.total - expected.total()
    # The ring around the chosen place may lie over its neighbours' edges, never over their middles.
    assert cells["seen"] == dict(expected)


def test_hover_click_and_legend(browser: Browser, explained: tuple[Path, Any]) -> None:
    page, _ = explained
    browser.look(1280, 1600)
    browser.open(page)
    total = count(browser)
    at = made.function(30) - made.TEXT  # an mcount call
    where = browser.run(
        f"""(() => {{ const c = document.getElementById('canvas'), d = c.dataset, b = c.getBoundingClientRect();
        const x = {at} % d.columns, y = Math.floor({at} / d.columns);
        return [b.left + +d.gutter + (x + 0.5) * d.cell, b.top + (y + 0.5) * d.cell]; }})()"""
    )
    browser.click(*where)
    assert "f30" in text(browser, "say")
    assert f"{made.function(30):#x}" in text(browser, "say")
    assert "mcount" in text(browser, "say")
    assert text(browser, "placename") == "f30"
    assert browser.run("location.hash") == f"#{made.function(30):#x}"
    chosen = browser.run("document.querySelector('[aria-selected=true] .c-address').textContent")
    assert chosen == f"{made.function(30):#x}"
    codes = browser.run("[...document.querySelectorAll('#codes td.bytes')].map((t) => t.textContent)")
    assert [c.replace("\u2009", "") for c in codes[1:]] == ["3e8d742600"] * 2
    assert "<_text>" in text(browser, "codes")  # __fentry__ is at the very start
    mcount = "[...document.querySelectorAll('.legend button')].find((b) => b.textContent.startsWith('mcount'))"
    browser.run(f"{mcount}.click()")
    hidden = total - count(browser)
    assert hidden == made.FUNCTIONS - 1  # one of them is unexplained
    assert browser.run(f"{mcount}.getAttribute('aria-pressed')") == "false"
    browser.run(f"{mcount}.click()")
    assert count(browser) == total


def test_the_filter_filters_and_the_heads_sort(browser: Browser, explained: tuple[Path, Any]) -> None:
    page, _ = explained
    browser.look(*DESKTOP)
    browser.open(page)
    total = count(browser)
    type_in(browser, "f17")
    assert 0 < count(browser) < 6
    shown = browser.run("[...document.querySelectorAll('.line .c-where')].map((n) => n.textContent)")
    assert {name.partition("+")[0] for name in shown} == {"f17"}
    type_in(browser, "f17 smp_locks")
    assert count(browser) == 1
    type_in(browser, "zebra")
    assert count(browser) == 0
    assert browser.run("document.getElementById('none').hidden") is False
    type_in(browser, "unexplained")
    assert count(browser) == 3
    type_in(browser, "")
    assert count(browser) == total
    for descending in (False, True):
        browser.run("document.querySelector('[data-id=where] button').click()")
        names = browser.run("[...document.querySelectorAll('.line .c-where')].map((n) => n.textContent)")
        assert names == sorted(names, reverse=descending)
        state = browser.run("document.querySelector('[data-id=where]').getAttribute('aria-sort')")
        assert state == ("descending" if descending else "ascending")


def test_the_keyboard_is_enough(browser: Browser, explained: tuple[Path, Any]) -> None:
    page, _ = explained
    browser.look(*DESKTOP)
    browser.open(page)
    browser.run("document.querySelector('[data-id=address] button').click(); document.getElementById('view').focus()")
    browser.press("End")
    last = text(browser, "placename")
    browser.press("ArrowUp")
    assert text(browser, "placename") != last
    browser.press("ArrowDown")
    assert text(browser, "placename") == last
    inside = browser.run(
        """(() => { const v = document.getElementById('view').getBoundingClientRect(),
        r = document.querySelector('[aria-selected=true]').getBoundingClientRect();
        return r.top >= v.top - 1 && r.bottom <= v.bottom + 1; })()"""
    )
    assert inside
    browser.run("document.getElementById('canvas').focus()")
    browser.press("ArrowRight", 3)
    assert "0x" in text(browser, "say")
    assert browser.run("document.getElementById('canvas').dataset.high") == str(0x3000)
    # Every control is reached by Tab and has a name.
    assert browser.run(
        "[...document.querySelectorAll('button, input, canvas, [tabindex]')]"
        ".every((n) => n.textContent.trim() || n.ariaLabel)"
    )


def test_a_hundred_thousand_rows_at_addresses_that_are_no_numbers(browser: Browser, tmp_path: Path) -> None:
    base, rows = 0xFFFFFFFF81000000, 100_000
    kinds = [Kind("one", "", "", ("#123456", "#654321")), Kind("two", "", "", ("#0f0f80", "#8f8fff"))]
    code = Code(b"\x90", [(1, "nop")])
    page = Page(
        "test", "Many", "", "", [], 64, base, kinds, ("none", ""), "Map", "", "Rows", "", "rows",
        [Column("address", "Address", "160px", True), Column("where", "Symbol", "1fr"), Column("kind", "Kind", "1fr")],
        ("Before", "Now"),
        (Row(base + 64 * i, 1, i % 2, f"symbol{i}", 0, "", "", "", (code, code)) for i in range(rows)),
        TextMap(64 * rows, ((64 * i, 1, i % 2) for i in range(rows)), ((64 * i, f"symbol{i}") for i in range(rows))),
    )  # fmt: skip
    out = tmp_path / "many.html"
    out.write_text(render(page), "utf-8")
    browser.complaints.clear()
    browser.look(*DESKTOP)
    browser.open(out)
    assert count(browser) == rows
    assert browser.run("document.querySelectorAll('.line').length") < 60
    browser.run("document.getElementById('view').focus()")
    browser.press("End")
    assert text(browser, "placename") == f"symbol{rows - 1}"
    assert f"{base + 64 * (rows - 1):#x}" in text(browser, "meta")
    took = browser.run(
        """(async () => { const began = performance.now(); search.value = 'symbol77777';
        search.dispatchEvent(new Event('input'));
        while (view.getAttribute('aria-rowcount') !== '1') await new Promise((r) => setTimeout(r, 5));
        return performance.now() - began; })()"""
    )
    assert took < 2000
    drawn = browser.run(
        "(() => { const t = performance.now(); dispatchEvent(new Event('resize')); return performance.now() - t; })()"
    )
    assert drawn < 1000
    assert browser.complaints == []
