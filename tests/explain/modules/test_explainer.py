"""Modules of a made-up kernel explained whole: placed, patched and compared; and what is wrong with them, said."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import pytest

from tests.explain.modules import made
from vmipatch.errors import UsageError
from vmipatch.explain.modules import Modules, beside, explain_modules
from vmipatch.explain.modules.files import Files, build_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "lib/modules/6.12.1-made/kernel"
    target.mkdir(parents=True)
    return target


def explained(tmp_path: Path, machine: made.Machine, folder: Path) -> Modules:
    image, _ = made.opened(tmp_path)
    return explain_modules(machine.engine_kernel(image), folder)


def test_every_byte_has_a_cause(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("plain")
    machine.load("with_key", key=1)
    (folder / "plain.ko").write_bytes(made.module_file("plain"))
    (folder / "with-key.ko.xz").write_bytes(lzma.compress(made.module_file("with_key")))
    found = explained(tmp_path, machine, folder.parent)
    assert [(m.name, m.unexplained_bytes, m.total) for m in found.modules] == [
        ("with_key", 0, 0x1000), ("plain", 0, 0x1000),
    ]  # fmt: skip

    def differing(one: bytes, two: bytes) -> int:
        return sum(a != b for a, b in zip(one, two, strict=True))

    for m in found.modules:
        base = machine.base(m.name)
        assert m.by_cause["mcount"] == differing(made.near(0xE8, base, made.FENTRY), made.NOP5)
        assert m.by_cause["return_sites"] == differing(made.near(0xE9, base + 22, made.THUNK), made.RET5)
    jump = made.near(0xE9, machine.base("with_key") + 5, machine.base("with_key") + 32)
    assert found.modules[0].by_cause["jump_labels"] == differing(jump, made.NOP5)
    assert "jump_labels" not in found.modules[1].by_cause
    assert found.modules[0].address == machine.base("with_key")
    assert found.modules[0].file == str(folder / "with-key.ko.xz")
    assert found.modules[0].freed == (".init.text",)
    assert found.clean
    assert [p.cause for p in found.modules[0].proved] == ["static key"]


@pytest.mark.parametrize("at", [0, 3, 6, 11, 19, 22, 26, 32, 0x2F, 0x33, 0x400, 0xFFF])
def test_a_flip_is_told_where_it_is(tmp_path: Path, folder: Path, at: int) -> None:
    machine = made.Machine()
    machine.load("plain")
    machine.load("other")
    for name in machine.names:
        (folder / f"{name}.ko").write_bytes(made.module_file(name))
    address = machine.base("plain") + at
    now = machine.get(address, 1)
    assert now is not None
    machine.put(address, bytes((now[0] ^ 0x41,)))
    found = explained(tmp_path, machine, folder)
    plain, other = found.modules[1], found.modules[0]
    assert other.unexplained_bytes == 0
    assert [u.address for u in plain.unexplained if u.address <= address < u.address + len(u.found)] != []
    assert not found.clean


def test_a_module_without_a_file(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("known")
    machine.load("unknown")
    (folder / "known.ko").write_bytes(made.module_file("known"))
    found = explained(tmp_path, machine, folder)
    assert [(m.name, m.file is None, m.unexplained_bytes) for m in found.modules] == [
        ("unknown", True, 0x1000), ("known", False, 0),
    ]  # fmt: skip
    assert [(n.id, n.module, n.finding) for n in found.notes if n.module] == [("module-no-file", "unknown", True)]


def test_a_file_of_another_build_and_one_that_fits(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m")
    (folder / "m.ko").write_bytes(made.module_file("m", build_id=bytes(20)))
    found = explained(tmp_path, machine, folder)
    assert found.modules[0].unexplained_bytes == 0x1000
    note = next(n for n in found.notes if n.module == "m")
    assert (note.id, note.finding) == ("module-other-build", True)
    assert made.BUILD_ID.hex() in note.message
    (folder / "updates").mkdir()
    (folder / "updates" / "m.ko.gz").write_bytes(gzip.compress(made.module_file("m")))
    found = explained(tmp_path, machine, folder)
    assert found.modules[0].file == str(folder / "updates" / "m.ko.gz")
    assert found.clean


def test_another_srcversion(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m")
    machine.put(machine.structure("m") + made.SRCVERSION, struct.pack("<Q", machine.take(b"AAAA\0")))
    (folder / "m.ko").write_bytes(made.module_file("m", srcversion="BBBB"))
    found = explained(tmp_path, machine, folder)
    assert "srcversion is BBBB" in next(n for n in found.notes if n.module == "m").message


def test_a_srcversion_that_does_not_print(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m")
    machine.put(machine.structure("m") + made.SRCVERSION, struct.pack("<Q", machine.take(b"A\n\x1b[2J\0")))
    (folder / "m.ko").write_bytes(made.module_file("m", srcversion="B\x1b[3J\n"))
    found = explained(tmp_path, machine, folder)
    message = next(n for n in found.notes if n.module == "m").message
    assert message.isprintable()
    assert "its srcversion is B?[3J?, that of the loaded module A??[2J" in message


@pytest.mark.parametrize("cut", [0, 1, 64, 200, 900])
def test_a_damaged_file_is_one_finding_and_the_rest_stands(tmp_path: Path, folder: Path, cut: int) -> None:
    machine = made.Machine()
    machine.load("good")
    machine.load("bad")
    (folder / "good.ko").write_bytes(made.module_file("good"))
    (folder / "bad.ko").write_bytes(made.module_file("bad")[:cut])
    found = explained(tmp_path, machine, folder)
    assert [(m.name, m.unexplained_bytes) for m in found.modules] == [("bad", 0x1000), ("good", 0)]
    notes = [n for n in found.notes if n.module]
    assert [(n.id, n.module) for n in notes] == [("module-damaged-file", "bad")]
    assert "\n" not in notes[0].message


def test_without_the_kernels_table_of_sections_they_are_laid_out_as_it_does(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m", sections=False)
    (folder / "m.ko").write_bytes(made.module_file("m"))
    found = explained(tmp_path, machine, folder)
    assert (found.modules[0].unexplained_bytes, found.clean) == (0, True)


def test_what_lies_between_sections_may_be_int3_all_over_but_not_some(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m")
    (folder / "m.ko").write_bytes(made.module_file("m"))
    base = machine.base("m")
    machine.put(base + 33, b"\xcc" * 15)
    machine.put(base + 0x38, b"\xcc" * (0x1000 - 0x38))
    assert explained(tmp_path, machine, folder).clean
    machine.put(base + 0x800, bytes(16))
    found = explained(tmp_path, machine, folder)
    assert [(u.address, len(u.found)) for u in found.modules[0].unexplained] == [(base + 0x800, 16)]


def test_a_list_that_cannot_be_leaves_the_rest(tmp_path: Path, folder: Path) -> None:
    machine = made.Machine()
    machine.load("m")
    (folder / "m.ko").write_bytes(made.module_file("m"))
    machine.put(machine.structure("m") + made.LIST, struct.pack("<Q", 0x10))
    found = explained(tmp_path, machine, folder)
    assert found.modules[0].unexplained_bytes == 0
    assert [n.id for n in found.notes if n.finding] == ["module-list"]


def test_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="no folder of modules"):
        Files(tmp_path / "none")
    for name in ("a-b.ko", "c.ko.zst", "c.txt", "d.o"):
        (folder / name).touch()
    (folder / "build").mkdir()
    (folder / "build" / "e.ko").touch()
    found = Files(folder.parent)
    assert found.names() == ["a_b", "c"]
    assert [p.name for p in found.candidates("a-b")] == ["a-b.ko"]


def test_what_lies_beside_an_image(tmp_path: Path) -> None:
    image = tmp_path / "boot" / "vmlinuz-6.1"
    assert beside(str(image)) is None
    (tmp_path / "usr/lib/modules/6.1").mkdir(parents=True)
    assert beside(str(image)) == tmp_path / "usr/lib/modules/6.1"
    (tmp_path / "lib/modules/6.1").mkdir(parents=True)
    assert beside(str(image)) == tmp_path / "lib/modules/6.1"
    inside = tmp_path / "usr/lib/modules/6.1/vmlinuz"
    assert beside(str(inside)) == inside.parent


def test_build_ids_among_other_notes() -> None:
    other = struct.pack("<III8s", 6, 4, 1, b"Linux\0") + b"abcd"
    mine = struct.pack("<III4s", 4, 20, 3, b"GNU\0") + made.BUILD_ID
    assert build_id(other + mine) == made.BUILD_ID
    assert build_id(other) is None
    assert build_id(mine[:-1]) is None
    assert build_id(b"\xff" * 40) is None
