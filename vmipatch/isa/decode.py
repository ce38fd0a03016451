"""Instruction boundaries and text, from capstone (imported on first use: it costs start-up time)."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """One decoded instruction; ``address`` is virtual, ``text`` Intel syntax."""

    address: int
    code: bytes
    text: str


@cache
def engine(bits: int) -> Any:
    """A capstone engine for 16, 32 or 64-bit code, without details."""
    import capstone

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    return capstone.Cs(capstone.CS_ARCH_X86, mode)


def lengths(code: bytes, bits: int) -> list[int]:
    """The lengths in bytes of the instructions that ``code`` starts with, up to the first bad one."""
    return [size for _, size, _, _ in engine(bits).disasm_lite(code, 0)]


def covers(code: bytes, bits: int) -> bool:
    """Whether ``code`` is a whole number of instructions, at least one."""
    return bool(code) and sum(lengths(code, bits)) == len(code)


def disassemble(code: bytes, bits: int, address: int) -> list[Instruction]:
    """All of ``code``; a byte that starts no instruction becomes ``(bad)``, one byte long."""
    result: list[Instruction] = []
    position = 0
    while position < len(code):
        start = position
        for at, size, mnemonic, operands in engine(bits).disasm_lite(code[position:], address + position):
            text = f"{mnemonic} {operands}".rstrip()
            result.append(Instruction(at, code[position : position + size], text))
            position += size
        if position < len(code):
            result.append(Instruction(address + position, code[position : position + 1], "(bad)"))
            position += 1
        assert position > start
    return result


class Detailed(NamedTuple):
    """Where the parts of one instruction lie; offsets and sizes in bytes from its start.

    ``opcode`` is the first opcode byte after prefixes; ``branch`` a relative jump
    or call, whose signed displacement is ``immediate``; ``rip_offset`` the place
    of a RIP-relative displacement, 0 if there is none; ``nop`` what Linux 6.4's
    ``insn_is_nop`` takes for one (``90`` without REP, ``0F 1F``).
    """

    size: int
    opcode: int
    nop: bool
    branch: bool
    immediate: int
    immediate_offset: int
    immediate_size: int
    rip_offset: int


@cache
def _detailed_engine(bits: int) -> Any:
    import capstone

    made = capstone.Cs(capstone.CS_ARCH_X86, {32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits])
    made.detail = True
    return made


def detailed(code: bytes, bits: int) -> Detailed | None:
    """The parts of the instruction that ``code`` starts with, or None if it starts with none."""
    import capstone.x86_const as x86
    from capstone import CS_GRP_BRANCH_RELATIVE

    for found in _detailed_engine(bits).disasm(code, 0, 1):
        opcode = found.opcode[0]
        nop = (opcode == 0x90 and found.prefix[0] != 0xF3) or (opcode == 0x0F and found.opcode[1] == 0x1F)
        # XBEGIN counts as a relative branch too, and moves like one.
        branch = found.group(CS_GRP_BRANCH_RELATIVE) or opcode == 0xE8
        at, width = found.encoding.imm_offset, found.encoding.imm_size
        immediate = int.from_bytes(code[at : at + width], "little", signed=True) if branch else 0
        rip = any(o.type == x86.X86_OP_MEM and o.mem.base == x86.X86_REG_RIP for o in found.operands)
        return Detailed(found.size, opcode, nop, branch, immediate, at, width, found.encoding.disp_offset if rip else 0)
    return None
