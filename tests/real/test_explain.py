"""Running kernels explained: every byte has a cause, and what is planted has none.

The oracle is the kernel itself under QEMU; what it was asked to switch on stands on its command line.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, RealKernel
from .initramfs import REACHED
from .qemu import Machine, boot

Get = Callable[[str], RealKernel]
Initrd = Callable[[int], Path]

TRACING = (
    "trace_event=sched:sched_switch ftrace=function ftrace_filter=vfs_write,ksys_read "
    "kprobe_event=p:pa,vfs_read+0x24;p:pb,vfs_write;p:pc,vfs_read+"
)
# A conditional jump of vfs_read, which cannot be optimised: where it is, objdump says of each kernel.


@dataclass(frozen=True)
class Run:
    """A boot: kernel, CPU model, number of CPUs, and whether KASLR may move the kernel."""

    kernel: str
    cpu: str
    cpus: int
    kaslr: bool = False
    append: str = ""

    def __str__(self) -> str:
        return f"{self.kernel}-{self.cpu}-{self.cpus}{'-kaslr' if self.kaslr else ''}{'-more' if self.append else ''}"


RUNS = (
    Run("686", "qemu32", 1),
    Run("686", "Nehalem", 1),
    Run("686", "qemu32", 1, True),
    Run("686-pae", "qemu32", 1),
    Run("686-pae", "Nehalem", 2),
    Run("686-pae", "Nehalem", 2, True),
    Run("amd64", "qemu64", 1),
    Run("amd64", "Nehalem", 2),
    Run("amd64", "EPYC", 1),
    Run("amd64", "qemu64", 1, True),
    Run("amd64", "qemu64", 1, False, "mitigations=off"),
    Run("amd64", "Nehalem", 1, False, "spectre_v2=retpoline,lfence"),
    Run("6.12-amd64", "Nehalem", 2, True),
    Run("6.12-amd64", "qemu64", 1, False, "mitigations=off"),
    Run("5.10-686", "qemu32", 1),
    Run("5.10-amd64", "Nehalem", 1),
)

Dumped = Callable[[Run], Path]


@pytest.fixture(scope="module")
def dumped(real_kernel: Get, initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    """The memory of a boot as an ELF core, taken once."""
    folder = tmp_path_factory.mktemp("dumps")
    had: dict[Run, Path] = {}

    def get(run: Run) -> Path:
        if run not in had:
            target = folder / f"{len(had)}.core"
            take(real_kernel(run.kernel), initrd, run, target)
            had[run] = target
        return had[run]

    return get


def take(kernel: RealKernel, initrd: Initrd, run: Run, target: Path, *, paging: bool = False) -> None:
    bits = kernel.kernel.bits
    memory = 128 if bits == 32 else 256
    machine = Machine(kernel.image, initrd(bits), bits, run.cpu, run.cpus, run.append, memory=memory, kaslr=run.kaslr)
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        text = kernel.vmlinux.text
        if run.kaslr:
            # Where it is nobody here knows: two seconds are what settling takes elsewhere.
            time.sleep(2)
            guest.stop()
        else:
            guest.settled(kernel.vmlinux.physical(text.address), text.size)
        guest.dump(target, paging=paging)


def explained(cli: Cli, kernel: RealKernel, dump: Path, *options: object, status: int = 0) -> dict[str, Any]:
    done = cli.run("explain", kernel.image, "--memory", dump, "--json", *options)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_no_byte_of_a_running_kernel_is_unexplained(run: Run, real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    kernel = real_kernel(run.kernel)
    answer = explained(cli, kernel, dumped(run))
    assert answer["unexplained"] == []
    counted = answer["bytes"]
    assert counted["unexplained"] == 0
    assert counted["total"] == kernel.vmlinux.text.size
    assert counted["pristine"] + counted["explained"] == counted["total"]
    assert (answer["text"]["slide"] != 0) == run.kaslr
    # The kernel did rewrite itself: this is no comparison of two untouched texts.
    assert counted["explained"] > 100_000
    if run.append:
        assert answer["by_cause"]["retpoline_sites"] > 10_000


def test_explained_bytes_are_those_that_differ(real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    """Pristine and explained are counted here once more, from the core and the ELF, without the code under test."""
    run = RUNS[1]
    kernel = real_kernel(run.kernel)
    answer = explained(cli, kernel, dumped(run))
    disk, now = kernel.vmlinux.bytes_of(".text"), text_in(kernel, dumped(run))
    assert answer["bytes"]["explained"] == sum(a != b for a, b in zip(disk, now, strict=True))


def place_in(kernel: RealKernel, core: Path) -> int:
    """The offset of the text in a core of QEMU's: the first PT_LOAD begins at physical 0."""
    head = core.read_bytes()[:512]
    offset = int.from_bytes(head[32:40], "little")
    for at in range(offset, offset + 56 * 8, 56):
        kind, start = int.from_bytes(head[at : at + 4], "little"), int.from_bytes(head[at + 24 : at + 32], "little")
        if kind == 1 and start == 0:
            return int.from_bytes(head[at + 8 : at + 16], "little") + kernel.vmlinux.physical(
                kernel.vmlinux.text.address
            )
    raise AssertionError("the core has no segment at physical 0")


