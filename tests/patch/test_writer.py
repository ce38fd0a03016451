"""Writing a plan and taking it back: whole or not at all, and only what is planned."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import scan
from vmipatch.errors import PatchError
from vmipatch.image import open_image
from vmipatch.patch import Native, Plan, apply, plan, restore
from vmipatch.patch.cpu import Cpu

CPU = Cpu("test", "GenuineIntel", 6, 1, 1, (1 << 26,) + (0,) * 23)
CLI = [sys.executable, "-m", "vmipatch"]


def kernel(size: int = 40) -> KernelMaker:
    made = KernelMaker(release="6.1.50")
    slot = made.pv_ops()["flush_tlb_user"]
    made.paravirt([(made.code(b"\xff\x15" + struct.pack("<I", slot)), 0, 6, 7) for _ in range(size)])
    body = made.replacement(b"\x0f\xae\xf0")
    made.alternatives("rel12", [(made.code(b"\x89\xc0\x89\xc0"), body, 26, 4, 3, {}) for _ in range(size)])
    made.locks("rel32", [made.code(b"\xf0\xff\x00") for _ in range(size)])
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel().build())
    return path


def planned(path: Path, *, seal: bool = False) -> Plan:
    image = open_image(path)
    found = scan(image)
    return plan(image, found, Native(CPU), seal=seal)


def others(folder: Path, *known: str) -> list[str]:
    """Files in a folder that nobody asked for."""
    return sorted(set(os.listdir(folder)) - {"vmlinux", "features", *known})


def test_only_planned_bytes_change(source: Path) -> None:
    image, made = open_image(source), planned(source)
    out = source.parent / "out"
    apply(image, made, out)
    before, after = source.read_bytes(), out.read_bytes()
    assert len(before) == len(after)
    expected = {image.offset_of(address): new for address, (_, new, _) in made.changes().items()}
    assert {i: b for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b} == expected
    assert not others(source.parent, "out", "out.journal.json")


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_restore_gives_the_original_back(source: Path, seal: bool, in_place: bool) -> None:
    original = source.read_bytes()
    os.chmod(source, 0o640)
    out = source if in_place else source.parent / "out"
    apply(open_image(source), planned(source, seal=seal), out, sealed=seal)
    assert out.read_bytes() != original
    assert out.stat().st_mode & 0o777 == 0o640
    restore(out)
    assert out.read_bytes() == original
    assert out.stat().st_mode & 0o777 == 0o640
    assert not others(source.parent, out.name)


def test_sealed_tables_name_nothing_and_are_known(source: Path) -> None:
    out = source.parent / "out"
    apply(open_image(source), planned(source, seal=True), out, sealed=True)
    image = open_image(out)
    found = scan(image)
    assert not found.sites
    assert not found.findings
    assert all(t.sealed for t in found.tables)
    table = next(t for t in found.tables if t.family == "parainstructions")
    for i in range(table.count):
        instr, kind, length, _ = struct.unpack("<IBBH", image.read(table.address + 8 * i, 8))
        assert (instr, kind) == (table.address, 0)
        # The kernel writes ``length`` bytes over the first entry: never over one that it has not read.
        assert 5 <= length <= 8


def test_a_patched_image_can_be_patched_again_to_the_same_bytes(source: Path) -> None:
    """What a kernel does that is patched and not sealed: alternatives and locks come out the same."""
    out = source.parent / "out"
    apply(open_image(source), planned(source), out)
    image = open_image(out)
    found = scan(image)
    rest = [s for s in found.sites if s.family != "parainstructions"]
    again = plan(image, replace(found, sites=tuple(rest), findings=()), Native(CPU))
    assert not again.changes()


def test_patching_in_place_twice_is_refused(source: Path) -> None:
    apply(open_image(source), planned(source), source)
    once = source.read_bytes()
    image = open_image(source)
    with pytest.raises(PatchError, match="already patched"):
        apply(image, Plan(()), source)
    assert source.read_bytes() == once


def test_bytes_that_are_neither_old_nor_new_are_refused(source: Path) -> None:
    image, made = open_image(source), planned(source)
    first = made.patches[0]
    wrong = type(first)(first.address, b"\x00" * 6, first.new, first.cause, first.site)
    out = source.parent / "out"
    with pytest.raises(PatchError, match="neither the old") as caught:
        apply(image, Plan((wrong,)), out)
    assert caught.value.address == first.address
    assert not others(source.parent)


def test_restore_refuses_what_its_journal_does_not_describe(source: Path) -> None:
    out = source.parent / "out"
    apply(open_image(source), planned(source), out)
    journal = out.with_name("out.journal.json")
    good = journal.read_text()
    changed = bytearray(out.read_bytes())
    changed[-1] ^= 1
    patched = out.read_bytes()
    out.write_bytes(changed)
    with pytest.raises(PatchError, match="another file"):
        restore(out)
    out.write_bytes(patched)
    record = json.loads(good)
    for spoil in (
        lambda r: r["changes"].pop(),
        lambda r: r["changes"][0].__setitem__("old", "00" * (len(r["changes"][0]["old"]) // 2)),
        lambda r: r["changes"][0].__setitem__("old", "zz"),
        lambda r: r["changes"][0].__setitem__("offset", "x"),
        lambda r: r.pop("original"),
        lambda r: r.__setitem__("schema", "other/1"),
        lambda r: r.__setitem__("changes", 5),
        lambda r: r.__setitem__("container_data", "%%%"),
    ):
        bad = json.loads(good)
        spoil(bad)
        journal.write_text(json.dumps(bad))
        with pytest.raises(PatchError):
            restore(out)
        assert out.read_bytes() == patched
    journal.write_text("{")
    with pytest.raises(PatchError, match="damaged"):
        restore(out)
    assert record["changes"]
    journal.write_text(good)
    assert restore(out).read_bytes() == source.read_bytes()


def run(source: Path, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    features = source.parent / "features"
    features.write_text(" ".join(f"{w:08x}" for w in CPU.words))
    command = [*CLI, "patch", str(source), "--features", str(features), *words]
    return subprocess.run(command, text=True, capture_output=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("vmipatch: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_full_disk(source: Path) -> None:
    original = source.read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = run(source, "-o", str(source.parent / "out"), preexec_fn=limit)
    assert "cannot write" in one_line(done)
    assert source.read_bytes() == original
    assert not others(source.parent)


def test_a_read_only_target(source: Path) -> None:
    os.chmod(source, 0o444)
    original = source.read_bytes()
    # As root the mode does not stop anybody: a folder that cannot be written to at all does.
    where = ("-o", "/proc/out") if os.access(source, os.W_OK) else ("--in-place",)
    done = run(source, *where)
    assert "cannot write" in one_line(done)
    assert source.read_bytes() == original
    assert not others(source.parent)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """At whatever moment the process dies: the original is whole, and nothing lies beside it but whole files."""
    source = tmp_path / "vmlinux"
    source.write_bytes(kernel(3000).build() + bytes(8 << 20))
    original = source.read_bytes()
    features = tmp_path / "features"
    features.write_text(" ".join(f"{w:08x}" for w in CPU.words))
    command = [*CLI, "patch", str(source), "--features", str(features), "--in-place"]
    start = time.monotonic()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    whole = time.monotonic() - start
    patched = source.read_bytes()
    assert patched != original
    ends = set()
    for turn in range(24):
        source.write_bytes(original)
        (tmp_path / "vmlinux.journal.json").unlink(missing_ok=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.3 + 0.7 * turn / 24))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = source.read_bytes()
        assert found in (original, patched)
        ends.add(found == patched)
        left = others(tmp_path, "vmlinux.journal.json")
        # Between link and rename a whole file may stand under its hidden name; a partial one never does.
        for name in left:
            assert name.startswith(".vmlinux")
            assert (tmp_path / name).stat().st_size >= min(len(original), 1000)
            (tmp_path / name).unlink()
    assert False in ends


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--features", "missing"), "cannot"),
        (("--cpus", "0"), "at least one"),
        (("--rom-base", "0xC0000"), "--rom-base goes with --rom"),
        (("--target", "mars"), "no target"),
        (("--base", "zero"), "no number"),
        (("--layout", "smp_locks"), "FAMILY=NAME"),
        (("--kernel", "six"), "no kernel version"),
        (("--cpu", "pentium3"), "give one"),
        (("--in-place",), "give one"),
    ],
)
def test_wrong_use_is_one_line(source: Path, words: tuple[str, ...], what: str) -> None:
    done = run(source, "-o", str(source.parent / "out"), *words)
    assert what in one_line(done)
    assert not others(source.parent)


def test_dry_run_writes_nothing_and_json_says_what_would_be(source: Path) -> None:
    done = run(source, "--dry-run", "--json")
    record = json.loads(done.stdout)
    assert record["schema"] == "vmipatch.patch/1"
    assert record["bytes_changed"] == len(planned(source).changes())
    assert record["output"] is None
    assert all(c["address_hex"] == f"{c['address']:#x}" for c in record["changes"])
    assert not others(source.parent)


def test_diff_tells_a_wrong_site(source: Path) -> None:
    out = source.parent / "out"
    assert run(source, "-o", str(out)).returncode == 0
    good = subprocess.run([*CLI, "diff", str(source), str(out), "--json"], text=True, capture_output=True, check=False)
    assert (good.returncode, json.loads(good.stdout)["wrong"]) == (0, 0)
    image = open_image(out)
    site = scan(open_image(source)).sites[3]
    data = bytearray(out.read_bytes())
    data[image.offset_of(site.address)] ^= 0xFF
    out.write_bytes(data)
    bad = subprocess.run([*CLI, "diff", str(source), str(out), "--json"], text=True, capture_output=True, check=False)
    record = json.loads(bad.stdout)
    assert (bad.returncode, record["wrong"]) == (1, 1)
    assert [s["address"] for s in record["sites"] if not s["right"]] == [site.address]


def test_scan_keeps_its_contract(source: Path) -> None:
    done = subprocess.run([*CLI, "scan", str(source), "--json"], text=True, capture_output=True, check=False)
    record = json.loads(done.stdout)
    assert done.returncode == 0
    assert record["schema"] == "vmipatch.scan/1"
    assert {"family", "section", "count"} <= set(record["tables"][0])
    keys = {"address", "address_hex", "length", "family", "op", "section", "symbol", "offset", "bytes"}
    assert keys <= set(record["sites"][0])
    assert record["findings"] == []
