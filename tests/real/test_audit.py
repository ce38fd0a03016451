"""`vmipatch audit` on real kernels: every count against what objdump prints and what the tables' bytes say.

The stated rule for code: a linear sweep of every executable section, which in kernel text meets no data.
objdump's sweep of a stripped kernel begins at each section's start and nowhere else; the audit's begins anew at each
symbol of kallsyms.  Where both say the same of every address, text was swept rightly.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.audit.oracle import Covered, Expected, disassemble
from vmipatch.isa import sweep

from .conftest import Cli, RealKernel
from .tables import entries
from .vmlinux import Vmlinux

Get = Callable[[str], RealKernel]
NAMES = ("686", "686-pae", "amd64")
COPIED = (".altinstr_replacement",)  # copied into sites, never run where it stands


class Audited:
    """One kernel: what the audit says, and what the oracle does."""

    def __init__(self, name: str, kernel: RealKernel, cli: Cli) -> None:
        done = cli.run("audit", kernel.elf, "--json", "--fail-on", "never")
        assert done.returncode == 0, done.stderr
        import json

        self.found: dict[str, Any] = json.loads(done.stdout)
        self.kernel = kernel.vmlinux
        self.expected: Expected = disassemble(kernel.elf, self.kernel.bits, COPIED)
        self.paravirt = entries(self.kernel, "parainstructions", name)
        self.alternatives = entries(self.kernel, "altinstructions", name)
        self.locks = entries(self.kernel, "smp_locks", name)
        self.covered = Covered((e.address, e.length) for e in (*self.paravirt, *self.alternatives))

    def addresses(self, id: str) -> list[int]:
        return sorted(f["address"] for f in self.found["findings"] if f["id"] == id)


@pytest.fixture(scope="module")
def audited(real_kernel: Get, cli: Cli) -> Callable[[str], Audited]:
    had: dict[str, Audited] = {}

    def get(name: str) -> Audited:
        kernel = real_kernel(name)
        if name not in had:
            had[name] = Audited(name, kernel, cli)
        return had[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_sensitive_instructions_are_those_that_objdump_prints(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    for id, all_of in (
        ("sensitive-unannotated", one.expected.silent),
        ("privileged-unannotated", one.expected.traps),
    ):
        bare = sorted(a for a in all_of if a not in one.covered)
        print(f"{name}: {id}: {len(bare)} of objdump's {len(all_of)}, {len(all_of) - len(bare)} inside sites")
        assert one.addresses(id) == bare
        assert one.found["counts"][id] == len(bare)
        assert one.found["covered"][id] == len(all_of) - len(bare)
        assert len(bare) > 100, "so few cannot be right: the oracle is broken"


@pytest.mark.parametrize("name", NAMES)
def test_function_counts_add_up(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    for id in ("sensitive-unannotated", "privileged-unannotated"):
        functions = [f for f in one.found["functions"] if f["id"] == id]
        assert sum(f["count"] for f in functions) == one.found["counts"][id]
        assert all(sum(f["what"].values()) == f["count"] for f in functions)
        by_symbol = Counter((f["symbol"], f["section"]) for f in one.found["findings"] if f["id"] == id)
        assert {(f["symbol"], f["section"]): f["count"] for f in functions} == by_symbol


@pytest.mark.parametrize("name", NAMES)
def test_paravirt_slots_without_annotation(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    pv_ops, size = one.kernel.exports["pv_ops"], one.kernel.bits // 8
    words = max(e.type for e in one.paravirt if e.type is not None) + 1
    through = {a for a, slot in one.expected.slots.items() if pv_ops <= slot < pv_ops + words * size}
    bare = sorted(a for a in through if a not in one.covered)
    print(f"{name}: pv-slot-unannotated: {len(bare)} of objdump's {len(through)}")
    assert len(through) >= len({e.address for e in one.paravirt})
    assert one.addresses("pv-slot-unannotated") == bare
    assert one.found["covered"]["pv-slot-unannotated"] == len(through) - len(bare)


@pytest.mark.parametrize("name", NAMES)
def test_branches_into_sites(name: str, audited: Callable[[str], Audited]) -> None:
    """Of the sites that a table of the ELF names: alternatives, paravirt calls, retpolines, returns."""
    one = audited(name)
    sites = [*one.covered.sites]
    for section, length in ((".retpoline_sites", 5), (".return_sites", 5)):
        if section in one.kernel.sections:
            sites += [(a, length) for a in relative(one.kernel, section)]
    inward = Covered(sites).entered(one.expected.branches)
    print(f"{name}: branch-into-site: {len(inward)} of {len(one.expected.branches)} branches")
    assert one.addresses("branch-into-site") == sorted(inward)


@pytest.mark.parametrize("name", NAMES)
def test_every_branch_goes_where_objdump_says(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    bits, found = one.kernel.bits, set()
    for section in executable(one) - set(COPIED):
        data, base = one.kernel.bytes_of(section), one.kernel.sections[section].address
        everywhere = b"\1" * len(data)
        for stop in sweep.sweep(data, base, [0, len(data)], bits, {}, everywhere):
            if stop.what == sweep.BRANCH:
                found.add((base + stop.first, stop.target))
    print(f"{name}: {len(found)} branches, objdump {len(one.expected.branches)}")
    assert found == set(one.expected.branches)


@pytest.mark.parametrize("name", NAMES)
def test_exception_entries_in_sites(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    instructions = exception_instructions(one.kernel)
    sites = Covered([*one.covered.sites, *((e.address, 1) for e in one.locks)])
    inside = {a for a in instructions if any(a != start for start, _ in sites.holding(a))}
    at = {a for a in instructions if a in sites} - inside
    print(f"{name}: {len(instructions)} exception entries: {len(inside)} inside sites, {len(at)} at the start of one")
    families = ("parainstructions", "altinstructions", "smp_locks")
    for id, expected in (("extable-inside-site", inside), ("extable-at-site", at)):
        found = {f["address"] for f in one.found["findings"] if f["id"] == id and f["details"]["family"] in families}
        assert found == expected, id


@pytest.mark.parametrize("name", NAMES)
def test_sites_that_share_bytes(name: str, audited: Callable[[str], Audited]) -> None:
    """Clusters of paravirt calls, alternatives and locks, from the tables' bytes."""
    one = audited(name)
    spans = sorted((e.address, e.address + e.length) for e in (*one.paravirt, *one.alternatives, *one.locks))
    clusters: list[list[int]] = []
    for start, end in spans:
        if clusters and start < clusters[-1][1]:
            clusters[-1][1:] = [max(clusters[-1][1], end), clusters[-1][2] + 1]
        else:
            clusters.append([start, end, 1])
    expected = {(start, end - start): n for start, end, n in clusters if n > 1}
    ours = {"parainstructions", "altinstructions", "smp_locks"}
    shared = [f for f in one.found["findings"] if f["id"] in ("site-shared", "site-overlap")]
    found = {(f["address"], f["length"]): f["details"] for f in shared}
    print(f"{name}: site-shared: {len(expected)} of these tables, {len(found)} of all families")
    for place, count in expected.items():
        assert place in found
        assert found[place]["count"] >= count
    only = {place for place, details in found.items() if set(details["families"]) <= ours}
    assert only <= set(expected)
    # A paravirt call with an alternative over it: alternatives are the later pass in both 6.1 flavours.
    both = [d for d in found.values() if {"parainstructions", "altinstructions"} == set(d["families"])]
    assert all(d["winner"] == "altinstructions" for d in both)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_sound(name: str, audited: Callable[[str], Audited]) -> None:
    one = audited(name)
    counts = one.found["counts"]
    assert not any(counts[id] for id in counts if id.startswith(("table-", "entry-", "site-overlap", "site-not")))
    assert {s["section"] for s in one.found["swept"]} == executable(one)


