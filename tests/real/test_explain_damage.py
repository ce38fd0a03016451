"""What is planted in the memory of real kernels, and what remains when the evidence is taken away.

Where things are in the dumps, and what an instruction is, comes from the core, the ELF and GNU objdump.
"""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, RealKernel
from .dumps import (
    TRACED_686,
    TRACED_AMD64,
    Dumped,
    Run,
    explained,
    offset_of_zero,
    physical_of,
    place_in,
    text_in,
    unexplained_bytes,
)

Get = Callable[[str], RealKernel]

QUIET = (Run("686", "qemu32", 1), Run("amd64", "Nehalem", 2))
FLIPS, BATCHES = 10_000, 4
PLANTED = 1000


def legal_sites(cli: Cli, kernel: RealKernel, folder: Path) -> list[dict[str, Any]]:
    out = folder / "legal.json"
    done = cli.run("explain", kernel.image, "--legal", out)
    assert done.returncode == 0, done.stderr
    sites: list[dict[str, Any]] = json.loads(out.read_text())["sites"]
    return sites


def another_state(site: dict[str, Any], code: bytes) -> bool:
    """Whether the legal-patch set allows these bytes at the site."""
    if any(bytes.fromhex(s["bytes"]) == code for s in site["states"]):
        return True
    return bool(site["patterns"]) and code[0] in (0xE8, 0xE9)


