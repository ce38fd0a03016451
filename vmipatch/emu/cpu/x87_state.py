"""The x87 unit's registers and status: the stack, tags, exceptions, arithmetic and comparison.

May import words, state, faults, flags and float80.  The arithmetic is
float80's, on whole numbers: exact, and the same compiled and uncompiled.
``mm_low`` and ``mm_high`` hold the eight physical registers (significand as a
signed 64-bit word, sign and exponent), ``fpu_status`` has TOP in bits 11..13,
``fpu_tag`` two bits a register of which only "empty" (3) is kept up; the others
are worked out when somebody looks.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu import float80
from vmipatch.emu.cpu.faults import MF, fault
from vmipatch.emu.cpu.flags import set_flags
from vmipatch.emu.cpu.state import CR0_NE, CS, Core
from vmipatch.emu.cpu.words import calls_python, cast, i64, mask32, u32

SW_C0 = 0x100
SW_C1 = 0x200
SW_C2 = 0x400
SW_C3 = 0x4000
SW_ES = 0x80
SW_BUSY = 0x8000
FAULTED = -1


def fpu_top(c: Core) -> i64:
    """The register that is ST(0)."""
    return (c.fpu_status >> 11) & 7


def fpu_set_tag(c: Core, at: i64, tag: u32) -> None:
    """Set the tag of a register."""
    c.fpu_tag = (c.fpu_tag & ~(cast(u32, 3) << (2 * at))) | tag << (2 * at)


def fpu_set_top(c: Core, top: i64) -> None:
    """Make a register ST(0)."""
    c.fpu_status = (c.fpu_status & ~mask32(0x3800)) | mask32((top & 7) << 11)


def fpu_reset(c: Core) -> None:
    """FNINIT, and RESET."""
    c.fpu_control = 0x37F
    c.fpu_status = 0
    c.fpu_tag = 0xFFFF
    c.fpu_opcode = 0
    c.fpu_ip = 0
    c.fpu_cs = 0
    c.fpu_dp = 0
    c.fpu_ds = 0
    c.mxcsr = 0x1F80


def fpu_summary(c: Core) -> None:
    """Work out ES and B from the flags and the masks."""
    if c.fpu_status & ~c.fpu_control & 0x3F:
        c.fpu_status |= SW_ES | SW_BUSY
    else:
        c.fpu_status &= ~(SW_ES | SW_BUSY)


def fpu_pending(c: Core) -> i64:
    """What an unmasked exception of an earlier instruction does to a waiting one: #MF, or FERR#."""
    if c.fpu_status & SW_ES:
        if c.cr[0] & CR0_NE:
            return fault(c, MF, 0)
        c.ferr = 1
    return 0


