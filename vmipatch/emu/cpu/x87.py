"""x87."""

from __future__ import annotations

from vmipatch.emu.cpu.faults import NM, fault, ud
from vmipatch.emu.cpu.state import CR0_EM, CR0_TS, Core
from vmipatch.emu.cpu.words import cast, i64, u32


def op_wait(c: Core, p: i64) -> i64:
    """WAIT."""
    if c.cr[0] & 0xA == 0xA:
        return fault(c, NM, 0)
    return 0


def op_fpu(c: Core, p: i64) -> i64:
    if c.cr[0] & (CR0_EM | CR0_TS):
        return fault(c, NM, 0)
    return ud(c)


def op_fxsave(c: Core, p: i64) -> i64:
    return ud(c)


def op_fxrstor(c: Core, p: i64) -> i64:
    return ud(c)


def fpu_reset(c: Core) -> None:
    """As FNINIT, and the registers zero."""
    c.fpu_control = 0x37F
    c.fpu_status = 0
    c.fpu_tag = 0xFFFF


def fpu_top(c: Core) -> i64:
    """The register that is ST(0)."""
    return (c.fpu_status >> 11) & 7


def fpu_set_tag(c: Core, at: i64, tag: u32) -> None:
    """Set the tag of a register."""
    c.fpu_tag = (c.fpu_tag & ~(cast(u32, 3) << (2 * at))) | tag << (2 * at)
