"""Random instructions from the opcode table, run on our processor and on Unicorn from the same state.

Every encoding of the table is met: each row in its register and memory form,
with both operand sizes and both address sizes.  Privileged instructions and
those that leave the segment are not for this test (Unicorn does not deliver
faults as the processor does); :data:`EXCLUDED` lists them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vmipatch.emu.cpu import Cpu, Exit, Memory
from vmipatch.emu.cpu.table import Row, rows

EXCLUDED = {
    "far transfers, interrupts and segment loads": (
        "callf", "jmpf", "retf", "int3", "int", "into", "iret", "int1", "sysenter", "sysexit",
        "movts", "movfs", "les", "lds", "lss", "lfs", "lgs",
    ),
    "system instructions": (
        "sldt", "str", "verr", "verw", "lar", "lsl", "sgdt", "sidt", "smsw", "arpl", "vmcall", "wait",
        "cpuid", "rdtsc", "rdpmc", "popf", "fxsave", "fxrstor", "fpu",
    ),
    "port input and output": ("insb", "insv", "outsb", "outsv", "inb", "inv", "outb", "outv"),
}  # fmt: skip
SKIPPED = {name for names in EXCLUDED.values() for name in names}

CODE = 0x3F000
DATA = 0x8000
DATA_SIZE = 0x4000
RAM = 0x40000
FLAG_BITS = {"o": 0x800, "s": 0x80, "z": 0x40, "a": 0x10, "p": 4, "c": 1}
ALL_FLAGS = 0x8D5
REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


class NoBus:
    """A bus with nothing on it."""

    def port_read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        pass

    def memory_read(self, physical: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def memory_write(self, physical: int, size: int, value: int) -> None:
        pass

    def acknowledge(self) -> int:
        return 0xFF


def candidates() -> list[Row]:
    """The rows that this test can run."""
    return [
        row
        for row in rows()
        if row.mnemonic not in SKIPPED
        and row.privilege == ""
        and not (row.mnemonic in ("push", "pop") and row.operands[0] in ("ES", "CS", "SS", "DS", "FS", "GS"))
    ]


@dataclass(frozen=True)
class Case:
    """One instruction and the state it starts from."""

    row: Row
    code: bytes
    registers: tuple[int, ...]
    flags: int


def _value(rng: random.Random) -> int:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
    if kind < 3:
        return DATA + rng.randrange(0x800, DATA_SIZE - 0x800)
    if kind == 3:
        return rng.randrange(64)
    return rng.getrandbits(32)


def encode(row: Row, rng: random.Random, memory: bool) -> bytes:
    """A random encoding of a row."""
    prefixes = bytearray()
    size16 = rng.random() < 0.3
    address16 = rng.random() < 0.1
    if size16:
        prefixes.append(0x66)
    if address16:
        prefixes.append(0x67)
    if row.mnemonic[:-1] in ("movs", "stos", "lods", "cmps", "scas") and not row.operands and rng.random() < 0.5:
        prefixes.append(rng.choice((0xF2, 0xF3)))
    if row.lock and memory and rng.random() < 0.2:
        prefixes.append(0xF0)
    rng.shuffle(prefixes)
    code = bytes(prefixes) + (b"\x0f" if row.two_byte else b"") + bytes([row.opcode])
    if row.has_modrm:
        reg = row.group if row.group >= 0 else rng.randrange(8)
        if not memory:
            code += bytes([0xC0 | reg << 3 | rng.randrange(8)])
        elif address16:
            mode, form = rng.randrange(3), rng.randrange(8)
            code += bytes([mode << 6 | reg << 3 | form])
            code += rng.randbytes(1) if mode == 1 else b""
            if mode == 2 or (mode == 0 and form == 6):
                code += (DATA + rng.randrange(DATA_SIZE - 64)).to_bytes(2, "little") if mode == 0 else rng.randbytes(2)
        else:
            mode, form = rng.randrange(3), rng.randrange(8)
            code += bytes([mode << 6 | reg << 3 | form])
            base = form
            if form == 4:
                sib = rng.randrange(256)
                code += bytes([sib])
                base = sib & 7
            if mode == 1:
                code += rng.randbytes(1)
            elif mode == 2:
                code += rng.randrange(-0x200, 0x200).to_bytes(4, "little", signed=True)
            elif base == 5:
                code += (DATA + rng.randrange(0x200, DATA_SIZE - 0x200)).to_bytes(4, "little")
    for operand in row.operands:
        if row.mnemonic == "enter":
            code += rng.randrange(64).to_bytes(2, "little") + bytes([rng.choice((0, 0, 1, 2, 3, 33))])
            break
        if operand in ("Ib", "Is", "Jb"):
            code += rng.randbytes(1)
        elif operand == "Iw":
            code += rng.randrange(64).to_bytes(2, "little")
        elif operand == "Iz":
            code += rng.randbytes(2 if size16 else 4)
        elif operand == "Jz":
            code += rng.randrange(-0x80, 0x80).to_bytes(2 if size16 else 4, "little", signed=True)
        elif operand in ("Ob", "Ov"):
            offset = DATA + rng.randrange(0x200, DATA_SIZE - 0x200)
            code += offset.to_bytes(2 if address16 else 4, "little")
    return code


def make_case(row: Row, rng: random.Random) -> Case:
    """A random case of a row."""
    names = row.operands
    memory_only = "M" in names
    can_memory = memory_only or any(o in ("Eb", "Ew", "Ev") for o in names)
    memory = memory_only or (can_memory and rng.random() < 0.5)
    registers = [_value(rng) for _ in range(8)]
    registers[4] = DATA + 4 * rng.randrange(0x300, DATA_SIZE // 4 - 0x300) + rng.choice((0, 0, 0, 1, 2))
    if row.mnemonic in ("enter", "leave"):
        registers[5] = DATA + rng.randrange(0x800, DATA_SIZE - 0x800)
    if not names and row.mnemonic[:-1] in ("movs", "stos", "lods", "cmps", "scas"):
        registers[1] = rng.randrange(20)
        registers[6] = DATA + rng.randrange(0x800, DATA_SIZE - 0x800)
        registers[7] = DATA + rng.randrange(0x800, DATA_SIZE - 0x800)
    if row.mnemonic == "xlat":
        registers[3] = DATA + rng.randrange(0x800, DATA_SIZE - 0x800)
    if row.mnemonic in ("div", "idiv") and rng.random() < 0.7:
        registers[2] = rng.randrange(256) if rng.random() < 0.5 else -rng.randrange(256) & 0xFFFFFFFF
    if row.mnemonic in ("bt", "bts", "btr", "btc") and names[1] == "Gv" and rng.random() < 0.7:
        for r in (0, 1, 2, 3, 6, 7):
            if rng.random() < 0.5:
                registers[r] = rng.randrange(-0x800, 0x800) & 0xFFFFFFFF
    code = encode(row, rng, memory)
    flags = 2 | (rng.getrandbits(32) & ALL_FLAGS) | (0x400 if rng.random() < 0.2 else 0)
    return Case(row, code, tuple(registers), flags)


class Ours:
    """Our processor, flat 32-bit at CPL 3."""

    def __init__(self) -> None:
        self.memory = Memory(RAM, 1 << 20)
        self.memory.map(0, RAM, 0)
        self.cpu = Cpu(self.memory, NoBus())
        self.cpu.set("cr0", 1)
        for name in ("ds", "es", "ss", "fs", "gs"):
            self.cpu.set_segment(name, 0x23, 0, 0xFFFFFFFF, 0xC0F3)
        self.cpu.set_segment("cs", 0x1B, 0, 0xFFFFFFFF, 0xC0FB)
        for vector in range(32):
            self.cpu.hook_vector(vector)

    def run(self, case: Case) -> tuple[Any, ...]:
        """(fault vector or -1, eip, registers, flags)."""
        cpu = self.cpu
        self.memory.write(CODE, case.code + b"\x90" * 15)
        for name, value in zip(REGISTERS, case.registers, strict=True):
            cpu.set(name, value)
        cpu.set("eip", CODE)
        cpu.set("eflags", case.flags)
        reason = cpu.run(cpu.instructions + 1)
        while reason == Exit.LIMIT and cpu.get("eip") == CODE and case.code[0] not in (0x70, 0xEB):
            if not any(p in case.code[:4] for p in (0xF2, 0xF3)):
                break
            reason = cpu.run(cpu.instructions + 1)
        vector = cpu.exit_vector if reason == Exit.VECTOR else -1
        return vector, cpu.get("eip"), tuple(cpu.get(n) for n in REGISTERS), cpu.get("eflags") & 0xCD5


class Unicorn:
    """Unicorn, flat 32-bit."""

    def __init__(self) -> None:
        import unicorn
        from unicorn import x86_const as x

        self.unicorn = unicorn
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        self.uc.mem_map(0, RAM)
        self.ids = [getattr(x, f"UC_X86_REG_{n.upper()}") for n in REGISTERS]
        self.flags, self.eip = x.UC_X86_REG_EFLAGS, x.UC_X86_REG_EIP
        self.vector = -1
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)

    def _interrupt(self, uc: Any, number: int, data: Any) -> None:
        self.vector = number
        uc.emu_stop()

    def run(self, case: Case) -> tuple[Any, ...]:
        """As :meth:`Ours.run`; vector -2 is an access outside memory."""
        uc = self.uc
        uc.mem_write(CODE, case.code + b"\x90" * 15)
        for reg, value in zip(self.ids, case.registers, strict=True):
            uc.reg_write(reg, value)
        uc.reg_write(self.flags, case.flags)
        self.vector = -1
        uc.ctl_remove_cache(CODE, CODE + 64)
        try:
            # A count of 1 would stop a repeated instruction after one element.
            repeats = not case.row.operands and any(p in case.code[:-1] for p in (0xF2, 0xF3))
            if repeats:
                uc.emu_start(CODE, CODE + len(case.code), 0, 0)
            else:
                uc.emu_start(CODE, 0xFFFFFFFF, 0, 1)
        except self.unicorn.UcError as error:
            code = error.errno
            if code in (self.unicorn.UC_ERR_READ_UNMAPPED, self.unicorn.UC_ERR_WRITE_UNMAPPED,
                        self.unicorn.UC_ERR_FETCH_UNMAPPED):  # fmt: skip
                self.vector = -2
            elif code == self.unicorn.UC_ERR_INSN_INVALID:
                self.vector = 6
            elif self.vector < 0:
                self.vector = 1000 + code
        return (
            self.vector,
            uc.reg_read(self.eip),
            tuple(uc.reg_read(r) for r in self.ids),
            uc.reg_read(self.flags) & 0xCD5,
        )


def flag_mask(case: Case) -> int:
    """The flags that are defined after a case (with DF)."""
    row = case.row
    undefined = set(row.undefined_flags)
    if row.mnemonic in ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar", "shld", "shrd"):
        size = 8 if row.operands[0] == "Eb" else 16 if 0x66 in case.code[:3] else 32
        last = row.operands[-1]
        raw = 1 if last == "1" else case.registers[1] & 0xFF if last == "CL" else case.code[-1]
        count = raw & 31
        if count == 0:
            undefined = set()
        elif count != 1:
            undefined.add("o")
        if count >= size and row.mnemonic in ("shl", "shr"):
            undefined.add("c")
        if count > size and row.mnemonic in ("shld", "shrd"):
            undefined |= set("oszapc")
    if row.mnemonic in ("bsf", "bsr"):
        undefined = set("osapc")
    return 0xCD5 & ~sum(FLAG_BITS[letter] for letter in undefined)


@dataclass
class Difference:
    """Where the two do not agree."""

    case: Case
    ours: tuple[Any, ...]
    theirs: tuple[Any, ...]
    memory: bool

    def __str__(self) -> str:
        mine, other = self.ours, self.theirs
        parts = [f"{self.case.row.mnemonic} {','.join(self.case.row.operands)} [{self.case.code.hex(' ')}]"]
        if mine[0] != other[0]:
            parts.append(f"vector {mine[0]} / {other[0]}")
        if mine[1] != other[1]:
            parts.append(f"eip {mine[1]:#x} / {other[1]:#x}")
        for name, before, a, b in zip(REGISTERS, self.case.registers, mine[2], other[2], strict=True):
            if a != b:
                parts.append(f"{name} {before:#x} -> {a:#x} / {b:#x}")
        if mine[3] != other[3]:
            parts.append(f"flags {self.case.flags:#x} -> {mine[3]:#x} / {other[3]:#x}")
        if self.memory:
            parts.append("memory")
        return "; ".join(parts)


def compare(count: int, seed: int) -> tuple[list[Difference], dict[Row, int], int]:
    """Run ``count`` cases; the differences, how often each row ran to its end, and cases given up."""
    rng = random.Random(seed)
    table = candidates()
    ours, theirs = Ours(), Unicorn()
    data = rng.randbytes(DATA_SIZE)
    ours.memory.write(DATA, data)
    theirs.uc.mem_write(DATA, data)
    differences: list[Difference] = []
    seen: dict[Row, int] = dict.fromkeys(table, 0)
    outside = done = index = 0
    while done < count:
        row = table[index % len(table)]
        index += 1
        case = make_case(row, rng)
        expected = theirs.run(case)
        if expected[0] == -2:
            # Outside of memory: what Unicorn had stored before it stopped is copied over.
            outside += 1
            ours.memory.write(0, bytes(theirs.uc.mem_read(0, RAM)))
            continue
        got = ours.run(case)
        done += 1
        seen[row] += 1
        mine = ours.memory.read(0, RAM)
        other = bytes(theirs.uc.mem_read(0, RAM))
        mask = flag_mask(case)
        if got[0] >= 0 or expected[0] >= 0:
            # Unicorn tells the vector of an INT only; a fault leaves it where it was.
            same = got[0] >= 0 and expected[1] == CODE and got[2] == expected[2]
        else:
            same = got[:3] == expected[:3] and (got[3] ^ expected[3]) & mask == 0
        if not same or mine != other:
            differences.append(Difference(case, got, expected, mine != other))
        if mine != other:
            ours.memory.write(0, other)
    return differences, seen, outside
