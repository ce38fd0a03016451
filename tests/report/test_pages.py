"""The data of the pages against the bytes themselves, counted one by one; what is written is whole and escaped."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Commands, hostile_kernel, running_kernel
from test_sarif import audit_of

from tests.explain import running as made
from vmipatch.errors import VmipatchError
from vmipatch.explain import Memory, explain
from vmipatch.explain.places import UNEXPLAINED, places, ranges
from vmipatch.image import open_image
from vmipatch.report.auditreports import audit_page
from vmipatch.report.html import render
from vmipatch.report.pages import explain_page
from vmipatch.report.writing import write_text


@pytest.fixture
def vmipatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys, monkeypatch)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/octet-stream">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(found[1])))
    return data


@pytest.mark.parametrize("slide", [0, 0x400000])
def test_ranges_and_places_against_each_byte(tmp_path: Path, slide: int) -> None:
    kernel, dump = running_kernel(tmp_path, slide=slide)
    image = open_image(kernel)
    found = explain(image, Memory(dump, made.PHYSICAL + slide))
    moved = bytearray(made.text())
    for field in made.pointers():
        at = field - made.TEXT
        value = int.from_bytes(moved[at : at + 4], "little") + slide
        moved[at : at + 4] = value.to_bytes(4, "little")
    held = dump.read_bytes()[: len(moved)]
    changed = {made.TEXT + i for i in range(len(moved)) if moved[i] != held[i]}
    listed = list(ranges(found))
    covered = [r.address + i for r in listed for i in range(r.length)]
    assert covered == sorted(set(covered))
    # And two bytes that are as on disk and should not be: a lock that was put back, the E8 of the planted call.
    assert set(covered) == changed | {made.function(9) + made.OFF_LOCK, made.function(12)}
    counts: Counter[str] = Counter()
    for r in listed:
        counts[r.cause] += r.length
    assert counts.pop(UNEXPLAINED) == found.unexplained_bytes
    assert dict(counts) == found.by_cause
    told = places(found)
    assert {a for p in told for a in range(p.address, p.address + len(p.original))} >= set(covered)
    for place in told:
        at = place.address - made.TEXT
        assert place.original == bytes(moved[at : at + len(place.original)])
        assert place.found == held[at : at + len(place.found)]
        assert (place.cause == UNEXPLAINED) == (place.found != place.expected)
    bad = {p.address: p for p in told if p.cause == UNEXPLAINED}
    assert set(bad) == {
        made.function(9) + made.OFF_LOCK, made.function(12), made.function(20) + made.OFF_TARGET,
    }  # fmt: skip
    assert bad[made.function(9) + made.OFF_LOCK].original == b"\xf0\xff\x00"
    assert "ftrace" in bad[made.function(12)].note


def test_one_byte_without_a_cause_makes_its_site_unexplained(tmp_path: Path) -> None:
    memory = made.Machine()
    memory.put(made.function(14), made.NOP5[:4] + b"\xff")
    (tmp_path / "dump").write_bytes(memory.bytes)
    found = explain(open_image(made.build(tmp_path)), Memory(tmp_path / "dump", made.PHYSICAL))
    assert [r.cause for r in ranges(found) if made.function(14) <= r.address < made.function(14) + 5] == [
        "mcount",
        UNEXPLAINED,
    ]
    (place,) = (p for p in places(found) if p.address == made.function(14))
    assert (place.cause, place.op) == (UNEXPLAINED, "fentry")
    assert (place.found, place.expected) == (made.NOP5[:4] + b"\xff", made.NOP5)


def test_the_page_of_an_explanation(vmipatch: Commands, tmp_path: Path) -> None:
    kernel, dump = running_kernel(tmp_path)
    out = tmp_path / "page.html"
    done = vmipatch("explain", kernel, "--memory", dump, "--base", hex(made.PHYSICAL), "--html", out, "--json")
    assert done.status == 1, done.err
    answer = done.json()
    page = out.read_text("utf-8")
    data = data_of(page)
    assert (data["base"], data["length"]) == (answer["text"]["address_hex"], answer["bytes"]["total"])
    kinds = [kind["name"] for kind in data["kinds"]]
    sizes: Counter[str] = Counter()
    at = 0
    marked = set()
    for gap, length, kind in zip(*[iter(data["ranges"])] * 3, strict=True):
        at += gap + length
        sizes[kinds[kind]] += length
        if kinds[kind] == UNEXPLAINED:
            marked |= set(range(at - length, at))
    base = answer["text"]["address"]
    assert marked == {u["address"] - base + i for u in answer["unexplained"] for i in range(u["length"])}
    assert at <= data["length"]
    assert sizes.pop(UNEXPLAINED) == answer["bytes"]["unexplained"]
    assert dict(sizes) == answer["by_cause"]
    strings = data["strings"]
    rows = data["rows"]
    assert len({len(column) for name, column in rows.items() if name != "code"}) == 1
    assert len(rows["code"]) == 3 * len(rows["at"])
    nine = rows["at"].index(made.function(9) + made.OFF_LOCK - made.TEXT)
    assert strings[rows["symbol"][nine]] == "f9"
    disk, now, expected = (data["codes"][i] for i in rows["code"][3 * nine : 3 * nine + 3])
    assert (disk[0], now[0], expected[0]) == ("f0ff00", "f0ff00", "3eff00")
    assert strings[disk[2]] == "lock inc dword ptr [eax]"


def test_pages_hold_no_markup_of_others_and_fetch_nothing(tmp_path: Path) -> None:
    kernel, dump = running_kernel(tmp_path)
    image = open_image(kernel)
    found = explain(image, Memory(dump, made.PHYSICAL))
    elsewhere = tmp_path / "audited"
    elsewhere.mkdir()
    audited, audit = audit_of(hostile_kernel(elsewhere, 64))
    for page in (render(explain_page(image, str(dump), found)), render(audit_page(audited, audit))):
        page.encode("utf-8")
        # Two scripts: the data and our own; whoever else says so is shown as text.
        assert len(re.findall(r"<script", page)) == 2
        assert "alert" not in page
        assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,)""", page)
        assert not re.findall(r"https?://|url\(|@import", page)
        assert "default-src 'none'" in page
        assert "<" not in re.search(r"<title>(.*?)</title>", page)[1]  # type: ignore[index]


