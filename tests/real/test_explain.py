"""Running kernels explained: every byte has a cause, and what is planted has none.

The oracle is the kernel itself under QEMU; what it was asked to switch on stands on its command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corewriter import core

from .conftest import Cli, RealKernel
from .dumps import TRACED_686, TRACED_AMD64, Dumped, Run, explained, formats, offset_of_zero, text_in

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


SAME = ("text", "bytes", "by_cause", "states", "unexplained")


@pytest.mark.parametrize("run", [RUNS[0], RUNS[2], RUNS[9]], ids=str)
def test_every_form_of_a_dump_says_the_same(
    run: Run, real_kernel: Get, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """One moment of one machine: by physical addresses, by virtual ones, compressed, and raw."""
    kernel = real_kernel(run.kernel)
    dumps = formats(kernel, initrd, run, tmp_path)
    whole = explained(cli, kernel, dumps["core"])
    assert whole["bytes"]["unexplained"] == 0
    assert dumps["kdump"].stat().st_size < dumps["core"].stat().st_size // 3
    core_bytes = dumps["core"].read_bytes()
    raw = tmp_path / "raw"
    raw.write_bytes(core_bytes[offset_of_zero(core_bytes[:4096]) :])
    for dump, options in ((dumps["paged"], ()), (dumps["kdump"], ()), (raw, ("--base", "0"))):
        answer = explained(cli, kernel, dump, *options)
        assert {k: answer[k] for k in SAME} == {k: whole[k] for k in SAME}, dump


@pytest.mark.parametrize("run", [RUNS[0], RUNS[7]], ids=str)
def test_memory_as_kdump_and_kcore_lay_it_out(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """Segments with both addresses: the kernel's own and the direct mapping (kexec's vmcore); beside them terabytes of
    space for modules and vmalloc that has no physical address and next to no memory (/proc/kcore)."""
    kernel = real_kernel(run.kernel)
    bits, text = kernel.kernel.bits, kernel.vmlinux.text
    whole = explained(cli, kernel, dumped(run))
    data = dumped(run).read_bytes()
    memory = memoryview(data)[offset_of_zero(data[:4096]) :][: 96 << 20]
    # Documentation/arch/x86/x86_64/mm.rst; on i386 the direct mapping has the kernel in it.
    loads = [(0xC0000000 if bits == 32 else 0xFFFF888000000000, 0, memory)]
    if bits == 64:
        place = kernel.vmlinux.physical(text.address)
        loads.append((text.address, place, memory[place : place + (48 << 20)]))
    dump = tmp_path / "dump"
    dump.write_bytes(core(loads))
    answer = explained(cli, kernel, dump)
    assert {k: answer[k] for k in SAME} == {k: whole[k] for k in SAME}
    space = 0xF7C00000 if bits == 32 else 0xFFFFC90000000000
    kcore = core([*loads, (space, (1 << 64) - 1, b"")])
    row = 64 + 56 * (len(loads) + 1)
    sizes = (1 << 43).to_bytes(8, "little") * 2
    with dump.open("wb") as file:
        file.write(kcore[: row + 32] + sizes + kcore[row + 48 :])
        file.truncate(1 << 43)
    started = time.monotonic()
    answer = explained(cli, kernel, dump)
    assert {k: answer[k] for k in SAME} == {k: whole[k] for k in SAME}
    # The refusal searches too, and ends.
    done = cli.run("explain", real_kernel("686-pae").image, "--memory", dump)
    assert done.returncode == 2
    assert "another kernel" in done.stderr
    assert time.monotonic() - started < 60


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
