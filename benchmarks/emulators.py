"""Runs a guest in our emulator, Unicorn, Bochs and QEMU; seconds of each, None where it cannot be had.

May import guests (this folder) and tests.real.  A whole process is timed for Bochs and QEMU; callers take the
difference of two counts, so that starting up does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for tests.real, which knows where kernels, QEMU and Bochs are
PYTHON = sys.executable
LIMIT = 600.0


class Failed(Exception):
    """An emulator did not run the guest to its end."""


@dataclass(frozen=True)
class Emulator:
    """``run`` gives the seconds of so many turns of a guest; ``turns`` scales how many it is asked for."""

    name: str
    scale: float
    run: Callable[[guests.Guest, int], float]
    there: Callable[[], bool]

    def seconds_a_turn(self, guest: guests.Guest, turns: int) -> float:
        """Seconds of one turn of the loop: two counts, the faster of two runs each."""
        many = max(8, int(turns * self.scale))
        few = max(1, many // 8)
        long = min(self.run(guest, many) for _ in range(2))
        short = min(self.run(guest, few) for _ in range(2))
        if long <= short:
            raise Failed(f"{self.name}: {many} turns took no longer than {few}")
        return (long - short) / (many - few)


def environment(*, compiled: bool = True) -> dict[str, str]:
    """The environment of a child that runs our emulator from this tree."""
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    found.pop("VMIPATCH_UNCOMPILED", None)
    if not compiled:
        found["VMIPATCH_UNCOMPILED"] = "1"
    return found


def emulate(what: str, data: bytes, *, compiled: bool = True) -> dict[str, Any]:
    """What emulate.py says of a ROM or a kernel. Raises Failed."""
    with tempfile.NamedTemporaryFile(suffix=".rom") as file:
        file.write(data)
        file.flush()
        return emulate_file(what, Path(file.name), compiled=compiled)


def emulate_file(what: str, path: Path, *, compiled: bool = True) -> dict[str, Any]:
    """The same of a file. Raises Failed."""
    command = [PYTHON, str(ROOT / "benchmarks" / "emulate.py"), what, str(path)]
    done = subprocess.run(
        command, env=environment(compiled=compiled), capture_output=True, text=True, check=False, timeout=LIMIT
    )
    if done.returncode:
        raise Failed(done.stderr[-500:])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def instructions(guest: guests.Guest) -> float:
    """Instructions of one turn, by our count."""
    many, few = (int(emulate("run", guests.rom(guest, turns))["instructions"]) for turns in (1100, 100))
    return (many - few) / 1000


def ours(compiled: bool) -> Callable[[guests.Guest, int], float]:
    """Our emulator."""

    def run(guest: guests.Guest, turns: int) -> float:
        answer = emulate("run", guests.rom(guest, turns), compiled=compiled)
        if answer["reason"] != "debug exit":
            raise Failed(f"{guest.name}: ended by {answer['reason']}")
        return float(answer["seconds"])

    return run


def unicorn_is_there() -> bool:
    """Whether Python has Unicorn."""
    try:
        import unicorn  # noqa: F401
    except ImportError:
        return False
    return True


def unicorn(guest: guests.Guest, turns: int) -> float:
    """The bare loop of a guest that needs no interrupts. Raises Failed for one that does."""
    import unicorn as library
    from unicorn.x86_const import UC_X86_REG_ESP

    if guest.user:
        raise Failed("no interrupts")
    code, end = guests.bare(guest, turns)
    module: Any = library
    engine = module.Uc(module.UC_ARCH_X86, module.UC_MODE_32)
    engine.mem_map(0, 16 << 20)
    engine.mem_write(guests.CODE, code)
    engine.reg_write(UC_X86_REG_ESP, guests.STACK)
    began = time.perf_counter()
    engine.emu_start(guests.CODE, guests.CODE + end)
    return time.perf_counter() - began


def qemu(guest: guests.Guest, turns: int) -> float:
    """QEMU's TCG, a whole process."""
    with tempfile.TemporaryDirectory() as name:
        rom = Path(name) / "rom"
        rom.write_bytes(guests.rom(guest, turns))
        command = [
            *("qemu-system-i386", "-accel", "tcg", "-cpu", "pentium3", "-m", "16", "-bios", str(rom)),
            *("-display", "none", "-vga", "none", "-nodefaults", "-serial", "none", "-monitor", "none"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-no-reboot"),
        ]
        began = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=LIMIT)
        seconds = time.perf_counter() - began
    if done.returncode != 33:  # what the guest wrote to the port, doubled and one
        raise Failed(f"QEMU ended with {done.returncode}: {done.stderr.decode()[-300:]}")
    return seconds


def bochs(guest: guests.Guest, turns: int) -> float:
    """Bochs, a whole process."""
    from tests.real import bochs as program

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        output = program.run(guests.rom(guest, turns), folder, LIMIT)
        seconds = time.perf_counter() - began
    if seconds >= LIMIT or "could not" in output.lower():
        raise Failed(f"Bochs: {output[-300:]}")
    return seconds


EMULATORS = (
    Emulator("vmipatch", 1, ours(True), lambda: True),
    Emulator("uncompiled", 1 / 1000, ours(False), lambda: True),
    Emulator("Unicorn", 1, unicorn, unicorn_is_there),
    Emulator("Bochs", 0.25, bochs, lambda: shutil.which("bochs") is not None),
    Emulator("QEMU TCG", 4, qemu, lambda: shutil.which("qemu-system-i386") is not None),
)
