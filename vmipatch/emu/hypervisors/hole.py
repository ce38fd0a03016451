"""What a faulting instruction of the guest wanted, in the hole or elsewhere.  capstone is imported when it is asked.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

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


def accesses(cpu: Cpu, code: bytes) -> Iterator[tuple[str, int, int, bool]]:
    """Segment register, offset, bytes and whether it is written, of each memory operand of an instruction.

    What PUSH and the like write to the stack is one more; what POP reads is not told.
    """
    import capstone
    from capstone import x86

    found = next(_decoder().disasm(code, 0, 1), None)
    if found is None:
        return
    word = found.mnemonic.split()[-1] if found.mnemonic.startswith("lock") else found.mnemonic
    for operand in found.operands:
        if operand.type == x86.X86_OP_MEM:
            memory = operand.mem
            offset = _value(cpu, found, memory.base) + _value(cpu, found, memory.index) * memory.scale + memory.disp
            segment = found.reg_name(memory.segment) if memory.segment else _segment(found, memory.base)
            if word in ("bts", "btr", "btc") and found.operands[1].type == x86.X86_OP_REG:
                # A register counts bits from the operand on, in both directions (SDM 2, BTS).
                bits = _value(cpu, found, found.operands[1].reg)
                offset += 4 * ((bits - (bits >> 31 << 32)) >> 5)
            is_written = bool(operand.access & capstone.CS_AC_WRITE) or word in WRITERS
            yield segment, offset & 0xFFFF_FFFF, SIZES.get(word, max(1, operand.size)), is_written
    if word.startswith(PUSHERS):
        yield "ss", cpu.get("esp") - 4 & 0xFFFF_FFFF, 4, True


def written(cpu: Cpu, code: bytes, hole: int) -> int | None:
    """The linear address in the hole (at or above ``hole``) that the instruction writes to; None if there is none."""
    for segment, offset, size, is_written in accesses(cpu, code):
        at = cpu.get(f"{segment}_base") + offset & 0xFFFF_FFFF
        if is_written and at + size > hole:
            return at
    return None


def _value(cpu: Cpu, found: Any, register: int) -> int:
    name = found.reg_name(register) if register else ""
    if not name or name in ("eiz", "riz"):
        return 0
    return cpu.get(name) if name.startswith("e") else cpu.get("e" + name) & 0xFFFF


def _segment(found: Any, base: int) -> str:
    name = found.reg_name(base) if base else ""
    if name in ("esp", "ebp", "bp"):
        return "ss"
    return "es" if name == "edi" and found.mnemonic.split()[-1][:3] in ("sto", "mov", "ins") else "ds"