@pytest.mark.parametrize("run", QUIET, ids=str)
def test_flipped_bytes_are_unexplained_where_they_are(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """10,000 random bytes of the text, each flipped by a random mask; 2,500 in a dump.

    A flipped byte that is not named must stand at a site that another legal state allows.
    """
    kernel = real_kernel(run.kernel)
    core = dumped(run).read_bytes()
    at, text = place_in(kernel, dumped(run)), kernel.vmlinux.text
    chosen = random.Random(2026)
    places = chosen.sample(range(text.size), FLIPS)
    damaged = tmp_path / "flipped.core"
    missed: dict[int, int] = {}
    for batch in range(BATCHES):
        flips = {place: chosen.randrange(1, 256) for place in places[batch::BATCHES]}
        changed = bytearray(core)
        for place, mask in flips.items():
            changed[at + place] ^= mask
        damaged.write_bytes(changed)
        answer = explained(cli, kernel, damaged, status=1)
        named = {address - text.address for address in unexplained_bytes(answer)}
        missed |= {place: mask for place, mask in flips.items() if place not in named}
        # Where a branch lost its opcode the rest of it is wrong too; nothing farther away is.
        assert all(any(byte - k in flips for k in range(-4, 5)) for byte in named - set(flips))
        assert answer["bytes"]["unexplained"] == len(named)
    print(f"{run}: {FLIPS - len(missed)} of {FLIPS} flipped bytes are unexplained at their address")
    assert len(missed) <= 5, [hex(text.address + place) for place in missed]
    sites = legal_sites(cli, kernel, tmp_path) if missed else []
    for place, mask in missed.items():
        (site,) = [s for s in sites if s["address"] <= text.address + place < s["address"] + s["length"]]
        start = at + site["address"] - text.address
        code = bytearray(core[start : start + site["length"]])
        code[text.address + place - site["address"]] ^= mask
        print(f"  {text.address + place:#x} became {code.hex()}, another legal state of {site['families']}")
        assert another_state(site, bytes(code))


def test_one_flipped_byte_is_the_only_one(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    run = QUIET[0]
    kernel = real_kernel(run.kernel)
    core = bytearray(dumped(run).read_bytes())
    at, text = place_in(kernel, dumped(run)), kernel.vmlinux.text
    chosen = random.Random(77)
    damaged = tmp_path / "flipped.core"
    for place in chosen.sample(range(text.size), 6):
        core[at + place] ^= 0x10
        damaged.write_bytes(core)
        answer = explained(cli, kernel, damaged, status=1)
        assert unexplained_bytes(answer) == {text.address + place}
        core[at + place] ^= 0x10


def instruction_starts(kernel: RealKernel, folder: Path, running: bytes) -> list[int]:
    """Offsets in the running text at which GNU objdump sees an instruction begin, in ten windows of 64 KiB."""
    raw = folder / "running"
    raw.write_bytes(running)
    mode = "i386" if kernel.kernel.bits == 32 else "i386:x86-64"
    starts = []
    for window in range(10):
        first = len(running) // 10 * window
        command = ["objdump", "-D", "-b", "binary", "-m", mode, f"--start-address={first}"]
        done = subprocess.run(
            [*command, f"--stop-address={first + (64 << 10)}", raw], text=True, capture_output=True, check=True
        )
        lines = re.findall(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(?!\(bad\)|int3)", done.stdout, re.MULTILINE)
        # The first instructions of a window may be out of step.
        starts += [int(line, 16) for line in lines[40:]]
    return starts


@pytest.mark.parametrize("run", QUIET, ids=str)
def test_breakpoints_that_nobody_owns_are_unexplained(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    kernel = real_kernel(run.kernel)
    core = bytearray(dumped(run).read_bytes())
    at, text = place_in(kernel, dumped(run)), kernel.vmlinux.text
    running = text_in(kernel, dumped(run))
    starts = [i for i in instruction_starts(kernel, tmp_path, running) if running[i] != 0xCC]
    planted = random.Random(4).sample(starts, PLANTED)
    for i in planted:
        core[at + i] = 0xCC
    damaged = tmp_path / "planted.core"
    damaged.write_bytes(core)
    answer = explained(cli, kernel, damaged, status=1)
    named = unexplained_bytes(answer)
    assert {text.address + i for i in planted} <= named
    assert not any(p["cause"] in ("kprobe", "optimised kprobe", "ftrace") for p in answer["proved"])
    hints = {u["address"]: u["hint"] or "" for u in answer["unexplained"]}
    assert all("INT3" in h or "static" in h for i in planted if (h := hints.get(text.address + i)) is not None)
    print(f"{run}: {PLANTED} of {PLANTED} planted breakpoints are unexplained")


@pytest.mark.parametrize("run", QUIET, ids=str)
def test_calls_that_no_record_accounts_for_are_unexplained(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """E8 at 1,000 mcount sites: to arbitrary addresses, to starts of functions, and half of all to ftrace's own."""
    kernel = real_kernel(run.kernel)
    core = bytearray(dumped(run).read_bytes())
    at, text = place_in(kernel, dumped(run)), kernel.vmlinux.text
    running, disk = text_in(kernel, dumped(run)), kernel.vmlinux.bytes_of(".text")
    nop = bytes.fromhex("3e8d742600" if kernel.kernel.bits == 32 else "0f1f440000")
    gone = {
        i: i + 5 + int.from_bytes(disk[i + 1 : i + 5], "little", signed=True)
        for i in range(0, len(running) - 5, 16)
        if running[i : i + 5] == nop and disk[i] == 0xE8
    }
    # What nearly all of them called on disk is __fentry__; the others are static calls.
    ftrace = Counter(gone.values()).most_common(1)[0][0]
    calls = [i for i, target in gone.items() if target == ftrace]
    chosen = random.Random(5)
    planted = chosen.sample(calls, PLANTED)
    for n, i in enumerate(planted):
        target = (chosen.randrange(-(1 << 31), 1 << 31), chosen.choice(calls) - i - 5, ftrace - i - 5)[min(n % 4, 2)]
        core[at + i : at + i + 5] = b"\xe8" + struct.pack("<i", target)
    damaged = tmp_path / "planted.core"
    damaged.write_bytes(core)
    answer = explained(cli, kernel, damaged, status=1)
    named = unexplained_bytes(answer)
    assert {text.address + i for i in planted} <= named
    assert named <= {text.address + i + k for i in planted for k in range(5)}
    assert not any(p["cause"] == "ftrace" for p in answer["proved"])
    assert all("ftrace" in (u["hint"] or "") for u in answer["unexplained"])
    print(f"{run}: {PLANTED} of {PLANTED} planted calls are unexplained")


@pytest.mark.parametrize("run", [TRACED_686, TRACED_AMD64], ids=str)
def test_without_its_evidence_nothing_is_named(
    run: Run, real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """The same memory with the kprobes' hash lists emptied, ftrace's records turned off, and a key reset."""
    kernel = real_kernel(run.kernel)
    bits, vmlinux = kernel.kernel.bits, kernel.vmlinux
    before = explained(cli, kernel, dumped(run))
    core = bytearray(dumped(run).read_bytes())
    zero = offset_of_zero(bytes(core[:4096]))

    def place(virtual: int) -> int:
        return zero + physical_of(vmlinux, bits, virtual)

    lost = set()
    quiet = explained(cli, kernel, dumped(Run(run.kernel, run.cpu, run.cpus)))
    usual = {p["address"] for p in quiet["proved"]}
    for proof in before["proved"]:
        if "kprobe" in proof["cause"]:
            head = re.search(r"hash list at (0x[0-9a-f]+)", proof["evidence"])
            assert head is not None
            start = place(int(head[1], 16))
            core[start : start + bits // 8] = bytes(bits // 8)
        elif proof["cause"] == "ftrace" and proof["offset"] == 0 and not proof["symbol"].endswith("_call"):
            flags = re.search(r"dyn_ftrace record \((0x[0-9a-f]+)\)", proof["evidence"])
            assert flags is not None
            word = struct.pack("<I" if bits == 32 else "<Q", proof["address"])
            record = word + struct.pack("<I", int(flags[1], 16))
            start = core.find(record)
            assert start > 0
            assert core.find(record, start + 1) < 0
            core[start + len(word) : start + len(word) + 4] = bytes(4)
        elif proof["cause"] == "static key" and proof["address"] not in usual:
            key = re.search(r" at (0x[0-9a-f]+) is (-?\d+)", proof["evidence"])
            assert key is not None
            start = place(int(key[1], 16))
            # Two branches of one key: the second finds it reset.
            assert int.from_bytes(core[start : start + 4], "little", signed=True) in (0, int(key[2]))
            core[start : start + 4] = bytes(4)
        else:
            continue
        lost.add((proof["cause"], proof["address"]))
    assert {cause for cause, _ in lost} == {"kprobe", "optimised kprobe", "ftrace", "static key"}
    bare = tmp_path / "bare.core"
    bare.write_bytes(core)
    after = explained(cli, kernel, bare, status=1)
    still = {(p["cause"], p["address"]) for p in after["proved"]}
    assert not lost & still
    hints = {u["address"]: u["hint"] or "" for u in after["unexplained"]}
    for cause, address in sorted(lost):
        near = [hint for start, hint in hints.items() if address <= start < address + 5]
        assert near, f"{cause} at {address:#x} is still explained"
        sign = {"static key": "static key", "ftrace": "ftrace", "kprobe": "INT3", "optimised kprobe": "jump"}[cause]
        assert any(sign in hint or "kprobe" in hint for hint in near), (cause, near)
    print(f"{run}: {len(lost)} sites named on evidence, none without it: {sorted({c for c, _ in lost})}")