def test_the_same_explanation_gives_the_same_page(tmp_path: Path) -> None:
    kernel, dump = running_kernel(tmp_path)
    pages = []
    for _ in range(2):
        image = open_image(kernel)
        pages.append(render(explain_page(image, "dump", explain(image, Memory(dump, made.PHYSICAL)))))
    assert pages[0] == pages[1]


def test_the_page_of_an_audit(tmp_path: Path) -> None:
    image, audit = audit_of(hostile_kernel(tmp_path, 64))
    data = data_of(render(audit_page(image, audit)))
    assert len(data["rows"]["at"]) == len(audit.findings)
    for at, finding in zip(data["rows"]["at"], audit.findings, strict=True):
        assert (None if at is None else int(data["base"], 16) + at) == finding.address
    assert [k["name"] for k in data["kinds"] if k["loud"]] == [
        k["name"] for k in data["kinds"] if any(f.id == k["name"] and f.severity == "error" for f in audit.findings)
    ]
    assert any("popfd" in text for text in data["strings"])


def test_the_page_of_a_diff(vmipatch: Commands, tmp_path: Path) -> None:
    kernel = hostile_kernel(tmp_path, 32)
    out, page = tmp_path / "out", tmp_path / "page.html"
    changed = vmipatch("patch", kernel, "-o", out, "--cpu", "pentium3", "--json").json()["changes"]
    assert vmipatch("diff", kernel, out, "--html", page).status == 0
    right = data_of(page.read_text("utf-8"))
    assert not any(kind["loud"] for kind in right["kinds"])
    moved = bytearray(out.read_bytes())
    moved[changed[0]["offset"]] ^= 0xFF
    out.unlink()
    out.write_bytes(moved)
    done = vmipatch("diff", kernel, out, "--html", page, "--json")
    data = data_of(page.read_text("utf-8"))
    assert (done.status, len(data["rows"]["at"])) == (1, len(done.json()["sites"]))
    assert [(k["name"], k["count"]) for k in data["kinds"] if k["loud"]] == [("wrong", "1")]
    wrong = data["rows"]["kind"].index([k["loud"] for k in data["kinds"]].index(True))
    assert int(data["base"], 16) + data["rows"]["at"][wrong] == changed[0]["address"]


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report"
    write_text(target, "old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new \udcff ü")
    assert link.is_symlink()
    assert target.read_bytes() == "new \\udcff ü".encode()
    assert target.stat().st_mode & 0o777 == 0o640
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int, data: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(VmipatchError, match="cannot write"):
        write_text(target, "lost")
    monkeypatch.undo()
    assert target.read_bytes() == "new \\udcff ü".encode()
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(VmipatchError, match="cannot write"):
        write_text(tmp_path / "away" / "report", "x")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
