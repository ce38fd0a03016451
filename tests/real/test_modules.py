"""The modules of real kernels in memory dumps: every byte explained, every flip told, BTF as bpftool reads it."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmipatch.explain import Memory, explain, paging
from vmipatch.explain.modules.btf import Btf, read
from vmipatch.image import open_image

from .conftest import Cli, RealKernel
from .dumps import QUICK, Dumped, Get, Run
from .modules import Modules

# Two file systems, a network filter, a cipher, a hypervisor, and drivers; crc32c by the name that the kernel asks for.
LOADED = (
    "ext4",
    "xfs",
    "btrfs",
    "nf_tables",
    "nft_ct",
    "nf_conntrack",
    "xts",
    "loop",
    "tun",
    "bridge",
    "virtio_net",
    "overlay",
)
OLD = ("crc32c_generic", *LOADED)
RUNS = {
    "6.12-amd64": Run("6.12-amd64", "EPYC-Milan,+svm", 1, append=QUICK, modules=(*OLD, "kvm_amd", "aesni_intel")),
    "7.2-amd64": Run("7.2-amd64", "Skylake-Client", 1, append=QUICK, modules=(*LOADED, "kvm", "aesni_intel")),
    "7.3-amd64": Run("7.3-amd64", "EPYC-Milan,+svm", 1, append=QUICK, modules=(*LOADED, "kvm_amd", "aesni_intel")),
    "686-pae": Run("686-pae", "Nehalem", 1, append=QUICK, modules=(*OLD, "kvm", "twofish_i586")),
}
MOVED = Run(
    "7.3-amd64", "Skylake-Server", 2, kaslr=True, append=QUICK, modules=("ext4", "kvm", "nf_tables", "xts"), long=True
)
# Calls of modules that are counted (call depth tracking), of functions of the kernel and of other modules.
COUNTED = tuple(
    Run(
        kernel, "Skylake-Server", 1, kaslr=True, append=f"retbleed=stuff spectre_v2=retpoline {QUICK}",
        modules=(*modules, "ext4", "kvm", "nf_tables", "xts", "bridge"), long=kernel != "6.12-amd64",
    )
    for kernel, modules in (("6.12-amd64", OLD[:1]), ("7.3-amd64", ()))
)  # fmt: skip
FLIPS = 1000
# `./dev real` takes one kernel; the others are left to `./dev real --all`.
LATER = [pytest.param(RUNS[x], id=x, marks=pytest.mark.long) for x in ("7.2-amd64", "7.3-amd64", "686-pae")]


def answer_of(cli: Cli, kernel: RealKernel, dump: Path) -> tuple[int, dict[str, Any]]:
    done = cli.run("explain", kernel.image, "--memory", dump, "--modules", kernel.kernel.modules(), "--json")
    assert done.returncode in (0, 1), done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, answer


@pytest.mark.parametrize("run", [RUNS["6.12-amd64"], *LATER, MOVED, *COUNTED], ids=str)
def test_every_byte_of_every_module_has_a_cause(run: Run, real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    kernel = real_kernel(run.kernel)
    code, answer = answer_of(cli, kernel, dumped(run))
    wanted = [name for name, _ in Modules(kernel.kernel.modules()).with_dependencies(run.modules)]
    modules = answer["modules"]
    # The newest is first in the kernel's list.
    assert [m["name"] for m in reversed(modules)] == wanted
    assert len(modules) >= 10 or run not in RUNS.values()
    for m in modules:
        assert m["bytes"]["unexplained"] == 0, (m["name"], m["unexplained"][:3])
        assert m["bytes"]["total"] == sum(m["bytes"][k] for k in ("pristine", "explained", "unexplained")) > 0
        assert re.sub("-", "_", Path(m["file"]).name.split(".ko")[0]) == m["name"]
        assert m["address"] % 4096 == m["bytes"]["total"] % 4096 == 0
        assert m["state"] == "live"
    # A module whose functions can be traced has calls that became nops.
    assert sum("mcount" in m["by_cause"] for m in modules) > len(modules) // 2
    assert [n for n in answer["notes"] if n["finding"]] == []
    assert [r for r in answer["regions"] if not r["known"]] == []
    owned = [(r["address"], r["length"]) for r in answer["regions"] if r["kind"] == "module"]
    assert sorted(owned) == sorted((m["address"], m["bytes"]["total"]) for m in modules)
    assert code == (1 if answer["bytes"]["unexplained"] else 0)


@pytest.mark.parametrize("run", [RUNS["6.12-amd64"], *LATER[1:]], ids=str)
def test_flips_are_told_where_they_are(run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(run.kernel)
    dump = dumped(run)
    _, answer = answer_of(cli, kernel, dump)
    changed = tmp_path / "flipped.core"
    shutil.copyfile(dump, changed)
    chance = random.Random(11)
    places = flipped(chance, kernel, changed, [(m["address"], m["bytes"]["total"]) for m in answer["modules"]])
    code, after = answer_of(cli, kernel, changed)
    assert code == 1
    told = {
        u["address"] + i: (u["module"], bytes.fromhex(u["found"])[i])
        for m in after["modules"]
        for u in m["unexplained"]
        for i in range(u["length"])
    }
    names = [(m["address"], m["address"] + m["bytes"]["total"], m["name"]) for m in answer["modules"]]
    for address, value in places.items():
        owner = next(name for low, high, name in names if low <= address < high)
        assert told.get(address) == (owner, value), f"{address:#x} in {owner}"
    assert set(told) == set(places)
    assert sum(m["bytes"]["unexplained"] for m in after["modules"]) == FLIPS
    # The kernel's own text and the list of what it can execute are as before.
    assert after["bytes"] == answer["bytes"]
    assert after["regions"] == answer["regions"]


def flipped(chance: random.Random, kernel: RealKernel, dump: Path, texts: list[tuple[int, int]]) -> dict[int, int]:
    """Change bytes of modules' text in a dump, each by some bits; their addresses, and what they are now."""
    memory = Memory(dump)
    running = explain(open_image(kernel.image), memory).kernel
    assert running is not None
    assert running.running.tables is not None
    root, mode = running.running.tables
    weights = [size for _, size in texts]
    result: dict[int, int] = {}
    with dump.open("r+b") as file:
        while len(result) < FLIPS:
            start, size = chance.choices(texts, weights)[0]
            address = start + chance.randrange(size)
            physical = paging.walk(memory.read_physical, root, mode, address)
            assert physical is not None
            if address in result:
                continue
            region = next(r for r in memory.physical if r.start <= physical < r.start + r.size)
            file.seek(region.offset + physical - region.start)
            before = file.read(1)[0]
            result[address] = before ^ chance.randrange(1, 256)
            file.seek(-1, 1)
            file.write(bytes((result[address],)))
    memory.close()
    return result


