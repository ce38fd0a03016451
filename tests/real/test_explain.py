"""Running kernels explained: every byte has a cause, and what is planted has none.

The oracle is the kernel itself under QEMU; what it was asked to switch on stands on its command line.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.corewriter import core

from . import livepatch
from .conftest import Cli, RealKernel
from .dumps import (
    QUICK,
    TRACED_686,
    TRACED_AMD64,
    TRACING_7,
    Dumped,
    Run,
    explained,
    formats,
    offset_of_zero,
    place_of,
    text_in,
)
from .kernels import KERNELS

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


# The kernels of today, each on each of these CPUs: with SRSO, with retpolines or IBRS, with and without eIBRS, with
# Indirect Target Selection, and all that TCG can do.
CPUS = ("EPYC-Milan", "Skylake-Client", "Skylake-Server", "Icelake-Server", "max")
# Which of a kernel's variants `./dev real` runs; the others are left to `./dev real --all`.
CHOSEN = {
    "6.5-686-pae": ("Skylake-Client", "kaslr"),
    "6.12-amd64": ("EPYC-Milan",),
    "6.12-cloud": ("Skylake-Client", "off", "two", "counted-unmoved"),
    "6.12-krunfw": ("EPYC-Milan", "Icelake-Server"),
    "6.12-rt": (),
    "6.18-alpine": ("EPYC-Milan", "Icelake-Server", "two"),
    "7.2-amd64": ("Skylake-Server",),
    "7.2-cloud": ("EPYC-Milan", "kaslr", "off", "counted", "its"),
    "7.3-amd64": ("EPYC-Milan",),
    "7.3-cloud": ("Skylake-Client", "Icelake-Server", "max", "two", "off", "tests", "counted-unmoved", "its-unmoved"),
}


def variants(kernel: str) -> dict[str, Run]:
    """A kernel's boots by name: its CPUs, KASLR on one CPU and on two, mitigations off, ciphers tested."""
    boots = {cpu: Run(kernel, cpu, 1, append=QUICK) for cpu in CPUS}
    if KERNELS[kernel].movable:
        boots["kaslr"] = Run(kernel, "Skylake-Client", 1, True, QUICK)
    boots["two"] = Run(kernel, "EPYC-Milan", 2, KERNELS[kernel].movable, QUICK)
    boots["off"] = Run(kernel, "EPYC-Milan", 1, append=f"mitigations=off {QUICK}")
    if KERNELS[kernel].bits == 64:
        # Call depth tracking, where the kernel has it (6.2 on).
        counted = f"retbleed=stuff spectre_v2=retpoline {QUICK}"
        boots["counted"] = Run(kernel, "Skylake-Server", 1, KERNELS[kernel].movable, counted)
        # A CPU that keeps its indirect branches and is struck by Indirect Target Selection (setcpuid=: 6.15 on).
        boots["its"] = Run(kernel, "Icelake-Server", 1, KERNELS[kernel].movable, f"setcpuid=ibrs_enhanced {QUICK}")
        boots["its-unmoved"] = Run(kernel, "Icelake-Server", 1, append=f"setcpuid=ibrs_enhanced {QUICK}")
        boots["counted-unmoved"] = Run(kernel, "Skylake-Server", 1, append=counted)
    boots["tests"] = Run(kernel, "Skylake-Client", 1)
    return boots


# A kernel that nothing moves has some of them twice.
TODAY = tuple(
    dict.fromkeys(
        dataclasses.replace(run, long=name not in chosen)
        for kernel, chosen in CHOSEN.items()
        for name, run in variants(kernel).items()
    )
)


def moved_as_told(run: Run, slide: int) -> None:
    """Without KASLR the kernel is where it was linked; with it, one boot in some hundred chooses that place too."""
    if run.kaslr and not slide:
        print(f"{run}: KASLR left the kernel where it was linked")
    assert run.kaslr or not slide


