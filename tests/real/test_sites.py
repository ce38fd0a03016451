"""`vmipatch scan` on real kernels against what GNU binutils and the kernel's own headers say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, RealKernel
from .tables import FAMILIES, Entry, entries
from .vmlinux import Vmlinux

Get = Callable[[str], RealKernel]

I386 = ("686", "686-pae", "5.10-686", "5.10-686-pae")
ALL = (*I386, "amd64", "5.10-amd64", "6.12-amd64")
# What the kernels of Debian 12 were measured to hold when this was written: a new package may differ by a few
# (the exact numbers are compared with readelf below), not by a tenth.
ROUGHLY = {
    "686": (264, 954, 8059),
    "686-pae": (265, 1040, 8128),
    "amd64": (3841, 4652, None),
}


@pytest.fixture(scope="module")
def scans(real_kernel: Get, cli: Cli) -> Callable[[str], dict[str, Any]]:
    """The scan of a kernel's bzImage, as JSON, once."""
    had: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        kernel = real_kernel(name)
        if name not in had:
            had[name] = cli.json("scan", kernel.image)
        return had[name]

    return get


def found_by(scan: dict[str, Any], family: str) -> list[Entry]:
    return [Entry(site["address"], site["length"]) for site in scan["sites"] if site["family"] == family]


def untyped(found: list[Entry]) -> list[Entry]:
    return [Entry(entry.address, entry.length) for entry in found]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ALL)
def test_every_site_is_found(name: str, family: str, real_kernel: Get, scans: Callable[[str], dict[str, Any]]) -> None:
    expected = untyped(entries(real_kernel(name).vmlinux, family, name))
    order = sorted(expected, key=lambda e: (e.address, e.length))
    assert sorted(found_by(scans(name), family), key=lambda e: (e.address, e.length)) == order
    assert scans(name)["findings"] == []


@pytest.mark.parametrize("name", ALL)
def test_padding_is_not_counted(name: str, real_kernel: Get, scans: Callable[[str], dict[str, Any]]) -> None:
    """The linker script fills the lock table's last page with zeros, which the kernel skips."""
    vmlinux = real_kernel(name).vmlinux
    expected = len(entries(vmlinux, "smp_locks", name))
    (table,) = (t for t in scans(name)["tables"] if t["family"] == "smp_locks")
    assert (table["count"], table["sites"]) == (expected, expected)
    assert table["padding"] == len(vmlinux.bytes_of(".smp_locks")) // 4 - expected
    assert {t["padding"] for t in scans(name)["tables"] if t["family"] != "smp_locks"} == {0}


@pytest.mark.parametrize("name", ROUGHLY)
def test_counts_are_those_of_the_packages(name: str, scans: Callable[[str], dict[str, Any]]) -> None:
    for family, known in zip(FAMILIES, ROUGHLY[name], strict=True):
        if known is not None:
            assert len(found_by(scans(name), family)) == pytest.approx(known, rel=0.1)


@pytest.mark.parametrize("name", ALL)
def test_bytes_and_sections_of_sites(name: str, real_kernel: Get, scans: Callable[[str], dict[str, Any]]) -> None:
    vmlinux = real_kernel(name).vmlinux
    for site in scans(name)["sites"]:
        section = vmlinux.sections[site["section"]]
        assert section.address <= site["address"] < section.end
        start = vmlinux.offset(site["address"])
        assert site["bytes"] == vmlinux.data[start : start + site["length"]].hex()
        assert site["address_hex"] == f"{site['address']:#x}"


@pytest.mark.parametrize("name", ALL)
def test_objdump_reads_an_instruction_of_the_family_at_every_site(
    name: str, real_kernel: Get, scans: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    vmlinux = real_kernel(name).vmlinux
    calls = found_by(scans(name), "parainstructions")
    # Each site cut out and padded with nops to a line of its own, so that one objdump reads them all.
    for index, text in enumerate(disassembled(vmlinux, calls, tmp_path)):
        # A jump where the kernel leaves for good: 5.10's x86-64 system call return.
        assert re.match(r"(call|jmp)[lq]?\s+\*", text), f"{calls[index]} holds {text}"
    for lock in found_by(scans(name), "smp_locks"):
        start = vmlinux.offset(lock.address)
        # `lock` stands first, or behind an operand-size prefix that the assembler put before it.
        assert vmlinux.data[start] == 0xF0 or vmlinux.data[start : start + 2] == b"\x66\xf0"


@pytest.mark.parametrize("name", I386)
def test_op_is_the_slot_that_the_site_reads(
    name: str, real_kernel: Get, scans: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """One op a slot, one slot an op; and the slot is the one that the entry's type byte counts to."""
    vmlinux = real_kernel(name).vmlinux
    table = entries(vmlinux, "parainstructions", name)
    base = vmlinux.exports["pv_ops"]
    named = {site["address"]: site["op"] for site in scans(name)["sites"] if site["family"] == "parainstructions"}
    ops: dict[int, str] = {}
    for entry, text in zip(table, disassembled(vmlinux, table, tmp_path), strict=True):
        operand = re.search(r"\*0x([0-9a-f]+)", text)
        assert operand is not None
        slot, rest = divmod(int(operand[1], 16) - base, 4)
        assert (slot, rest) == (entry.type, 0)
        assert ops.setdefault(slot, named[entry.address]) == named[entry.address]
    assert len(set(ops.values())) == len(ops)
    assert not any("unknown" in op for op in ops.values())


def test_a_bzimage_and_its_elf_give_the_same_sites(
    real_kernel: Get, scans: Callable[[str], dict[str, Any]], cli: Cli
) -> None:
    assert cli.json("scan", real_kernel("686-pae").elf)["sites"] == scans("686-pae")["sites"]


def disassembled(vmlinux: Vmlinux, sites: list[Entry], folder: Path) -> list[str]:
    """objdump's reading of the first instruction of every site, its length checked against the entry's."""
    if not sites:  # objdump refuses an empty file
        return []
    line = 16
    cut = b"".join(
        vmlinux.data[(start := vmlinux.offset(site.address)) : start + site.length].ljust(line, b"\x90")
        for site in sites
    )
    path = folder / "sites.bin"
    path.write_bytes(cut)
    machine = "i386" if vmlinux.bits == 32 else "i386:x86-64"
    out = subprocess.run(
        ["objdump", "-D", "-z", "-b", "binary", "-m", machine, "-w", path], check=True, capture_output=True, text=True
    ).stdout
    read = {int(at, 16): (raw, text) for at, raw, text in re.findall(r"^\s*(\w+):\t([^\t]+)\t(.*)$", out, re.M)}
    texts = []
    for index, site in enumerate(sites):
        raw, text = read[index * line]
        assert len(raw.split()) == site.length, f"{site}: objdump reads {text} of {len(raw.split())} bytes"
        texts.append(text)
    return texts
