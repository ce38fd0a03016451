"""A process of its own that runs one ROM in our emulator and says how long it took, as JSON.

python benchmarks/emulate.py run ROM          {"seconds", "instructions", "reason"} of the run alone
python benchmarks/emulate.py restore IMAGE    {"seconds": median of restoring a snapshot after 20 written pages}
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from vmipatch.emu.firmware import boot
from vmipatch.emu.firmware.boot import BootOptions
from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine

LIMIT = 100_000_000_000
PAGES = 20
TEXT, DUMPED, PAGE_OFFSET = 0x1000000, 32 << 20, 0xC0000000  # where Debian's i386 kernels are


def run(rom: bytes) -> dict[str, object]:
    """From the reset vector to the guest's own end."""
    machine = Machine(BoardOptions(ram_bytes=16 << 20))
    boot.boot(machine, rom, BootOptions(), "guest")
    began = time.perf_counter()
    outcome = machine.run(limit=LIMIT)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "instructions": outcome.instructions, "reason": outcome.reason}


def restore(image: bytes) -> dict[str, object]:
    """A machine of 256 MiB in the middle of a kernel's start; 20 of its pages are written, then it goes back."""
    machine = Machine(BoardOptions(ram_bytes=256 << 20))
    boot.boot(machine, image, BootOptions(append="console=ttyS0"), "kernel")
    machine.run(limit=20_000_000)
    base = machine.snapshot()
    times = []
    for turn in range(300):
        for page in range(PAGES):
            address = (0x4000000 + (turn * PAGES + page) % 4096 * 4096) & ~0xFFF
            machine.memory.write(address, turn.to_bytes(4, "little"))
        machine.cpu.run(machine.cpu.instructions + 100)
        began = time.perf_counter()
        machine.restore(base)
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times)}


def dump(path: Path) -> dict[str, object]:
    """A kernel that runs (its console has spoken of init, which is not there), and its memory from its text on."""
    machine = Machine(BoardOptions(ram_bytes=256 << 20))
    options = BootOptions(append="console=ttyS0 nokaslr cryptomgr.notests")
    boot.boot(machine, path.read_bytes(), options, str(path))
    machine.run(limit=5_000_000_000, until="Kernel panic")
    file = path.with_suffix(".memory")
    file.write_bytes(machine.memory.read(TEXT, DUMPED))
    return {"file": str(file), "base": PAGE_OFFSET + TEXT}


if __name__ == "__main__":
    what, path = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(dump(path) if what == "dump" else {"run": run, "restore": restore}[what](path.read_bytes())))
