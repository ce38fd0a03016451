"""The x87 instructions without a memory operand.

May import words, state, faults, flags, operands, float80, transcendental and x87_state.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu import float80, transcendental
from vmipatch.emu.cpu.faults import ud
from vmipatch.emu.cpu.operands import put16
from vmipatch.emu.cpu.state import EAX, Core
from vmipatch.emu.cpu.words import calls_python, i64, mask32, u32
from vmipatch.emu.cpu.x87_state import (
    SW_C0,
    SW_C1,
    SW_C2,
    SW_C3,
    fpu_arithmetic,
    fpu_is_empty,
    fpu_note,
    fpu_order,
    fpu_order_flags,
    fpu_pop,
    fpu_push,
    fpu_put,
    fpu_raise,
    fpu_raw,
    fpu_reset_registers,
    fpu_set_tag,
    fpu_set_top,
    fpu_settings,
    fpu_stack_underflow,
)


@calls_python
def fpu_register(c: Core, p: i64, which: u32, modrm: u32) -> i64:
    """The forms without memory."""
    reg: u32 = (modrm >> 3) & 7
    index: i64 = modrm & 7
    if which == 3 and reg == 4:
        return fpu_control_operation(c, modrm)
    if which == 7 and modrm == 0xE0:
        put16(c, EAX, c.fpu_status)
        return 0
    known: i64 = 1
    if which == 0 or which == 4 or which == 6:
        known = fpu_arithmetic_register(c, which, reg, index)
    elif which == 1:
        known = fpu_single(c, modrm, reg, index)
    elif which == 2:
        if modrm == 0xE9:
            fpu_order(c, None if fpu_is_empty(c, 1) else fpu_raw(c, 1), 2, True)
        elif reg < 4:
            fpu_conditional_move(c, index, fpu_take_flag(c, reg))
        else:
            known = 0
    elif which == 3:
        if reg < 4:
            fpu_conditional_move(c, index, 1 - fpu_take_flag(c, reg))
        elif reg == 5 or reg == 6:
            fpu_order_flags(c, index, 0, 1 if reg == 5 else 0)
        else:
            known = 0
    elif which == 5:
        known = fpu_free_and_store(c, reg, index)
    elif reg == 5 or reg == 6:
        fpu_order_flags(c, index, 1, 1 if reg == 5 else 0)
    elif reg < 4:
        known = fpu_free_and_store(c, reg if reg < 2 else 3, index)
        if reg == 0:
            fpu_pop(c)  # FFREEP
    else:
        known = 0
    if known == 0:
        return ud(c)
    fpu_note(c, p, which, modrm, 0, -1)
    return 0


def fpu_control_operation(c: Core, modrm: u32) -> i64:
    """FNCLEX, FNINIT, and FENI, FDISI, FSETPM, which do nothing since the 387."""
    if modrm == 0xE2:
        c.fpu_status &= 0x7F00
    elif modrm == 0xE3:
        fpu_reset_registers(c)
    elif modrm > 0xE4:
        return ud(c)
    return 0


def fpu_take_flag(c: Core, which: u32) -> i64:
    """The condition of FCMOVB, FCMOVE, FCMOVBE and FCMOVU."""
    if which == 0:
        return c.aux >> 31
    if which == 1:
        return 1 if mask32(c.res) == 0 else 0
    if which == 2:
        return 1 if mask32(c.res) == 0 or c.aux >> 31 else 0
    byte: i64 = (c.res ^ (c.res >> 32)) & 0xFF
    return (0x9669 >> ((byte ^ (byte >> 4)) & 15)) & 1


def fpu_conditional_move(c: Core, index: int, taken: int) -> None:
    """FCMOVcc."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        if fpu_stack_underflow(c):
            fpu_put(c, 0, float80.INDEFINITE)
    elif taken:
        c.fpu_status &= ~SW_C1
        fpu_put(c, 0, fpu_raw(c, index))


def fpu_arithmetic_register(c: Core, which: int, reg: int, index: int) -> int:
    """FADD..FDIVR between two registers, with and without a pop, and FCOM; 0 if undefined."""
    if reg in (2, 3):
        if which == 6:
            if reg == 2:
                fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), 1, False)
                return 1
            if index != 1:
                return 0
            fpu_order(c, None if fpu_is_empty(c, 1) else fpu_raw(c, 1), 2, False)
            return 1
        fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), reg - 2, False)
        return 1
    to = 0 if which == 0 else index
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        stored = fpu_stack_underflow(c)
        if stored:
            fpu_put(c, to, float80.INDEFINITE)
    elif which == 0:
        stored = fpu_arithmetic(c, reg, 0, fpu_raw(c, 0), fpu_raw(c, index))
    else:
        # DC and DE: ST(i) is the destination; E0 is FSUBR there, E8 FSUB, F0 FDIVR, F8 FDIV.
        stored = fpu_arithmetic(c, reg ^ 1 if reg >= 4 else reg, index, fpu_raw(c, index), fpu_raw(c, 0))
    if which == 6 and stored:
        fpu_pop(c)
    return 1


