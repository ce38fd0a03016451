"""The way into the x87 unit: #NM, pending exceptions, and which kind of instruction it is.

May import words, state, faults, access, operands, transfer and the other x87 modules.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import effective
from vmipatch.emu.cpu.faults import NM, fault, ud
from vmipatch.emu.cpu.operands import MARK_MEMORY, marks, segment_of
from vmipatch.emu.cpu.state import CR0_EM, CR0_MP, CR0_TS, Core
from vmipatch.emu.cpu.transfer import this_eip
from vmipatch.emu.cpu.words import i64, mask32, u32
from vmipatch.emu.cpu.x87_memory import fpu_memory
from vmipatch.emu.cpu.x87_register import fpu_register
from vmipatch.emu.cpu.x87_state import fpu_pending


def op_wait(c: Core, p: i64) -> i64:
    """WAIT."""
    if c.cr[0] & CR0_MP and c.cr[0] & CR0_TS:
        return fault(c, NM, 0)
    return fpu_pending(c)


def op_fpu(c: Core, p: i64) -> i64:
    """Any instruction of the opcodes D8..DF."""
    if c.cr[0] & (CR0_EM | CR0_TS):
        return fault(c, NM, 0)
    which: u32 = c.code[p + 7] >> 8
    modrm: u32 = c.code[p + 7] & 0xFF
    reg: u32 = (modrm >> 3) & 7
    memory: u32 = marks(c, p) & MARK_MEMORY
    waits: u32 = 1
    control: u32 = 0
    if memory:
        control = 1 if (which == 1 or which == 5) and reg >= 4 else 0
        if (which == 1 and reg >= 6) or (which == 5 and reg >= 6):
            waits = 0
        if which == 5 and reg == 5:
            return ud(c)
    elif (which == 3 and reg == 4) or (which == 7 and modrm == 0xE0):
        control = 1
        waits = 0
    if waits and fpu_pending(c) < 0:
        return -1
    if control == 0:
        c.fpu_next_ip = this_eip(c, p)
    if memory:
        return fpu_memory(c, p, which, reg, mask32(effective(c, p)), segment_of(c, p), control)
    return fpu_register(c, p, which, modrm)
