"""The emulator's rows: loops on every emulator at hand, a real kernel's boot beside QEMU's, starting, restoring.

May import emulators and guests (this folder) and tests.real, which fetches the kernel by package name.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emulators
import guests
from emulators import PYTHON, ROOT, Failed, environment

TURNS = (10_000_000, 10_000_000, 3_000_000, 3_000_000, 2000)
KERNEL = "686-pae"
UNCOMPILED_BOOT = 3_000_000  # instructions of the boot that the uncompiled engine does
# QEMU's model without what ours has not got: the kernel takes the same ways.
SAME_CPU = "pentium3,-sse,-vme,-mtrr,-mca,-mmx,-mce,-hypervisor"


def table(runs: int, folder: Path) -> None:
    """Print everything."""
    there = [emulator for emulator in emulators.EMULATORS if emulator.there()]
    loops(there)
    kernel = kernel_elf(folder)
    if kernel is None:
        return
    from tests.real import initramfs

    initrd = initramfs.write(folder)
    boots(kernel, initrd, runs)
    started(kernel, initrd, runs)
    microseconds = emulators.emulate("restore", kernel.read_bytes())["seconds"] * 1e6
    print(f"{'snapshot restored after 20 pages':<44} {microseconds:>8.0f} us{'':12}  ≤ 100 us", flush=True)


def loops(there: list[emulators.Emulator]) -> None:
    """One row a guest, one column an emulator."""
    names = "".join(f"{emulator.name:>12}" for emulator in there)
    print(f"\n{'million instructions a second':<44}{names}")
    counted = []
    for guest, turns in zip(guests.GUESTS, TURNS, strict=True):
        length = emulators.instructions(guest)
        seconds = [turn_of(emulator, guest, turns) for emulator in there]
        print(f"{guest.name:<44}{cells([length / s / 1e6 if s else None for s in seconds])}", flush=True)
        if guest.per_turn:
            counted.append((guest, seconds))
    print(f"\n{'thousand a second':<44}{names}")
    for guest, seconds in counted:
        print(f"{guest.name:<44}{cells([guest.per_turn / s / 1e3 if s else None for s in seconds])}", flush=True)


def turn_of(emulator: emulators.Emulator, guest: guests.Guest, turns: int) -> float | None:
    """Seconds of a turn; None where the emulator cannot run the guest (said on stderr if that is news)."""
    try:
        return emulator.seconds_a_turn(guest, turns)
    except Failed as why:
        if emulator.name != "Unicorn":
            print(f"{emulator.name}, {guest.name}: {why}", file=sys.stderr)
        return None


def cells(values: list[float | None]) -> str:
    """Numbers in columns, a dash for what is not there."""
    return "".join(f"{'-' if v is None else f'{v:,.2f}' if v < 10 else f'{v:,.0f}':>12}" for v in values)


def kernel_elf(folder: Path) -> Path | None:
    """The kernel, fetched by package name, unpacked; None (and said) when it cannot be had."""
    found = subprocess.run(
        [PYTHON, "-m", "tests.real.kernels", KERNEL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        print(f"no kernel to boot: {found.stderr.strip()}")
        return None
    from vmipatch.image import open_image

    elf = folder / KERNEL
    elf.write_bytes(open_image(Path(found.stdout.strip())).data)
    return elf


def vmipatch_run(
    kernel: Path, initrd: Path, *words: str, extra: str = "", compiled: bool = True
) -> tuple[float, dict[str, Any]]:
    """Wall seconds of a whole `vmipatch run`, and its summary; ``extra`` goes to the kernel's command line."""
    append = f"console=ttyS0 nokaslr panic=-1 {extra}".strip()
    command = [PYTHON, "-m", "vmipatch", "run", str(kernel), "--initrd", str(initrd), "--append", append]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--memory", "256", "--json", *words],
        env=environment(compiled=compiled),
        capture_output=True,
        check=False,
        timeout=emulators.LIMIT,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.decode()[-2000:]}")
    return seconds, json.loads(done.stdout.splitlines()[-1])


def boots(kernel: Path, initrd: Path, runs: int) -> None:
    """The ELF entered directly, to the initramfs's line: whole processes, ours and QEMU's in turn."""
    print(f"\n{f'Debian {KERNEL}, ELF entered directly':<44} {'median':>11}")
    boot("boot to init's line", "", "≤ 5x, aim at 1x", kernel, initrd, runs)
    # Nine in ten instructions of that boot are the kernel testing its own Diffie-Hellman and RSA.
    boot("the same without the kernel's crypto tests", "cryptomgr.notests", "", kernel, initrd, runs)
    _, summary = vmipatch_run(kernel, initrd, "--max-instructions", str(UNCOMPILED_BOOT), compiled=False)
    mips = summary["instructions"] / summary["seconds"] / 1e6
    print(f"{f'  the first {UNCOMPILED_BOOT:,}, uncompiled':<44} {mips:>8.2f} MIPS", flush=True)


def boot(name: str, extra: str, bar: str, kernel: Path, initrd: Path, runs: int) -> None:
    """Two rows: wall seconds beside QEMU's, and instructions a second."""
    from tests.real.initramfs import REACHED

    ours, theirs, summaries = [], [], []
    for _ in range(max(1, runs // 2)):
        seconds, summary = vmipatch_run(kernel, initrd, "--until", REACHED, extra=extra)
        ours.append(seconds)
        summaries.append(summary)
        if shutil.which("qemu-system-i386") is not None:
            theirs.append(qemu_boot(kernel, initrd, extra))
    counts = {summary["instructions"] for summary in summaries}
    if len(counts) != 1:
        raise SystemExit(f"boots of one kernel took different numbers of instructions: {sorted(counts)}")
    instructions = counts.pop()
    mips = statistics.median(instructions / summary["seconds"] / 1e6 for summary in summaries)
    against = "QEMU is not here"
    if theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        against = f"{ratio:.1f}x QEMU TCG ({statistics.median(theirs):.2f} s)"
    print(f"{name:<44} {statistics.median(ours):>8.2f} s {'':12}  {bar:<18}  {against}")
    print(f"{f'  {instructions:,} instructions':<44} {mips:>8.0f} MIPS{'':10}  ≥ 100 MIPS", flush=True)


def qemu_boot(kernel: Path, initrd: Path, extra: str) -> float:
    """Wall seconds of QEMU, from its start to the line."""
    from tests.real import qemu
    from tests.real.initramfs import REACHED

    began = time.perf_counter()
    with qemu.boot(qemu.Machine(kernel, initrd, 32, SAME_CPU, append=extra)) as guest:
        guest.wait_for(REACHED)
        return time.perf_counter() - began


def started(kernel: Path, initrd: Path, runs: int) -> None:
    """A whole process that runs one instruction of the kernel."""
    taken = [vmipatch_run(kernel, initrd, "--max-instructions", "1")[0] for _ in range(runs + 1)][1:]
    print(f"{'start to the first guest instruction':<44} {statistics.median(taken) * 1000:>8.0f} ms{'':12}  ≤ 500 ms")