def test_a_page_that_nobody_owns(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    """A module taken off the kernel's list, as one that hides itself does: its code is a region of nobody."""
    run = RUNS["6.12-amd64"]
    kernel = real_kernel(run.kernel)
    dump = dumped(run)
    _, answer = answer_of(cli, kernel, dump)
    hidden = tmp_path / "hidden.core"
    shutil.copyfile(dump, hidden)
    memory = Memory(dump)
    found = explain(open_image(kernel.image), memory).kernel
    assert found is not None
    running = found.running
    head = running.image.symbols.lookup("modules")
    assert head is not None
    first = running.read_running(head, 8)
    assert first is not None
    following = running.read_running(int.from_bytes(first, "little"), 8)
    assert following is not None
    with hidden.open("r+b") as file:
        write(file, running, head, following)
        write(file, running, int.from_bytes(following, "little") + 8, head.to_bytes(8, "little"))
    code, after = answer_of(cli, kernel, hidden)
    gone = answer["modules"][0]
    assert code == 1
    assert [m["name"] for m in after["modules"]] == [m["name"] for m in answer["modules"][1:]]
    unknown = [(n["address"], n["id"]) for n in after["notes"] if n["finding"]]
    assert unknown == [(gone["address"], "region-unknown")]
    assert [(r["address"], r["length"]) for r in after["regions"] if not r["known"]] == [
        (gone["address"], gone["bytes"]["total"])
    ]


def write(file: Any, running: Any, address: int, data: bytes) -> None:
    root, mode = running.tables
    physical = paging.walk(running.memory.read_physical, root, mode, address)
    assert physical is not None
    region = next(r for r in running.memory.physical if r.start <= physical < r.start + r.size)
    file.seek(region.offset + physical - region.start)
    file.write(data)


@pytest.mark.long
def test_files_of_another_build(real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    run = RUNS["7.3-amd64"]
    kernel, other = real_kernel(run.kernel), real_kernel("7.2-amd64")
    done = cli.run("explain", kernel.image, "--memory", dumped(run), "--modules", other.kernel.modules(), "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    named = {n["module"]: n["id"] for n in answer["notes"] if n["finding"]}
    for m in answer["modules"]:
        assert m["file"] is None
        assert m["bytes"]["unexplained"] == m["bytes"]["total"]
        assert named[m["name"]] in ("module-other-build", "module-no-file")
    assert answer["bytes"]["unexplained"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "6.12-amd64",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("7.2-amd64", "7.3-amd64", "7.3-cloud", "6.12-krunfw")),
    ],
)
def test_structures_are_those_that_bpftool_reads(name: str, real_kernel: Get) -> None:
    """Every member of every structure and union that has a name of its own: place, and width of bitfields."""
    program = shutil.which("bpftool", path="/usr/sbin:/usr/bin:/sbin")
    if program is None:
        pytest.skip("bpftool is not installed (Debian package bpftool)")
    kernel = real_kernel(name)
    image = open_image(kernel.image)
    types = read(image)
    if types is None:
        pytest.skip(f"{name} has no BTF")
    raw = subprocess.run(
        [program, "btf", "dump", "file", str(kernel.vmlinux.path)], capture_output=True, text=True, check=True
    ).stdout
    compared = sum(same_members(types, *one) for one in structures(raw))
    assert compared > 20_000


def structures(raw: str) -> Iterator[tuple[str, int, list[tuple[str, int, int]]]]:
    """Name, size and members (name, place and width in bits) of structures whose name only one has."""
    found: dict[str, list[tuple[int, list[tuple[str, int, int]]]]] = {}
    members: list[tuple[str, int, int]] = []
    for line in raw.splitlines():
        head = re.match(r"\[\d+\] (STRUCT|UNION) '([^']+)' size=(\d+)", line)
        row = re.match(r"\t'([^']+)' type_id=\d+ bits_offset=(\d+)(?: bitfield_size=(\d+))?", line)
        if head:
            members = []
            # (anon) stands for those without a name.
            if head[2] != "(anon)":
                found.setdefault(head[2], []).append((int(head[3]), members))
        elif row:
            members.append((row[1], int(row[2]), int(row[3] or 0)))
        elif line.startswith("["):
            members = []
    for name, rows in found.items():
        if len(rows) == 1:
            yield name, *rows[0]


def same_members(types: Btf, name: str, size: int, members: list[tuple[str, int, int]]) -> int:
    assert types.size(name) == size, name
    names = [n for n, _, _ in members]
    count = 0
    for member, bit, bits in members:
        if member == "(anon)" or names.count(member) > 1:
            continue
        found = types.field(name, member)
        assert found is not None, f"{name}.{member}"
        assert (found.bit, found.bits if bits else 0) == (bit, bits), f"{name}.{member}"
        assert found.offset == bit // 8
        count += 1
    return count