def fpu_free_and_store(c: Core, reg: int, index: int) -> int:
    """DD: FFREE, FXCH, FST, FSTP, FUCOM, FUCOMP; 0 if undefined.

    FXCH here, and all of DF C0..DF and D9 D8..DF, are second encodings that no
    manual of Intel's has and every processor does (AMD's guides name FFREEP).
    """
    if reg == 0:
        fpu_set_tag(c, (c.fpu_status >> 11) + index & 7, 3)
    elif reg == 1:
        fpu_exchange(c, index)
    elif reg in (2, 3):
        if fpu_is_empty(c, 0):
            if not fpu_stack_underflow(c):
                return 1
            fpu_put(c, index, float80.INDEFINITE)
        else:
            c.fpu_status &= ~SW_C1
            fpu_put(c, index, fpu_raw(c, 0))
        if reg == 3:
            fpu_pop(c)
    elif reg in (4, 5):
        fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), reg - 4, True)
    else:
        return 0
    return 1


# 1, log2(10), log2(e), pi, log10(2), ln(2), 0: cut off behind 64 bits, and what is added to that in the four roundings
# (nearest, down, up, toward zero).  The bits behind decide the nearest.
CONSTANTS = (
    (0x3FFF << 64 | 0x8000000000000000, (0, 0, 0, 0)),
    (0x4000 << 64 | 0xD49A784BCD1B8AFE, (0, 0, 1, 0)),
    (0x3FFF << 64 | 0xB8AA3B295C17F0BB, (1, 0, 1, 0)),
    (0x4000 << 64 | 0xC90FDAA22168C234, (1, 0, 1, 0)),
    (0x3FFD << 64 | 0x9A209A84FBCFF798, (1, 0, 1, 0)),
    (0x3FFE << 64 | 0xB17217F7D1CF79AB, (1, 0, 1, 0)),
    (0, (0, 0, 0, 0)),
)


def fpu_constant(which: int, rounding: int) -> int:
    """FLD1, FLDL2T, FLDL2E, FLDPI, FLDLG2, FLDLN2, FLDZ, in the rounding of the control word."""
    value: int = CONSTANTS[which][0] + CONSTANTS[which][1][rounding]
    return value


def fpu_single(c: Core, modrm: int, reg: int, index: int) -> int:
    """D9: FLD ST, FXCH, constants, and the instructions on ST(0) and ST(1); 0 if undefined."""
    if reg == 0:
        if fpu_is_empty(c, index):
            if fpu_stack_underflow(c):
                fpu_push(c, float80.INDEFINITE)
        else:
            fpu_push(c, fpu_raw(c, index))
        return 1
    if reg == 1:
        fpu_exchange(c, index)
        return 1
    if modrm == 0xD0:
        return 1
    if reg == 3:
        return fpu_free_and_store(c, 3, index)
    if reg == 5 and modrm != 0xEF:
        fpu_push(c, fpu_constant(index, c.fpu_control >> 10 & 3))
        return 1
    if modrm == 0xE5:
        fpu_examine(c)
        return 1
    if modrm in (0xF6, 0xF7):
        fpu_set_top(c, (c.fpu_status >> 11) + (1 if modrm == 0xF7 else -1))
        c.fpu_status &= ~SW_C1
        return 1
    if modrm in (0xE0, 0xE1):
        if fpu_is_empty(c, 0):
            if fpu_stack_underflow(c):
                fpu_put(c, 0, float80.INDEFINITE)
        else:
            c.fpu_status &= ~SW_C1
            value = fpu_raw(c, 0)
            fpu_put(c, 0, value ^ float80.SIGN if modrm == 0xE0 else value & ~float80.SIGN)
        return 1
    if modrm == 0xE4:
        fpu_order(c, 0, 0, False)
        return 1
    if modrm < 0xF0:
        return 0
    return fpu_function(c, modrm)


