"""What instructions are: boundaries and parts by our own opcode maps, text for people by capstone.

capstone is wrong about some lengths (it gives UD1 and UD0 no ModRM byte) and refuses instructions that are newer than
it: where it does not agree with the maps, a sensitive instruction has its name, any other its bytes.  It is imported
on first use: it costs start-up time.  Imports its sisters opcodes and sensitive.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from vmipatch.isa import opcodes, sensitive
from vmipatch.isa.opcodes import Parts


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
    found, at = [], 0
    while at < len(code) and (parts := opcodes.parts(code, bits, at)) is not None:
        found.append(parts.size)
        at += parts.size
    return found


def covers(code: bytes, bits: int) -> bool:
    """Whether ``code`` is a whole number of instructions, at least one."""
    return bool(code) and sum(lengths(code, bits)) == len(code)


_UNDEFINED = {("0f", 0xB9): "ud1", ("0f", 0xFF): "ud0"}
"""What capstone gives a wrong length (SDM vol. 2, UD: each has a ModRM byte)."""


def disassemble(code: bytes, bits: int, address: int) -> list[Instruction]:
    """All of ``code``; a byte that starts no instruction becomes ``(bad)``, one byte long."""
    result: list[Instruction] = []
    position = 0
    while position < len(code):
        parts = opcodes.parts(code, bits, position)
        size = 1 if parts is None else parts.size
        own = code[position : position + size]
        result.append(Instruction(address + position, own, _text(own, parts, bits, address + position)))
        position += size
    return result


def _text(code: bytes, parts: Parts | None, bits: int, address: int) -> str:
    """The text of one instruction: capstone's where it takes as many bytes."""
    if parts is None:
        return "(bad)"
    if parts.opcode in _UNDEFINED:
        # CMP has the same operands, and every decoder knows it.
        like = code[: parts.after - 2] + b"\x3b" + code[parts.after :]
        return f"{_UNDEFINED[parts.opcode]} {_capstones(like, bits, address).partition(' ')[2]}"
    return _capstones(code, bits, address) or sensitive.name(code, parts, bits) or f"(unknown) {code.hex(' ')}"


def _capstones(code: bytes, bits: int, address: int) -> str:
    found = list(engine(bits).disasm_lite(code, address))
    return f"{found[0][2]} {found[0][3]}".rstrip() if len(found) == 1 and found[0][1] == len(code) else ""


class Detailed(NamedTuple):
    """Where the parts of one instruction lie; offsets and sizes in bytes from its start.

    ``opcode`` is the first opcode byte after prefixes; ``branch`` a relative jump or call that Linux moves with its
    code (not LOOP, JCXZ, XBEGIN), whose signed displacement is ``immediate``; ``rip_offset`` the place
    of a RIP-relative displacement, 0 if there is none; ``nop`` what Linux 6.4's
    ``insn_is_nop`` takes for one, ``any_nop`` that of 6.19 (:func:`is_any_nop`).
    """

    size: int
    opcode: int
    nop: bool
    any_nop: bool
    branch: bool
    immediate: int
    immediate_offset: int
    immediate_size: int
    rip_offset: int


def detailed(code: bytes, bits: int) -> Detailed | None:
    """The parts of the instruction that ``code`` starts with, or None if it starts with none."""
    parts = opcodes.parts(code, bits)
    if parts is None:
        return None
    own = code[: parts.size]
    opcode = code[len(parts.prefixes)]
    branch = opcode in _BRANCHES or (parts.opcode[0] == "0f" and parts.opcode[1] in _NEAR_CONDITIONS)
    at, width = parts.immediate
    immediate = int.from_bytes(code[at : at + width], "little", signed=True) if branch else 0
    place = parts.displacement[0] if parts.relative else 0
    return Detailed(parts.size, opcode, is_nop(own, bits), is_any_nop(own, bits), branch, immediate, at, width, place)


_BRANCHES = frozenset((*range(0x70, 0x80), 0xE8, 0xE9, 0xEB))
_NEAR_CONDITIONS = range(0x80, 0x90)
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_REP, _DS, _OPERAND_SIZE = 0xF3, 0x3E, 0x66
_REX = range(0x40, 0x50)
_NO_INDEX = 4


def _opened(code: bytes, bits: int) -> tuple[bytes, int, bytes]:
    """One instruction as its legacy prefixes, its REX prefix (0 for none) and the rest, opcode first."""
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    prefixes = code[:at]
    rex = 0
    if bits == 64 and at < len(code) and code[at] in _REX:
        rex = code[at]
        at += 1
    return prefixes, rex, code[at:]


def is_nop(code: bytes, bits: int) -> bool:
    """What ``insn_is_nop`` of arch/x86/kernel/alternative.c in 6.4 to 6.18 takes for a nop: ``90``, but no PAUSE, and
    ``0F 1F``.
    """
    prefixes, _, rest = _opened(code, bits)
    return (rest[:1] == b"\x90" and prefixes[:1] != bytes((_REP,))) or rest[:2] == b"\x0f\x1f"


def is_any_nop(code: bytes, bits: int) -> bool:
    """What ``insn_is_nop`` of arch/x86/lib/insn-eval.c in 7.2 and 7.3 takes for a nop.

    Besides ``90`` (but no PAUSE, no XCHG with another register) and ``0F 1F /0``: MOV of a register to itself, LEA of
    one without a displacement, at the size of the mode, and a jump to what follows.
    """
    prefixes, rex, rest = _opened(code, bits)
    if not rest:
        return False
    opcode, body = rest[0], rest[1:]
    if opcode == 0x90:
        return not rex & 1 and _REP not in prefixes
    if opcode in (0xE9, 0xEB):
        return bool(body) and not any(body)
    if opcode == 0x0F:
        return len(body) > 1 and body[0] == 0x1F and not (body[1] >> 3 & 7) + 2 * (rex & 4)
    if opcode not in (0x89, 0x8D) or not body:
        return False
    native = bool(rex & 8) if bits == 64 else _OPERAND_SIZE not in prefixes
    mode, register, memory = body[0] >> 6, (body[0] >> 3 & 7) + 2 * (rex & 4), (body[0] & 7) + 8 * (rex & 1)
    if not native:
        return False
    if opcode == 0x89:
        return mode == 3 and register == memory
    if mode in (0, 3) or set(prefixes) - {_DS}:
        return False
    rest = body[1:]
    if body[0] & 7 == 4:
        sib, rest = rest[0], rest[1:]
        if sib >> 6 or (sib >> 3 & 7) + 4 * (rex & 2) != _NO_INDEX:
            return False
        memory = (sib & 7) + 8 * (rex & 1)
    return register == memory and not any(rest)