def text_in(kernel: RealKernel, core: Path) -> bytes:
    at = place_in(kernel, core)
    return core.read_bytes()[at : at + kernel.vmlinux.text.size]


def test_virtual_dumps_and_raw_dumps_agree(
    real_kernel: Get, initrd: Initrd, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    run = RUNS[0]
    kernel = real_kernel(run.kernel)
    physical = explained(cli, kernel, dumped(run))
    paged = tmp_path / "paged.core"
    take(kernel, initrd, run, paged, paging=True)
    assert explained(cli, kernel, paged)["by_cause"] == physical["by_cause"]
    core = dumped(run).read_bytes()
    at = place_in(kernel, dumped(run))
    start = kernel.vmlinux.physical(kernel.vmlinux.text.address)
    raw = tmp_path / "raw"
    raw.write_bytes(core[at - start : at + (96 << 20)])
    for base in (0, 0xC0000000):
        assert explained(cli, kernel, raw, "--base", hex(base))["by_cause"] == physical["by_cause"]


@pytest.mark.parametrize(
    ("run", "detour"),
    [
        (Run("686", "qemu32", 1, append=TRACING + "0x2c"), 0x24),
        (Run("amd64", "qemu64", 1, append=TRACING + "0x2b"), 0x24),
    ],
    ids=str,
)  # fmt: skip
def test_tracing_and_probing_are_named_on_evidence(
    run: Run, detour: int, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    kernel = real_kernel(run.kernel)
    answer = explained(cli, kernel, dumped(run))
    assert answer["bytes"]["unexplained"] == 0
    proved = {(p["cause"], p["symbol"], p["offset"]) for p in answer["proved"]}
    assert {("ftrace", "vfs_write", 0), ("ftrace", "ksys_read", 0), ("ftrace", "ftrace_call", 0)} <= proved
    assert ("optimised kprobe", "vfs_read", detour) in proved
    assert any(cause == "kprobe" and symbol == "vfs_read" for cause, symbol, _ in proved)
    # The event's static key: sched_switch's tracepoint is tested in __schedule.
    keys = {p["symbol"] for p in answer["proved"] if p["cause"] == "static key"}
    quiet = Run(run.kernel, run.cpu, run.cpus)
    before = {p["symbol"] for p in explained(cli, kernel, dumped(quiet))["proved"] if p["cause"] == "static key"}
    assert keys - before
    # The same text without the memory that proves it.
    text = tmp_path / "text"
    text.write_bytes(text_in(kernel, dumped(run)))
    alone = explained(cli, kernel, text, "--base", hex(kernel.vmlinux.text.address), status=1)
    unproved = {(u["symbol"], u["hint"] is not None) for u in alone["unexplained"]}
    assert {("vfs_write", True), ("ksys_read", True), ("vfs_read", True)} <= unproved


def test_flipped_bytes_are_unexplained_where_they_are(
    real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """10,000 random bytes, each flipped; a hundred at a time so that none lies beside another."""
    run = RUNS[0]
    kernel = real_kernel(run.kernel)
    core = bytearray(dumped(run).read_bytes())
    at = place_in(kernel, dumped(run))
    chosen = random.Random(9)
    size = kernel.vmlinux.text.size
    places = chosen.sample(range(size // 2), 10_000)
    flips = {2 * p: chosen.randrange(1, 256) for p in places}
    for place, mask in flips.items():
        core[at + place] ^= mask
    damaged = tmp_path / "flipped.core"
    damaged.write_bytes(core)
    answer = explained(cli, kernel, damaged, status=1)
    base = kernel.vmlinux.text.address
    named = {u["address"] - base + i for u in answer["unexplained"] for i in range(u["length"])}
    missed = sorted(set(flips) - named)
    print(f"{len(missed)} of {len(flips)} flipped bytes fell on what another legal state allows")
    assert len(missed) <= 5, [hex(base + m) for m in missed]
    assert answer["bytes"]["unexplained"] <= len(flips)


def test_planted_breakpoints_and_calls_are_unexplained(
    real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    run = RUNS[0]
    kernel = real_kernel(run.kernel)
    core = bytearray(dumped(run).read_bytes())
    at, base = place_in(kernel, dumped(run)), kernel.vmlinux.text.address
    text = text_in(kernel, dumped(run))
    disk = kernel.vmlinux.bytes_of(".text")
    nop = bytes.fromhex("3e8d742600")
    calls = [i for i in range(0, len(text) - 5, 16) if text[i : i + 5] == nop and disk[i] == 0xE8]
    chosen = random.Random(4)
    planted = chosen.sample(calls, 2000)
    for i in planted[:1000]:
        core[at + i : at + i + 5] = b"\xe8" + chosen.randbytes(4)
    # push ebp follows the call at the start of most functions: an instruction start if there ever was one.
    starts = [i + 5 for i in planted[1000:] if text[i + 5] == 0x55]
    for i in starts:
        core[at + i] = 0xCC
    damaged = tmp_path / "planted.core"
    damaged.write_bytes(core)
    answer = explained(cli, kernel, damaged, status=1)
    named = {u["address"] - base + i for u in answer["unexplained"] for i in range(u["length"])}
    assert set(planted[:1000]) <= named
    assert set(starts) <= named
    assert len(starts) > 500
    hints = {u["address"] - base: u["hint"] for u in answer["unexplained"]}
    assert all("ftrace" in hints[i] for i in planted[:1000] if i in hints)
    assert all("INT3" in hints[i] for i in starts if i in hints)


def test_memory_of_another_kernel(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    ours, theirs = real_kernel("686"), real_kernel("686-pae")
    done = cli.run("explain", theirs.image, "--memory", dumped(RUNS[0]), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "banner" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    cut = tmp_path / "cut"
    cut.write_bytes(dumped(RUNS[0]).read_bytes()[: 20 << 20])
    done = cli.run("explain", ours.image, "--memory", cut)
    assert done.returncode == 2
    assert "cut short" in done.stderr


@pytest.mark.parametrize("run", [RUNS[1], RUNS[7], RUNS[10], RUNS[11]], ids=str)
def test_every_running_site_is_in_the_legal_set(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    kernel = real_kernel(run.kernel)
    out = tmp_path / "legal.json"
    done = cli.run("explain", kernel.image, "--legal", out)
    assert done.returncode == 0, done.stderr
    base = kernel.vmlinux.text.address
    text, disk = text_in(kernel, dumped(run)), kernel.vmlinux.bytes_of(".text")
    covered = bytearray(len(text))
    for site in json.loads(out.read_text())["sites"]:
        at = site["address"] - base
        now = text[at : at + site["length"]]
        covered[at : at + site["length"]] = b"\1" * site["length"]
        allowed = {bytes.fromhex(s["bytes"]) for s in site["states"]}
        calls = "static-call" in site["patterns"] and now[0] in (0xE8, 0xE9)
        assert now in allowed or calls, (site["address_hex"], now.hex())
    outside = [i for i in range(len(text)) if text[i] != disk[i] and not covered[i]]
    assert outside == []
