"""The legal-patch set of modules that are not loaded: by section and offset, with what moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.explain.modules import made
from vmipatch.errors import UsageError
from vmipatch.explain.modules import ModuleLegal, legal_modules
from vmipatch.explain.modules.legal import _fields, _parts
from vmipatch.image import open_image


def one(tmp_path: Path) -> ModuleLegal:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "m.ko").write_bytes(made.module_file("m"))
    (found,) = legal_modules(open_image(made.kernel(tmp_path)), folder)
    return found


def test_sites_with_all_their_states(tmp_path: Path) -> None:
    found = one(tmp_path)
    assert (found.name, found.error, found.build_id) == ("m", None, made.BUILD_ID.hex())
    sites = {(s.section, s.offset): s for s in found.sites}
    assert {key: s.families for key, s in sites.items()} == {
        (".text", 0): ("mcount",), (".text", 5): ("jump_labels",), (".text", 22): ("return_sites",),
    }  # fmt: skip
    base = found.bases["text"]
    mcount = {s.code: s for s in sites[".text", 0].states}
    assert set(mcount) == {made.near(0xE8, base, made.FENTRY), made.NOP5}
    # The call leads out of the module: its field shrinks as the module's text moves up.
    (move,) = mcount[made.near(0xE8, base, made.FENTRY)].moves
    assert move == (1, 4, (), ("text",))
    assert mcount[made.NOP5].moves == ()
    assert sites[".text", 0].patterns == ("ftrace-call",)
    # A jump inside the text moves with it.
    label = {s.code: s.moves for s in sites[".text", 5].states}
    assert label == {made.NOP5: (), made.near(0xE9, base + 5, base + 32): ()}
    returned = {s.code: s.moves for s in sites[".text", 22].states}
    assert returned[made.RET5] == ()
    assert returned[made.near(0xE9, base + 22, made.THUNK)] == ((1, 4, (), ("text",)),)


def test_what_a_loaded_module_holds_is_in_its_set(tmp_path: Path) -> None:
    found = one(tmp_path)
    machine = made.Machine()
    machine.load("m", key=1)
    at = machine.base("m")
    for site in found.sites:
        now = machine.get(at + site.offset, site.length)
        states = set()
        for state in site.states:
            code = bytearray(state.code)
            for move in state.moves:
                field = int.from_bytes(code[move.offset : move.offset + move.width], "little")
                field += (at - found.bases["text"]) * (("text" in move.plus) - ("text" in move.minus))
                code[move.offset : move.offset + move.width] = (field & 0xFFFFFFFF).to_bytes(move.width, "little")
            states.add(bytes(code))
        assert now in states, site


@pytest.mark.parametrize(
    ("distance", "plus", "minus"),
    [
        (1, "a", ""),
        (-1, "", "a"),
        (5, "b", ""),
        (4, "b", "a"),
        (-4, "a", "b"),
        (25 - 1, "c", "a"),
        (31, "abc", ""),
        (0, "", ""),
    ],
)
def test_distances_tell_their_parts(distance: int, plus: str, minus: str) -> None:
    assert _parts(distance, ["a", "b", "c"]) == (tuple(plus), tuple(minus))


def test_fields_of_eight_bytes() -> None:
    moves = {"text": 0x10000, "data": 0x50000}
    before = b"\x48\xb8" + 0xFFFFFFFFC0000010.to_bytes(8, "little")
    after = b"\x48\xb8" + 0xFFFFFFFFC0050010.to_bytes(8, "little")
    assert list(_fields(before, after, moves)) == [(2, 4, ("data",), ())]
    low, high = 0x00000000FFFF0010, 0x0000000100000010
    assert list(_fields(low.to_bytes(8, "little"), high.to_bytes(8, "little"), moves)) == [(0, 8, ("text",), ())]


def test_a_damaged_file_has_an_error_and_no_sites(tmp_path: Path) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "bad.ko").write_bytes(made.module_file("m")[:300])
    (found,) = legal_modules(open_image(made.kernel(tmp_path)), folder)
    assert found.sites == ()
    assert found.error
    with pytest.raises(UsageError, match="no folder of modules"):
        list(legal_modules(open_image(made.kernel(tmp_path)), tmp_path / "none"))