def fpu_note(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> None:
    """Keep the pointers of a non-control instruction that was carried out."""
    c.fpu_ip = c.fpu_next_ip
    c.fpu_cs = c.sel[CS]
    c.fpu_opcode = which << 8 | (c.code[p + 7] & 0xFF)
    if seg >= 0:
        c.fpu_dp = ea
        c.fpu_ds = c.sel[seg]


def fpu_settings(c: Core) -> Any:
    """Precision, rounding and masks of the control word."""
    word = c.fpu_control
    return float80.Control((24, 64, 53, 64)[word >> 8 & 3], word >> 10 & 3, word & 0x3F)


def whole(value: object) -> Any:
    """A C number as a Python integer, which a shift cannot overflow."""
    return value


def fpu_raw(c: Core, index: int) -> Any:
    """The pattern of ST(index), whatever its tag."""
    at: i64 = (fpu_top(c) + index) & 7
    high: Any = whole(c.mm_high[at])
    low: Any = whole(c.mm_low[at])
    return high << 64 | low & 0xFFFFFFFFFFFFFFFF


def fpu_put(c: Core, index: i64, value: object) -> None:
    """Set ST(index), which becomes full."""
    at: i64 = (fpu_top(c) + index) & 7
    pattern: Any = value
    low: Any = pattern & 0xFFFFFFFFFFFFFFFF
    c.mm_low[at] = low - 0x10000000000000000 if low >> 63 else low
    c.mm_high[at] = (pattern >> 64) & 0xFFFF
    fpu_set_tag(c, at, 0)


def fpu_is_empty(c: Core, index: int) -> bool:
    at = (c.fpu_status >> 11) + index & 7
    return bool(c.fpu_tag >> 2 * at & 3 == 3)


@calls_python
def fpu_pop(c: Core) -> None:
    """Free ST(0) and move the stack."""
    top = c.fpu_status >> 11 & 7
    c.fpu_tag |= 3 << 2 * top
    c.fpu_status = c.fpu_status & ~0x3800 | (top + 1 & 7) << 11


def fpu_raise(c: Core, flags: int) -> bool:
    """Take an operation's exceptions into the status word; whether its result may be stored."""
    c.fpu_status = c.fpu_status & ~SW_C1 | flags & 0x7F | flags & float80.UP
    unmasked = flags & ~c.fpu_control & 0x3F
    if c.fpu_status & ~c.fpu_control & 0x3F:
        c.fpu_status |= SW_ES | SW_BUSY
    return not unmasked & float80.BEFORE


def fpu_stack_underflow(c: Core) -> bool:
    """A read of an empty register; whether the indefinite may be stored in its place."""
    return fpu_raise(c, float80.INVALID | float80.STACK)


def fpu_push(c: Core, value: int, flags: int = 0) -> None:
    """Load a value on the stack; onto a full register it is a stack fault and loads the indefinite."""
    if not fpu_is_empty(c, 7):
        stored = fpu_raise(c, float80.INVALID | float80.STACK)
        c.fpu_status |= SW_C1
        if not stored:
            return
        value = float80.INDEFINITE
    elif not fpu_raise(c, flags):
        return
    c.fpu_status = c.fpu_status & ~0x3800 | ((c.fpu_status >> 11) - 1 & 7) << 11
    fpu_put(c, 0, value)


def fpu_arithmetic(c: Core, operation: int, to: int, a: int, b: int, flags: int = 0) -> bool:
    """ADD MUL SUB SUBR DIV DIVR (0 1 4 5 6 7) of two patterns into ST(to); whether it was stored."""
    control = fpu_settings(c)
    if operation in (5, 7):
        a, b = b, a
    if operation == 0:
        result, more = float80.add(a, b, control)
    elif operation == 1:
        result, more = float80.multiply(a, b, control)
    elif operation in (4, 5):
        result, more = float80.add(a, b, control, subtract=True)
    else:
        result, more = float80.divide(a, b, control)
    if not fpu_raise(c, flags | more):
        return False
    fpu_put(c, to, result)
    return True


def fpu_set_order(c: Core, order: int) -> None:
    """C0, C2 and C3 for an order of -1, 0, 1 or 2 (unordered)."""
    bits = {-1: SW_C0, 0: SW_C3, 1: 0, 2: SW_C0 | SW_C2 | SW_C3}[order]
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits


def fpu_order(c: Core, b: int | None, pops: int, quiet: bool, flags: int = 0) -> None:
    """FCOM and its kin: ST(0) with ``b`` (None: an empty register)."""
    if b is None or fpu_is_empty(c, 0):
        order, more = 2, float80.INVALID | float80.STACK
    else:
        order, more = float80.compare(fpu_raw(c, 0), b, unordered_is_quiet=quiet)
    stored = fpu_raise(c, flags | more)
    fpu_set_order(c, order)
    if stored:
        for _ in range(pops):
            fpu_pop(c)


@calls_python
def fpu_order_flags(c: Core, index: i64, pops: i64, quiet: i64) -> None:
    """FCOMI and its kin: into ZF, PF and CF."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        order, more = 2, float80.INVALID | float80.STACK
    else:
        order, more = float80.compare(fpu_raw(c, 0), fpu_raw(c, index), unordered_is_quiet=bool(quiet))
    stored = fpu_raise(c, more)
    if not stored and order == 2:
        return
    bits: u32 = {-1: 1, 0: 0x40, 1: 0, 2: 0x45}[order]
    set_flags(c, bits)
    if stored and pops:
        fpu_pop(c)


@calls_python
def fpu_reset_registers(c: Core) -> None:
    """FNINIT, which leaves MXCSR alone."""
    mxcsr: u32 = c.mxcsr
    fpu_reset(c)
    c.mxcsr = mxcsr
