"""Running kernels explained: every byte has a cause, and what is planted has none.

The oracle is the kernel itself under QEMU; what it was asked to switch on stands on its command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Cli, RealKernel
from .dumps import TRACED_686, TRACED_AMD64, Dumped, Run, explained, place_in, take, text_in

Get = Callable[[str], RealKernel]
Initrd = Callable[[int], Path]

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


@pytest.mark.parametrize(("run", "detour"), [(TRACED_686, 0x24), (TRACED_AMD64, 0x24)], ids=str)
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
