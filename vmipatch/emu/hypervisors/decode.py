"""Just enough decoding to do a privileged instruction for the guest: prefixes, opcode, ModRM operand, length.

Imports nothing of the package.  Fields: Intel SDM 2, chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmipatch.emu.cpu import Cpu

SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
PAIRS_16 = (("ebx", "esi"), ("ebx", "edi"), ("ebp", "esi"), ("ebp", "edi"), ("esi",), ("edi",), ("ebp",), ("ebx",))


@dataclass(frozen=True)
class Operand:
    """A ModRM byte: ``reg`` and, for a register operand, ``rm``; else segment and offset of the memory operand."""

    reg: int
    rm: int
    segment: str
    offset: int
    length: int

    @property
    def is_register(self) -> bool:
        """Whether the operand is a register."""
        return not self.segment


@dataclass(frozen=True)
class Prefixed:
    """An instruction's prefixes and where its opcode is."""

    opcode: int  # two-byte opcodes have 0x0F00 added
    wide: bool  # 32-bit operands
    wide_address: bool
    segment: str  # override, or ""
    repeat: int  # 0, 0xF2 or 0xF3
    length: int  # bytes up to and with the opcode


def fetch(cpu: Cpu) -> bytes:
    """Up to 15 bytes at CS:EIP."""
    at = cpu.linear_eip
    code = cpu.read_linear(at, 15)
    if code is None:
        code = cpu.read_linear(at, min(15, 4096 - at % 4096)) or b""
    return code


def prefixes(code: bytes, wide: bool) -> Prefixed | None:
    """The opcode behind its prefixes; None if the bytes end too early."""
    operand = address = wide
    segment = ""
    repeat = 0
    for at, byte in enumerate(code):
        if byte == 0x66:
            operand = not wide
        elif byte == 0x67:
            address = not wide
        elif byte in SEGMENT_PREFIXES:
            segment = SEGMENT_PREFIXES[byte]
        elif byte in (0xF2, 0xF3):
            repeat = byte
        elif byte != 0xF0:
            if byte != 0x0F:
                return Prefixed(byte, operand, address, segment, repeat, at + 1)
            if at + 1 < len(code):
                return Prefixed(0x0F00 | code[at + 1], operand, address, segment, repeat, at + 2)
            return None
    return None


def operand(cpu: Cpu, code: bytes, found: Prefixed) -> Operand | None:
    """The ModRM operand behind the opcode; None if the bytes end too early."""
    at = found.length
    if at >= len(code):
        return None
    modrm = code[at]
    mod, reg, rm = modrm >> 6, modrm >> 3 & 7, modrm & 7
    if mod == 3:
        return Operand(reg, rm, "", 0, at + 1)
    return (_operand32 if found.wide_address else _operand16)(cpu, code, found, mod, reg, rm)


def _operand32(cpu: Cpu, code: bytes, found: Prefixed, mod: int, reg: int, rm: int) -> Operand | None:
    at = found.length + 1
    offset = 0
    base: int | None = rm
    if rm == 4:
        if at >= len(code):
            return None
        sib = code[at]
        at += 1
        base = sib & 7
        if sib >> 3 & 7 != 4:
            offset = cpu.get(REGISTERS[sib >> 3 & 7]) << (sib >> 6)
    size = (0, 1, 4)[mod]
    if base == 5 and mod == 0:
        base, size = None, 4
    if base is not None:
        offset += cpu.get(REGISTERS[base])
    if at + size > len(code):
        return None
    offset += int.from_bytes(code[at : at + size], "little", signed=True)
    default = "ss" if base in (4, 5) else "ds"
    return Operand(reg, rm, found.segment or default, offset & 0xFFFF_FFFF, at + size)


def _operand16(cpu: Cpu, code: bytes, found: Prefixed, mod: int, reg: int, rm: int) -> Operand | None:
    at = found.length + 1
    size = (0, 1, 2)[mod]
    names: tuple[str, ...] = PAIRS_16[rm]
    if rm == 6 and mod == 0:
        names, size = (), 2
    if at + size > len(code):
        return None
    offset = sum(cpu.get(name) for name in names) + int.from_bytes(code[at : at + size], "little", signed=True)
    default = "ss" if "ebp" in names else "ds"
    return Operand(reg, rm, found.segment or default, offset & 0xFFFF, at + size)