@pytest.mark.parametrize("run", [*RUNS, *TODAY], ids=str)
def test_no_byte_of_a_running_kernel_is_unexplained(run: Run, real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    kernel = real_kernel(run.kernel)
    answer = explained(cli, kernel, dumped(run))
    assert answer["unexplained"] == []
    counted = answer["bytes"]
    assert counted["unexplained"] == 0
    if kernel.vmlinux.sections:
        assert counted["total"] == kernel.vmlinux.text.size
    assert counted["pristine"] + counted["explained"] == counted["total"] > 6_000_000
    moved_as_told(run, answer["text"]["slide"])
    # The kernel did rewrite itself: this is no comparison of two untouched texts.
    assert counted["explained"] > 100_000
    if kernel.kernel.bits == 64 and ("mitigations=off" in run.append or "lfence" in run.append):
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


TRACED = (
    (TRACED_686, Run("686", "qemu32", 1), 0x24, 0),
    (TRACED_AMD64, Run("amd64", "qemu64", 1), 0x24, 0),
    *(
        (Run(kernel, "Skylake-Client", 1, append=f"{TRACING_7} {QUICK}"), variants(kernel)["Skylake-Client"], 0x10, 4)
        for kernel in ("7.2-cloud", "7.3-cloud")
    ),
)


@pytest.mark.parametrize(("run", "quiet", "detour", "entry"), TRACED, ids=str)
def test_tracing_and_probing_are_named_on_evidence(
    run: Run, quiet: Run, detour: int, entry: int, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """``detour`` is where an optimised kprobe stands in vfs_read, ``entry`` where a function calls ftrace: behind the
    ENDBR of kernels that have it."""
    kernel = real_kernel(run.kernel)
    answer = explained(cli, kernel, dumped(run))
    assert answer["bytes"]["unexplained"] == 0
    proved = {(p["cause"], p["symbol"], p["offset"]) for p in answer["proved"]}
    assert {("ftrace", "vfs_write", entry), ("ftrace", "ksys_read", entry), ("ftrace", "ftrace_call", 0)} <= proved
    assert ("optimised kprobe", "vfs_read", detour) in proved
    assert any(cause == "kprobe" and symbol == "vfs_read" for cause, symbol, _ in proved)
    # The event's static key: sched_switch's tracepoint is tested in __schedule.
    keys = {p["symbol"] for p in answer["proved"] if p["cause"] == "static key"}
    before = {p["symbol"] for p in explained(cli, kernel, dumped(quiet))["proved"] if p["cause"] == "static key"}
    assert keys - before
    # The same text without the memory that proves it.
    text = tmp_path / "text"
    text.write_bytes(text_in(kernel, dumped(run)))
    alone = explained(cli, kernel, text, "--base", hex(kernel.vmlinux.text.address), status=1)
    unproved = {(u["symbol"], u["hint"] is not None) for u in alone["unexplained"]}
    assert {("vfs_write", True), ("ksys_read", True), ("vfs_read", True)} <= unproved


@pytest.mark.parametrize("kernel_name", ["7.2-cloud", "7.3-cloud"])
def test_a_live_patched_function_is_named_on_evidence(
    kernel_name: str, real_kernel: Get, dumped: Dumped, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """The function's ftrace site calls the live patch's handler: a detour that the dump's own ftrace_ops own."""
    kernel = real_kernel(kernel_name)
    quiet = variants(kernel_name)["Skylake-Client"]
    run = dataclasses.replace(quiet, livepatch="cmdline_proc_show")
    core = dumped(run)
    (tmp_path / f"{livepatch.NAME}.ko").write_bytes(livepatch.build(kernel.kernel, run.livepatch, tmp_path))
    answer = explained(cli, kernel, core, "--modules", tmp_path)
    assert answer["bytes"]["unexplained"] == 0
    assert [(m["name"], m["bytes"]["unexplained"]) for m in answer["modules"]] == [(livepatch.NAME, 0)]
    site = ("ftrace", "cmdline_proc_show", 4)
    assert site in {(p["cause"], p["symbol"], p["offset"]) for p in answer["proved"]}
    before = explained(cli, kernel, dumped(quiet))
    assert site not in {(p["cause"], p["symbol"], p["offset"]) for p in before["proved"]}


class Legal:
    """A kernel's legal set as a guard would use it: offset in the text to the sites that cover it."""

    def __init__(self, kernel: RealKernel, sites: list[dict[str, Any]]) -> None:
        self.disk = kernel.vmlinux.bytes_of(".text")
        self.base = kernel.vmlinux.text.address
        self.fields = moving(kernel)
        self.sites: list[dict[str, Any]] = []
        self.at: dict[int, list[int]] = {}
        for site in sites:
            start, length = site["address"] - self.base, site["length"]
            if not 0 <= start <= len(self.disk) - length:
                continue
            for offset in range(start, start + length):
                self.at.setdefault(offset, []).append(len(self.sites))
            self.sites.append(site)

    def moved(self, slide: int) -> bytes:
        """The text of the file as KASLR moves it."""
        text = bytearray(self.disk)
        for address, width, sign in self.fields:
            at = address - self.base
            if 0 <= at <= len(text) - width:
                value = int.from_bytes(text[at : at + width], "little") + sign * slide
                text[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        return bytes(text)

    def slide(self, text: bytes) -> int:
        """How far KASLR has moved a running text: what most of the fields that it moves say."""
        votes: Counter[int] = Counter()
        for address, width, sign in self.fields:
            at = address - self.base
            if sign > 0 and width == 4 and 0 <= at <= len(text) - 4:
                old, new = (int.from_bytes(x[at : at + 4], "little") for x in (self.disk, text))
                votes[(new - old) % (1 << 32)] += 1
        return votes.most_common(1)[0][0]

    def why(self, text: bytes | bytearray, site: dict[str, Any], slide: int = 0) -> str | None:
        """The state or the pattern by which the bytes at a site are legal; None where they are not."""
        start, length = site["address"] - self.base, site["length"]
        now = bytes(text[start : start + length])
        target = range(length - 4, length)
        for state in site["states"]:
            if equal(now, at_slide(state, slide), state.get("free", ())):
                return "a state"
        for pattern in site["patterns"]:
            # A static call may go to any function of its kind: its opcode is all that a set can say.
            if pattern == "static-call" and (
                now[0] in (0xE8, 0xE9) or (now[0] == 0x0F and now[:2] == self.disk[start:][:2])
            ):
                return pattern
            if pattern in ("ftrace-call", "ftrace-callback") and now[0] == 0xE8:
                return pattern
            if pattern == "runtime-const":
                return pattern
            # A branch to a thunk that was made while booting keeps its kind.
            if pattern == "its-thunk" and any(equal(now, at_slide(s, slide), target) for s in site["states"]):
                return pattern
        return None

    def allows(self, text: bytes | bytearray, offset: int, moved: bytes, slide: int = 0) -> bool:
        """Whether the byte at this offset may be as it is in `text`: as in ``moved`` (the file), or part of a state."""
        covering = self.at.get(offset)
        if covering is None:
            return text[offset] == moved[offset]
        return all(self.why(text, self.sites[index], slide) for index in covering)


def equal(now: bytes, legal: bytes, free: Iterable[int]) -> bool:
    """Whether bytes are the same, but for the offsets that are free."""
    return now == legal or (
        len(now) == len(legal) and all(a == b or i in free for i, (a, b) in enumerate(zip(now, legal, strict=True)))
    )


def at_slide(state: dict[str, Any], slide: int) -> bytes:
    """A state's bytes in a kernel that was moved."""
    code = bytearray.fromhex(state["bytes"])
    for move in state.get("moves", ()) if slide else ():
        at, width = move["offset"], move["width"]
        value = int.from_bytes(code[at : at + width], "little") + (slide if move["plus"] else -slide)
        code[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(code)


def moving(kernel: RealKernel) -> list[tuple[int, int, int]]:
    """Address, width and sign of each field that KASLR moves, from the table behind the ELF.

    arch/x86/tools/relocs.c (emit_relocs): a zero, the 64-bit fields, a zero, up to 6.14 the inverse 32-bit ones and a
    zero, and the 32-bit ones; each as the low half of its address.  Of a 32-bit kernel a zero and the last.
    """
    bits = kernel.kernel.bits
    data = kernel.elf.read_bytes()
    words = struct.unpack(f"<{len(data) // 4}i", data[len(data) % 4 :])
    parts: list[list[int]] = [[]]
    for word in reversed(words):
        if word == 0:
            parts.append([])
            if len(parts) > (3 if bits == 64 else 1):
                break
        elif -0x80000000 <= word < 0:
            parts[-1].append(word + (1 << bits))
        else:
            break
    lists = [part for part in parts if part]
    kinds = {1: ((4, 1),), 2: ((4, 1), (8, 1)), 3: ((4, 1), (4, -1), (8, 1))}[len(lists)]
    return [(address, *kind) for part, kind in zip(lists, kinds, strict=True) for address in part]


@pytest.fixture(scope="module")
def legal(real_kernel: Get, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Legal]:
    """The legal set of a kernel; the last one asked for is kept."""
    had: dict[str, Legal] = {}

    def get(name: str) -> Legal:
        if name not in had:
            had.clear()
            kernel, out = real_kernel(name), tmp_path_factory.mktemp("legal") / "legal.json"
            done = cli.run("explain", kernel.image, "--legal", out)
            assert done.returncode == 0, done.stderr
            had[name] = Legal(kernel, json.loads(out.read_text())["sites"])
            out.unlink()
        return had[name]

    return get


GUARDED = [run for run in TODAY if KERNELS[run.kernel].board == "pc"]
# A set of today's kernels has a hundred megabytes: `./dev real` takes these, on the boots that it makes anyway.
QUICKLY = ("6.12-cloud", "7.2-cloud", "7.3-cloud")
FLIPS = 1000


def guarded(run: Run) -> object:
    """A run as a parameter; `./dev real --all` has all."""
    marks = [] if run.kernel in QUICKLY and not run.long else [pytest.mark.long]
    return pytest.param(dataclasses.replace(run, long=False), id=str(run), marks=marks)


def running(kernel: RealKernel, core: Path) -> bytes:
    """The running text in a core, wherever the kernel is in it."""
    memory = core.read_bytes()
    memory = memory[offset_of_zero(memory[:4096]) :]
    place = place_of(kernel.vmlinux, memory)
    return memory[place : place + kernel.vmlinux.text.size]


@pytest.mark.parametrize("run", [RUNS[1], RUNS[7], RUNS[9], RUNS[10], RUNS[11], *map(guarded, GUARDED)], ids=str)
def test_every_running_site_is_in_the_legal_set(
    run: Run, real_kernel: Get, dumped: Dumped, legal: Callable[[str], Legal]
) -> None:
    """Every byte of the text is that of the file, as far as KASLR has moved it, or part of a state of its site."""
    guard, text = legal(run.kernel), running(real_kernel(run.kernel), dumped(run))
    slide = guard.slide(text)
    moved_as_told(run, slide)
    moved = guard.moved(slide)
    sites = [site for site in guard.sites if guard.why(text, site, slide) is None]
    assert [(site["address_hex"], site["families"]) for site in sites][:20] == []
    places = [at for at in range(len(text)) if text[at] != moved[at] and at not in guard.at]
    assert [hex(guard.base + at) for at in places][:20] == []


@pytest.mark.parametrize("kernel_name", QUICKLY)
def test_a_guard_of_the_legal_set_rejects_flips(
    kernel_name: str, real_kernel: Get, dumped: Dumped, legal: Callable[[str], Legal]
) -> None:
    """Random bytes of a running text, each changed alone, until 1,000 were rejected.

    What passes is another state, or stands where a pattern says that anything may stand; it is printed, and rare.
    """
    guard = legal(kernel_name)
    run = next(run for run in GUARDED if run.kernel == kernel_name and not run.long and not run.kaslr)
    text = bytearray(running(real_kernel(kernel_name), dumped(run)))
    chosen = random.Random(1106)
    rejected = 0
    passed: list[tuple[str, str, str, set[str | None]]] = []
    while rejected < FLIPS:
        at, mask = chosen.randrange(len(text)), chosen.randrange(1, 256)
        assert guard.allows(text, at, guard.disk), hex(at)
        text[at] ^= mask
        if guard.allows(text, at, guard.disk):
            sites = [guard.sites[index] for index in guard.at[at]]
            why = {guard.why(text, site) for site in sites}
            passed.append((hex(guard.base + at), f"{mask:#x}", str([s["families"] for s in sites]), why))
        else:
            rejected += 1
        text[at] ^= mask
    for flip in passed:
        print(*flip)
    assert all(None not in why for *_, why in passed)
    assert len(passed) <= FLIPS // 50
