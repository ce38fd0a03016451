"""Random x87 instructions on our processor and on Unicorn, whose arithmetic is Berkeley SoftFloat.

All masks are set in half of the cases.  The transcendental functions are left
out (Unicorn computes them in the host's double precision), and so are FPREM
and FSCALE outside of what SoftFloat rounds as the processor does.
"""

from __future__ import annotations

import random
from typing import Any

from differential import CODE, DATA, Ours, Unicorn

NUMBERS = (
    0, 1 << 79, 0x3FFF << 64 | 1 << 63, 0xBFFF << 64 | 1 << 63, 0x7FFF << 64 | 1 << 63, 0xFFFF << 64 | 1 << 63,
    0x7FFF << 64 | 3 << 62, 0xFFFF << 64 | 3 << 62, 0x7FFF << 64 | 0xA << 60, 0x7FFF << 64 | 3 << 62 | 99,
    1, 0x8000 << 64 | 12345, 0x7FFE << 64 | (1 << 64) - 1, 1 << 64 | 1 << 63, 0x4000 << 64 | 0xC90FDAA22168C235,
    0x401E << 64 | 1 << 63, 0x403E << 64 | 1 << 63, 0xC03E << 64 | 1 << 63,
)  # fmt: skip


def number(rng: random.Random) -> int:
    """A random 80-bit pattern: special values, near ones, anything that is normal."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NUMBERS)
    sign = rng.getrandbits(1) << 79
    significand = 1 << 63 | rng.getrandbits(63)
    if kind == 1:
        significand = 1 << 63 | rng.getrandbits(20) << 43
    if kind == 5:
        return sign | rng.randrange(1, 0x7FFF) << 64 | significand
    return sign | (16383 + rng.randrange(-70, 70)) << 64 | significand


def instruction(rng: random.Random) -> bytes:
    """A random x87 instruction, memory forms at EBX."""
    while True:
        opcode = rng.randrange(0xD8, 0xE0)
        modrm = rng.randrange(256)
        reg = modrm >> 3 & 7
        if modrm < 0xC0:
            modrm = reg << 3 | 3
            if (opcode, reg) in ((0xD9, 4), (0xD9, 6), (0xDD, 4), (0xDD, 6), (0xDD, 5), (0xD9, 1), (0xDB, 1),
                                 (0xDF, 1), (0xDD, 1), (0xDB, 4), (0xDB, 6), (0xDF, 4)):  # fmt: skip
                continue  # environments; holes; SSE3's FISTTP; FBLD of digits that are none
            return bytes([opcode, modrm])
        if opcode == 0xD9 and ((modrm >= 0xD1 and modrm < 0xD8) or modrm in (0xE2, 0xE3, 0xE6, 0xE7, 0xEF)):
            continue
        if opcode == 0xD9 and modrm >= 0xF0 and modrm not in (0xF4, 0xF6, 0xF7, 0xFA, 0xFC):
            continue
        if opcode == 0xDA and modrm >= 0xE0 and modrm != 0xE9:
            continue
        if opcode == 0xDB and (0xE0 <= modrm < 0xE2 or 0xE4 <= modrm < 0xE8 or modrm >= 0xF8):
            continue
        if opcode == 0xDC and 0xD0 <= modrm < 0xE0:
            continue
        if opcode == 0xDD and modrm >= 0xF0:
            continue
        if opcode == 0xDE and (0xD0 <= modrm < 0xD8 or (0xD8 <= modrm < 0xE0 and modrm != 0xD9)):
            continue
        if opcode == 0xDF and (0xE1 <= modrm < 0xE8 or modrm >= 0xF8):
            continue
        return bytes([opcode, modrm])


def compare(count: int, seed: int) -> list[str]:
    """Run ``count`` instructions; what differed, in words."""
    from unicorn import x86_const as x

    rng = random.Random(seed)
    ours, theirs = Ours(), Unicorn()
    uc = theirs.uc
    different: list[str] = []
    for _ in range(count):
        code = instruction(rng)
        values = [number(rng) for _ in range(8)]
        control = 0x37F if rng.random() < 0.7 else 0x7F | rng.choice((0, 0x200, 0x300)) | rng.randrange(4) << 10
        top = rng.randrange(8)
        empty = rng.choice((0, 0, 0, 3)) if rng.random() < 0.8 else 3
        tag = sum((empty if rng.random() < 0.3 else 0) << 2 * i for i in range(8))
        flags = 2 | rng.getrandbits(12) & 0x8D5
        operand = number(rng).to_bytes(10, "little") if rng.random() < 0.3 else rng.randbytes(10)
        ours.memory.write(DATA, operand + bytes(16))
        uc.mem_write(DATA, operand + bytes(16))
        ours.memory.write(CODE, code + b"\x90" * 4)
        uc.mem_write(CODE, code + b"\x90" * 4)
        uc.ctl_remove_cache(CODE, CODE + 16)
        cpu = ours.cpu
        cpu.set("ebx", DATA)
        cpu.set("eax", 0)
        cpu.set("eflags", flags)
        cpu.set("eip", CODE)
        cpu.set("fctrl", control)
        cpu.set("fstat", top << 11)
        uc.reg_write(x.UC_X86_REG_FPCW, control)
        uc.reg_write(x.UC_X86_REG_FPSW, top << 11)
        for i, value in enumerate(values):
            cpu.set(f"st{i}", value)
            physical = top + i & 7
            # Unicorn's names FP0..FP7 are the physical registers.
            uc.reg_write(getattr(x, f"UC_X86_REG_FP{physical}"), (value & (1 << 64) - 1, value >> 64))
        cpu.set("ftag", tag)
        uc.reg_write(x.UC_X86_REG_FPTAG, tag)
        uc.reg_write(x.UC_X86_REG_EBX, DATA)
        uc.reg_write(x.UC_X86_REG_EAX, 0)
        uc.reg_write(x.UC_X86_REG_EFLAGS, flags)
        cpu.run(cpu.instructions + 1)
        if cpu.get("fstat") & 0x40:
            continue
        fault = None
        try:
            uc.emu_start(CODE, CODE + 4, 0, 1)
        except theirs.unicorn.UcError as error:
            fault = error
        mine = state(ours)
        other = their_state(uc, x)
        if fault is not None or mine != other:
            detail = ", ".join(f"{n} {a:x}/{b:x}" for n, a, b in zip(NAMES, mine, other, strict=True) if a != b)
            different.append(
                f"{code.hex()} cw {control:x} top {top} tag {tag:x} st0 {values[0]:020x} st1 {values[1]:020x} "
                f"st{code[1] & 7} {values[code[1] & 7]:020x} m {operand[::-1].hex()}: {detail} {fault or ''}"
            )
    return different


NAMES = ("eip", "eax", "flags", "status", "full", "memory", *(f"fp{i}" for i in range(8)))


def state(ours: Ours) -> tuple[Any, ...]:
    """What is compared, from our processor."""
    cpu = ours.cpu
    status = cpu.get("fstat")
    tag = cpu.get("ftag")
    full = sum((tag >> 2 * i & 3 != 3) << i for i in range(8))
    top = status >> 11 & 7
    registers = [cpu.get(f"st{i - top & 7}") if full >> i & 1 else 0 for i in range(8)]
    memory = int.from_bytes(ours.memory.read(DATA, 16), "little")
    return (
        cpu.get("eip"),
        cpu.get("eax") & ~UNDEFINED,
        cpu.get("eflags") & 0x8D5,
        status & ~UNDEFINED,
        full,
        memory,
        *registers,
    )


# Unicorn keeps no exception flags in the status word, nor C1, and knows no stack faults.
UNDEFINED = 0x82FF


def their_state(uc: Any, x: Any) -> tuple[Any, ...]:
    """The same from Unicorn."""
    status = uc.reg_read(x.UC_X86_REG_FPSW)
    tag = uc.reg_read(x.UC_X86_REG_FPTAG)
    full = sum((tag >> 2 * i & 3 != 3) << i for i in range(8))
    registers = []
    for i in range(8):
        low, high = uc.reg_read(getattr(x, f"UC_X86_REG_FP{i}"))
        registers.append(high << 64 | low if full >> i & 1 else 0)
    memory = int.from_bytes(bytes(uc.mem_read(DATA, 16)), "little")
    eax, flags = uc.reg_read(x.UC_X86_REG_EAX) & ~UNDEFINED, uc.reg_read(x.UC_X86_REG_EFLAGS) & 0x8D5
    return (uc.reg_read(x.UC_X86_REG_EIP), eax, flags, status & ~UNDEFINED, full, memory, *registers)
