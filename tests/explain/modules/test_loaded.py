"""The kernel's list of modules: walked, and told where it cannot be."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.explain.modules import made
from vmipatch.explain.modules import loaded
from vmipatch.explain.modules.loaded import Walk


def machine(*names: str) -> made.Machine:
    found = made.Machine()
    for name in names:
        found.load(name)
    return found


def walk(folder: Path, of: made.Machine) -> Walk:
    image, types = made.opened(folder)
    return Walk(of.view(image), types)


def test_modules_by_types(tmp_path: Path) -> None:
    of = machine("alpha", "beta_two")
    of.put(of.structure("alpha") + made.TAINTS, struct.pack("<Q", 0x3000))
    of.put(of.structure("alpha") + made.SRCVERSION, struct.pack("<Q", of.take(b"0123ABC\0")))
    of.put(of.structure("beta_two"), b"\1")
    found = walk(tmp_path, of)
    assert found.findings == []
    assert [(m.name, m.state, m.address) for m in found.modules] == [
        ("beta_two", "coming", of.structure("beta_two")), ("alpha", "live", of.structure("alpha")),
    ]  # fmt: skip
    alpha = found.modules[1]
    assert (alpha.taints, alpha.srcversion) == (0x3000, "0123ABC")
    assert [(r.kind, r.address, r.size) for r in alpha.regions] == [
        ("text", made.AREA, 0x1000), ("data", made.AREA + 0x4000, 0x1000), ("rodata", made.AREA + 0x8000, 0x1000),
        ("ro after init", made.AREA + 0x6000, 0x1000),
    ]  # fmt: skip
    assert dict(alpha.sections)[".exit.text"] == made.AREA + 0x30
    assert len(alpha.sections) == 9


def test_without_types_the_sections_are_found_by_what_they_are(tmp_path: Path) -> None:
    of = machine("alpha", "beta")
    image, types = made.opened(tmp_path, b"\0" * 64)
    found = Walk(of.view(image), types)
    assert types.known is None
    assert [m.name for m in found.modules] == ["beta", "alpha"]
    assert [dict(m.sections)[".text"] for m in found.modules] == [of.base("beta"), of.base("alpha")]
    assert all(m.regions == () for m in found.modules)


def test_without_a_symbol_the_head_is_found_by_what_hangs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = machine("alpha")
    image, types = made.opened(tmp_path)
    monkeypatch.setattr(image.symbols, "lookup", lambda name: None)
    # A list beside it that is sound, and whose node is no module.
    other = made.DATA + 0x80
    node = made.SLAB + 0x20000
    of.put(other, struct.pack("<QQ", node, node))
    of.put(node, struct.pack("<QQ", other, other))
    assert [m.name for m in Walk(of.view(image), types).modules] == ["alpha"]


def test_no_modules(tmp_path: Path) -> None:
    found = walk(tmp_path, machine())
    assert (found.modules, found.findings) == ([], [])


def test_a_circle(tmp_path: Path) -> None:
    of = machine("a", "b", "c")
    # The last leads back to the first instead of to the head.
    of.put(of.structure("a") + made.LIST, struct.pack("<Q", of.structure("c") + made.LIST))
    found = walk(tmp_path, of)
    assert [m.name for m in found.modules] == ["c", "b", "a"]
    assert len(found.findings) == 1
    assert "and not to its head" in found.findings[0]


@pytest.mark.parametrize("where", [0, 0x1234, 0xFFFF900000000000, made.AREA + 1])
def test_out_of_the_dump(tmp_path: Path, where: int) -> None:
    of = machine("a", "b")
    of.put(of.structure("b") + made.LIST, struct.pack("<Q", where))
    found = walk(tmp_path, of)
    assert [m.name for m in found.modules] == ["b"]
    assert any(f"leads to {where:#x}" in f for f in found.findings)


def test_a_torn_list_goes_on(tmp_path: Path) -> None:
    of = machine("a", "b")
    of.put(of.structure("a") + made.LIST + 8, struct.pack("<Q", made.SLAB))
    found = walk(tmp_path, of)
    assert [m.name for m in found.modules] == ["b", "a"]
    assert "is torn" in found.findings[0]


def test_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "MOST", 2)
    found = walk(tmp_path, machine("a", "b", "c"))
    assert len(found.modules) == 2
    assert "no end after 2 modules" in found.findings[0]


def test_a_module_without_a_name(tmp_path: Path) -> None:
    of = machine("a")
    of.put(of.structure("a") + made.NAME, b"\xff\1")
    found = walk(tmp_path, of)
    assert "without a name" in found.findings[0]
    assert found.modules[0].name == f"{of.structure('a'):#x}"


def test_absurd_regions_are_none(tmp_path: Path) -> None:
    of = machine("a")
    of.put(of.structure("a") + made.MEM, struct.pack("<QI", made.AREA, 0xFFFFFFF0))
    of.put(of.structure("a") + made.MEM + 16, struct.pack("<QI", 0, 0x1000))
    assert [r.kind for r in walk(tmp_path, of).modules[0].regions] == ["rodata", "ro after init"]