def fpu_exchange(c: Core, index: int) -> None:
    """FXCH."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        if not fpu_stack_underflow(c):
            return
        for at in (0, index):
            if fpu_is_empty(c, at):
                fpu_put(c, at, float80.INDEFINITE)
    else:
        c.fpu_status &= ~SW_C1
    first, second = fpu_raw(c, 0), fpu_raw(c, index)
    fpu_put(c, 0, second)
    fpu_put(c, index, first)


@calls_python
def fpu_examine(c: Core) -> None:
    """FXAM."""
    value = fpu_raw(c, 0)
    bits = SW_C1 if value >> 79 else 0
    if fpu_is_empty(c, 0):
        bits |= SW_C3 | SW_C0
    elif float80.is_unsupported(value):
        bits |= 0
    elif float80.is_nan(value):
        bits |= SW_C0
    elif float80.is_infinite(value):
        bits |= SW_C2 | SW_C0
    elif float80.is_zero(value):
        bits |= SW_C3
    elif float80.is_denormal(value):
        bits |= SW_C3 | SW_C2
    else:
        bits |= SW_C2
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits


ONE_OPERAND = {
    0xF0: "exp2_minus_1",
    0xFA: "square_root",
    0xFC: "round_to_integer",
    0xFE: "sine",
    0xFF: "cosine",
}
TWO_OPERANDS = {0xF1: "y_log2_x", 0xF3: "arctangent", 0xF9: "y_log2_x_plus_1"}


def fpu_function(c: Core, modrm: int) -> int:
    """D9 F0..FF."""
    control = fpu_settings(c)
    # These round to 64 bits whatever the precision control says, but for FSQRT.
    wide = float80.Control(64, control.rounding, control.masks)
    two = modrm in TWO_OPERANDS or modrm in (0xF5, 0xF8, 0xFD)
    if fpu_is_empty(c, 0) or (two and fpu_is_empty(c, 1)):
        if fpu_stack_underflow(c):
            at = 1 if modrm in TWO_OPERANDS else 0
            fpu_put(c, at, float80.INDEFINITE)
            if modrm in TWO_OPERANDS:
                fpu_pop(c)
            elif modrm in (0xF2, 0xF4, 0xFB):
                fpu_push(c, float80.INDEFINITE)
        return 1
    a = fpu_raw(c, 0)
    if modrm in (0xF2, 0xFB, 0xFE, 0xFF):
        if transcendental.out_of_range(a):
            c.fpu_status |= SW_C2
            return 1
        c.fpu_status &= ~SW_C2
    if modrm in ONE_OPERAND:
        home = float80 if modrm in (0xFA, 0xFC) else transcendental
        result, flags = getattr(home, ONE_OPERAND[modrm])(a, control if modrm == 0xFA else wide)
        if fpu_raise(c, flags):
            fpu_put(c, 0, result)
    elif modrm in TWO_OPERANDS:
        b = fpu_raw(c, 1)
        operation = getattr(transcendental, TWO_OPERANDS[modrm])
        result, flags = operation(b, a, wide) if modrm == 0xF3 else operation(a, b, wide)
        if fpu_raise(c, flags):
            fpu_put(c, 1, result)
            fpu_pop(c)
    elif modrm == 0xFD:
        result, flags = float80.scale(a, fpu_raw(c, 1), control)
        if fpu_raise(c, flags):
            fpu_put(c, 0, result)
    elif modrm in (0xF5, 0xF8):
        fpu_remainder(c, a, fpu_raw(c, 1), control, modrm == 0xF5)
    elif modrm == 0xF4:
        exponent, significand, flags = float80.extract(a)
        fpu_two_results(c, exponent, significand, flags)
    elif modrm == 0xF2:
        result, flags = transcendental.tangent(a, wide)
        one = result if float80.is_nan(result) else float80.ONE
        fpu_two_results(c, result, one, flags)
    else:
        result, flags = transcendental.sine(a, wide)
        other, more = transcendental.cosine(a, wide)
        fpu_two_results(c, result, other, flags | more)
    return 1


def fpu_two_results(c: Core, first: int, second: int, flags: int) -> None:
    """Replace ST(0) by the first result and push the second."""
    if not fpu_is_empty(c, 7):
        stored = fpu_raise(c, float80.INVALID | float80.STACK)
        c.fpu_status |= SW_C1
        if not stored:
            return
        first = second = float80.INDEFINITE
    elif not fpu_raise(c, flags):
        return
    fpu_put(c, 0, first)
    fpu_set_top(c, (c.fpu_status >> 11) - 1)
    fpu_put(c, 0, second)


def fpu_remainder(c: Core, a: int, b: int, control: Any, nearest: bool) -> None:
    """FPREM and FPREM1, with the quotient's low bits in C0, C3 and C1."""
    result, flags, quotient, partial = float80.remainder(a, b, control, nearest=nearest)
    if not fpu_raise(c, flags):
        return
    fpu_put(c, 0, result)
    bits = SW_C2 if partial else 0
    if not partial:
        bits |= (SW_C0 if quotient & 4 else 0) | (SW_C3 if quotient & 2 else 0) | (SW_C1 if quotient & 1 else 0)
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits
