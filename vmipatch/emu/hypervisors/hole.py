"""What a faulting instruction of the guest wanted, in the hole or elsewhere.  capstone is imported when it is asked.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vmipatch.emu.cpu import Cpu


# capstone 5 calls these reads, or gives their operands no size.
WRITERS = frozenset(("cmpxchg", "cmpxchg8b", "fst", "fstp", "fist", "fistp", "fisttp"))
SIZES = {"sgdt": 6, "sidt": 6, "sldt": 2, "str": 2, "smsw": 2, "fnstenv": 28, "fnsave": 108, "fxsave": 512}
PUSHERS = ("push", "call", "lcall", "enter", "int")


@cache
def _decoder() -> Any:
    import capstone

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    decoder.detail = True
    return decoder


class _Operand(NamedTuple):
    """One memory operand as the bytes say it: registers by name, "" for none."""

    segment: str
    base: str
    scaled: str
    scale: int
    displacement: int
    bits: str
    size: int
    is_written: bool


@lru_cache(maxsize=4096)
def _operands(code: bytes) -> tuple[_Operand, ...]:
    import capstone
    from capstone import x86

    found = next(_decoder().disasm(code, 0, 1), None)
    if found is None:
        return ()
    word = found.mnemonic.split()[-1] if found.mnemonic.startswith("lock") else found.mnemonic
    out = []
    for operand in found.operands:
        if operand.type == x86.X86_OP_MEM:
            memory = operand.mem
            base, index = _name(found, memory.base), _name(found, memory.index)
            segment = found.reg_name(memory.segment) if memory.segment else _segment(found, base)
            # A register counts bits from the operand on, in both directions (SDM 2, BTS).
            counts = word in ("bts", "btr", "btc") and found.operands[1].type == x86.X86_OP_REG
            bits = _name(found, found.operands[1].reg) if counts else ""
            is_written = bool(operand.access & capstone.CS_AC_WRITE) or word in WRITERS
            size = SIZES.get(word, max(1, operand.size))
            out.append(_Operand(segment, base, index, memory.scale, memory.disp, bits, size, is_written))
    if word.startswith(PUSHERS):
        out.append(_Operand("ss", "esp", "", 1, -4, "", 4, True))
    return tuple(out)


def accesses(cpu: Cpu, code: bytes) -> Iterator[tuple[str, int, int, bool]]:
    """Segment register, offset, bytes and whether it is written, of each memory operand of an instruction.

    What PUSH and the like write to the stack is one more; what POP reads is not told.
    """
    for operand in _operands(code):
        offset = _value(cpu, operand.base) + _value(cpu, operand.scaled) * operand.scale + operand.displacement
        if operand.bits:
            bits = _value(cpu, operand.bits)
            offset += 4 * ((bits - (bits >> 31 << 32)) >> 5)
        yield operand.segment, offset & 0xFFFF_FFFF, operand.size, operand.is_written


def written(cpu: Cpu, code: bytes, hole: int) -> int | None:
    """The linear address in the hole (at or above ``hole``) that the instruction writes to; None if there is none."""
    for segment, offset, size, is_written in accesses(cpu, code):
        at = cpu.get(f"{segment}_base") + offset & 0xFFFF_FFFF
        if is_written and at + size > hole:
            return at
    return None


def _name(found: Any, register: int) -> str:
    name = str(found.reg_name(register)) if register else ""
    return "" if name in ("eiz", "riz") else name


def _value(cpu: Cpu, name: str) -> int:
    if not name:
        return 0
    return cpu.get(name) if name.startswith("e") else cpu.get("e" + name) & 0xFFFF


def _segment(found: Any, base: str) -> str:
    if base in ("esp", "ebp", "bp"):
        return "ss"
    return "es" if base == "edi" and found.mnemonic.split()[-1][:3] in ("sto", "mov", "ins") else "ds"
