"""Random bytes as code in every mode: the processor must survive and stay inside its memory.

Run as a program for the full count: ``python tests/emu/cpu/fuzzing.py 1000000``.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from vmipatch.emu.cpu import Cpu, Exit, Memory

RAM = 1 << 20
MODES = ("real", "unreal", "protected 16", "protected 32", "user", "v86", "paged", "paged user", "pae")
GUARD = 64 * 1024


class CountingBus:
    """Answers everything and remembers nothing."""

    def port_read(self, port: int, size: int) -> int:
        return 0x5A5A5A5A & (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        assert 0 <= value < 1 << 8 * size

    def memory_read(self, physical: int, size: int) -> int:
        assert size in (1, 2, 4)
        return (1 << 8 * size) - 1

    def memory_write(self, physical: int, size: int, value: int) -> None:
        assert size in (1, 2, 4)
        assert 0 <= value < 1 << 8 * size

    def acknowledge(self) -> int:
        return 0x20


def prepare(cpu: Cpu, mode: str, rng: random.Random) -> None:
    """Put a processor into a mode, with tables in place."""
    cpu.reset()
    memory = cpu.memory
    gdt = bytearray(rng.randbytes(256)) if rng.random() < 0.3 else bytearray(256)
    for index, word in enumerate((0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF, 0x00CFFA000000FFFF, 0x00CFF2000000FFFF,
                                  0x00008B0020000067, 0x0000E20030000067, 0x00009A000000FFFF)):  # fmt: skip
        gdt[8 * index : 8 * index + 8] = word.to_bytes(8, "little")
    memory.write(0x1000, bytes(gdt))
    memory.write(0x2000, rng.randbytes(0x68))
    memory.write(0x2004, (0x9000).to_bytes(4, "little") + (0x10).to_bytes(4, "little"))
    idt = b"".join(
        (0x0000EE0000080000 | 0x4000 + 16 * v | rng.choice((0, 0, 0x100 << 32))).to_bytes(8, "little")
        for v in range(256)
    )
    memory.write(0x6000, idt)
    cpu.set("gdtr_base", 0x1000)
    cpu.set("gdtr_limit", 0xFF)
    cpu.set("idtr_base", 0x6000)
    cpu.set("idtr_limit", 0x7FF)
    for name in ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp"):
        cpu.set(name, rng.choice((rng.getrandbits(32), rng.getrandbits(20), rng.getrandbits(8))))
    cpu.set("esp", 0x9000)
    cpu.set("eflags", 2 | rng.getrandbits(22) & 0x3ED5)
    if mode == "real":
        cpu.set("idtr_base", 0)
        cpu.set("cs", 0x1000)
        cpu.set("eip", 0)
        return
    if mode == "unreal":
        for name in ("ds", "es", "ss"):
            cpu.set_segment(name, 0, 0, 0xFFFFFFFF, 0x8093)
        cpu.set("cs", 0x1000)
        cpu.set("eip", 0)
        return
    if mode.startswith("paged") or mode == "pae":
        pages(cpu, mode, rng)
    cpu.set("cr0", 0x80000011 if mode.startswith("paged") or mode == "pae" else 0x11)
    user = mode in ("user", "paged user", "v86")
    code, data = (0x1B, 0x23) if user else (0x08, 0x10)
    access = 0x60 if user else 0
    wide = 0 if mode == "protected 16" else 0x4000
    cpu.set_segment("cs", code, 0, 0xFFFFFFFF, 0x809B | access | wide)
    for name in ("ds", "es", "ss", "fs", "gs"):
        cpu.set_segment(name, data, 0, 0xFFFFFFFF, 0x8093 | access | wide)
    cpu.set_segment("tr", 0x28, 0x2000, 0x67, 0x8B)
    cpu.set("eip", 0x10000)
    if mode == "v86":
        cpu.set("eflags", cpu.eflags | 0x20000)
        for name in ("cs", "ds", "es", "ss", "fs", "gs"):
            cpu.set_segment(name, 0x1000 if name == "cs" else 0, 0x10000 if name == "cs" else 0, 0xFFFF, 0xF3)
        cpu.set("eip", 0)
        cpu.set("cpl", 3)


def pages(cpu: Cpu, mode: str, rng: random.Random) -> None:
    """Page tables that map the first megabyte onto itself, with holes."""
    memory = cpu.memory
    low = 7 if mode == "paged user" else rng.choice((3, 7))
    if mode == "pae":
        rights = [low if page == 16 or rng.random() < 0.9 else rng.getrandbits(3) for page in range(256)]
        table = b"".join((page << 12 | bits).to_bytes(8, "little") for page, bits in enumerate(rights))
        memory.write(0xA0000, (0xA1001).to_bytes(8, "little") + bytes(24))
        memory.write(0xA1000, (0xA2007).to_bytes(8, "little") + (0x80 | 7).to_bytes(8, "little") + rng.randbytes(64))
        memory.write(0xA2000, table)
        cpu.set("cr4", 0x20)
        cpu.set("cr3", 0xA0000)
        cpu.pdpte = [0xA1001] + [0] * 7
        return
    rights = [low if page == 16 or rng.random() < 0.9 else rng.getrandbits(9) for page in range(256)]
    table = b"".join((page << 12 | bits).to_bytes(4, "little") for page, bits in enumerate(rights))
    memory.write(0xA0000, (0xA1007).to_bytes(4, "little") + rng.randbytes(64))
    memory.write(0xA1000, table)
    cpu.set("cr4", rng.choice((0, 0x10, 0x90)))
    cpu.set("cr3", 0xA0000)


def check(cpu: Cpu) -> None:
    """What must hold whatever the guest did."""
    assert cpu.get("cpl") in range(4)
    assert cpu.reg[8] == 0, "the register that is always zero"
    for name in ("eax", "esp", "eip", "eflags"):
        assert 0 <= cpu.get(name) < 1 << 32


def run(count: int, seed: int, *, steps: int = 24, modes: tuple[str, ...] = MODES) -> dict[str, int]:
    """Run ``count`` random byte strings; how often each exit came."""
    rng = random.Random(seed)
    memory = Memory(RAM, 1 << 20)
    memory.map(0, RAM, 0)
    # Backing that the guest cannot reach, on both sides of what it could overrun.
    guard = memory.allocate(GUARD)
    memory.write_backing(guard, b"\xa5" * GUARD)
    cpu = Cpu(memory, CountingBus())
    exits: dict[str, int] = {}
    lost: list[str] = []  # exceptions that C code could not pass on
    before, sys.unraisablehook = sys.unraisablehook, lambda what: lost.append(f"{what.exc_value!r} in {what.object!r}")
    names: dict[Any, str] = {value: name for name, value in vars(Exit).items() if name.isupper()}
    for index in range(count):
        mode = modes[index % len(modes)]
        if index % 500 < len(modes):
            memory.write(0, rng.randbytes(0x1000))
        prepare(cpu, mode, rng)
        length = rng.randrange(1, 64)
        memory.write(0x10000, rng.randbytes(length) + b"\xf4")
        end = cpu.instructions + steps
        reason = cpu.run(end)
        exits[names[reason]] = exits.get(names[reason], 0) + 1
        check(cpu)
    sys.unraisablehook = before
    assert not lost, lost[:5]
    assert memory.read_backing(guard, GUARD) == b"\xa5" * GUARD, "memory outside of the guest was written"
    return exits


if __name__ == "__main__":
    print(run(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
