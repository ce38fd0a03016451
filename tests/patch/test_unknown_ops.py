"""Paravirt sites of which nothing tells what they do: said, refused, or left alone where that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import scan
from vmipatch.errors import PatchError
from vmipatch.image import open_image
from vmipatch.patch import Native, from_spec, plan

ROOT = Path(__file__).parents[2]


class Made:
    """A kernel with two sites through slots that nobody knows, and a LOCK prefix beside them."""

    def __init__(self, folder: Path, release: str = "5.10.3") -> None:
        kernel = KernelMaker(32, release=release)
        slots = [kernel.word(0), kernel.word(0)]
        calls = [b"\xff\x15" + slot.to_bytes(4, "little") for slot in slots]
        self.slots = slots
        self.sites = [kernel.code(call) for call in (*calls, calls[0])]
        self.lock = kernel.code(b"\xf0\x0f\xb1\x0a")
        kernel.paravirt([(site, 40 + i % 2, 6, 7) for i, site in enumerate(self.sites)])
        kernel.locks("rel32", [self.lock])
        self.path = folder / "vmlinux"
        self.path.write_bytes(kernel.build())


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmipatch", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=60, env=environment)


def test_each_slot_is_a_finding_at_its_first_site(made: Made) -> None:
    found = scan(open_image(made.path)).findings
    assert [(f.id, f.severity, f.address) for f in found] == [
        ("op-unknown", "warning", made.sites[0]), ("op-unknown", "warning", made.sites[1]),
    ]  # fmt: skip
    assert [dict(f.details) for f in found] == [
        {"type": 40, "slot_address": made.slots[0], "sites": 2},
        {"type": 41, "slot_address": made.slots[1], "sites": 1},
    ]


def test_many_slots_are_counted(tmp_path: Path) -> None:
    kernel = KernelMaker(32)
    calls = [b"\xff\x15" + kernel.word(0).to_bytes(4, "little") for _ in range(60)]
    kernel.paravirt([(kernel.code(call), 100 + i, 6, 7) for i, call in enumerate([*calls, calls[-1]])])
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel.build())
    *named, rest = scan(open_image(path)).findings
    assert len(named) == 50
    assert rest.id == "op-unknown"
    assert "11 more sites, of 11 more slots or types" in rest.message


def test_a_plan_is_refused_or_leaves_them(made: Made) -> None:
    image = open_image(made.path)
    found = scan(image)
    target = Native(from_spec("pentium3", image.version))
    with pytest.raises(PatchError, match=r"nobody knows what 3 of 3 paravirt sites do") as refused:
        plan(image, found, target)
    assert refused.value.address == made.sites[0]
    planned = plan(image, found, target, skip_unknown=True)
    assert [s.address for s in planned.skipped] == made.sites
    assert list(planned.changes()) == [made.lock]
    assert "parainstructions" not in planned.left
    assert [s.address for s in plan(image, found, target, seal=True, skip_unknown=True).skipped] == made.sites


def test_the_command(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("patch", made.path, "-o", out, "--cpu", "pentium3", "--cpus", "1")
    done = run(*words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--skip-unknown" in done.stderr
    assert f"{made.sites[0]:#x}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vmlinux"]
    done = run(*words, "--skip-unknown", "--dry-run")
    assert done.returncode == 0
    assert f"{made.sites[2]:#x}, 6 bytes, type 40 through the slot at {made.slots[0]:#x}" in done.stdout
    done = run(*words, "--skip-unknown", "--json")
    assert done.returncode == 0
    record = json.loads(done.stdout)
    assert [(x["address"], x["type"], x["slot"]) for x in record["skipped"]] == [
        (site, 40 + i % 2, made.slots[i % 2]) for i, site in enumerate(made.sites)
    ]
    assert [change["address"] for change in record["changes"]] == [made.lock]
    before, after = made.path.read_bytes(), out.read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    # What was left is no difference that nothing explains.
    assert run("diff", made.path, out, "--cpu", "pentium3", "--cpus", "1").returncode == 0