@pytest.mark.parametrize("name", NAMES)
def test_speed_and_memory(name: str, real_kernel: Get, cli: Cli) -> None:
    """10 s and 400 MB are asked for; memory is measured where the system tells."""
    import subprocess
    import sys

    kernel = real_kernel(name)
    code = (
        "import resource, sys; from vmipatch.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "most = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(used.ru_utime, most, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "audit", str(kernel.elf), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, kib = done.stderr.split()[-2:]
    print(f"{name}: {float(seconds):.1f} s of user time, {int(kib) >> 10} MiB")
    assert float(seconds) <= 10
    assert int(kib) <= 400 * 1024


def relative(kernel: Vmlinux, section: str) -> list[int]:
    """The addresses that a table of self-relative 32-bit words names."""
    base, mask = kernel.sections[section].address, (1 << kernel.bits) - 1
    words = struct.iter_unpack("<i", kernel.bytes_of(section))
    return [(base + 4 * i + word) & mask for i, (word,) in enumerate(words)]


def exception_instructions(kernel: Vmlinux) -> set[int]:
    """struct exception_table_entry of 4.6 and later: three relative words, the instruction first."""
    base, mask = kernel.sections["__ex_table"].address, (1 << kernel.bits) - 1
    rows = struct.iter_unpack("<iii", kernel.bytes_of("__ex_table"))
    return {(base + 12 * i + row[0]) & mask for i, row in enumerate(rows)}


def executable(one: Audited) -> set[str]:
    import subprocess

    out = subprocess.run(["readelf", "-SW", one.kernel.path], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"^\s+\[\s*\d+\] (\S+)\s+PROGBITS\s+\w+ \w+ \w+ \w+\s+\S*AX", out, re.MULTILINE))
