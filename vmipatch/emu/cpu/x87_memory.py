"""The x87 instructions with a memory operand: loads, stores, arithmetic, environments, FXSAVE.

May import words, state, faults, access, operands, float80 and x87_state.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu import float80
from vmipatch.emu.cpu.access import effective, read, write
from vmipatch.emu.cpu.faults import NM, fault, ud
from vmipatch.emu.cpu.operands import MARK_SIZE16, marks, read_sized, segment_of, write_sized
from vmipatch.emu.cpu.state import CR0_EM, CR0_TS, Core
from vmipatch.emu.cpu.words import calls_python, i64, mask32, u32
from vmipatch.emu.cpu.x87_state import (
    FAULTED,
    fpu_arithmetic,
    fpu_is_empty,
    fpu_note,
    fpu_order,
    fpu_pop,
    fpu_push,
    fpu_put,
    fpu_raise,
    fpu_raw,
    fpu_reset_registers,
    fpu_set_tag,
    fpu_settings,
    fpu_stack_underflow,
    fpu_summary,
    whole,
)


@calls_python
def fpu_memory(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64, control: u32) -> i64:
    """The forms with a memory operand."""
    result: i64 = FAULTED
    if control:
        return fpu_environment(c, p, which, reg, ea, seg)
    if which == 0 or which == 2 or which == 4 or which == 6:
        result = fpu_arithmetic_memory(c, p, which, reg, ea, seg)
    elif reg == 0 or (which == 7 and (reg == 4 or reg == 5)) or (which == 3 and reg == 5):
        result = fpu_load(c, p, which, reg, ea, seg)
    elif reg == 1 or reg == 4 or (which == 3 and reg == 6):
        return ud(c)
    else:
        result = fpu_store(c, p, which, reg, ea, seg)
    if result == 0:
        fpu_note(c, p, which, reg, ea, seg)
    return result


def fpu_fetch(c: Core, p: i64, ea: u32, seg: i64, size: i64) -> Any:
    """A little-endian number of ``size`` bytes; None with a fault raised."""
    value: Any = 0
    done: i64 = 0
    part: i64
    step: i64
    while done < size:
        step = 4 if size - done >= 4 else 2
        part = read_sized(c, p, seg, mask32(ea + done) & c.code[p + 5], step)
        if part < 0:
            return None
        value = value | whole(part) << whole(8 * done)
        done = done + step
    return value


@calls_python
def fpu_deposit(c: Core, p: i64, ea: u32, seg: i64, size: i64, value: Any) -> i64:
    """Store ``size`` bytes; every page is tried before the first byte is written. 0 or -1."""
    done: i64 = 0
    step: i64
    word: u32
    if size > 4:
        last: i64 = read_sized(c, p, seg, mask32(ea + size - 2) & c.code[p + 5], 2)
        if last < 0 or write_sized(c, p, seg, mask32(ea + size - 2) & c.code[p + 5], mask32(last), 2) < 0:
            return -1
    while done < size:
        step = 4 if size - done >= 4 else 2
        word = value >> whole(8 * done) & 0xFFFFFFFF
        if step == 2:
            word &= 0xFFFF
        if write_sized(c, p, seg, mask32(ea + done) & c.code[p + 5], word, step) < 0:
            return -1
        done = done + step
    return 0


@calls_python
def fpu_arithmetic_memory(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FADD..FDIVR and FCOM with a 32 or 64 bit number, or a 16 or 32 bit integer."""
    size: i64 = 4 if which == 0 or which == 2 else (8 if which == 4 else 2)
    pattern = fpu_fetch(c, p, ea, seg, size)
    if pattern is None:
        return -1
    flags = 0
    if which == 0 or which == 4:
        value, flags = float80.from_float(pattern, whole(8 * size), load=False)
    else:
        value = fpu_load_integer(pattern, whole(8 * size))
    if reg == 2 or reg == 3:
        fpu_order(c, value, int(reg) - 2, False, flags)
    elif fpu_is_empty(c, 0):
        if fpu_stack_underflow(c):
            fpu_put(c, 0, float80.INDEFINITE)
    else:
        fpu_arithmetic(c, int(reg), 0, fpu_raw(c, 0), value, flags)
    return 0


def fpu_load_integer(pattern: int, bits: int) -> int:
    """A two's complement integer as an 80-bit number."""
    value = pattern - (1 << bits) if pattern >> bits - 1 else pattern
    return float80.from_integer(value)[0]


@calls_python
def fpu_load(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FLD, FILD and FBLD."""
    size: i64
    if which == 7:
        size = 2 if reg == 0 else (10 if reg == 4 else 8)
    elif which == 3:
        size = 4 if reg == 0 else 10
    else:
        size = 4 if which == 1 else 8
    pattern = fpu_fetch(c, p, ea, seg, size)
    if pattern is None:
        return -1
    if which == 7 and reg == 4:
        fpu_push(c, float80.from_bcd(pattern))
    elif which == 7 or (which == 3 and reg == 0):
        fpu_push(c, fpu_load_integer(pattern, whole(8 * size)))
    elif which == 3:
        fpu_push(c, pattern)
    else:
        value, flags = float80.from_float(pattern, whole(8 * size))
        fpu_push(c, value, flags)
    return 0


@calls_python
def fpu_store(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FST, FSTP, FIST, FISTP and FBSTP."""
    size: i64 = 4
    pops: i64 = 1 if reg != 2 else 0
    integer: i64 = 1 if which == 3 or which == 7 else 0
    if which == 3 and reg == 7:
        size = 10
        integer = 0
    elif which == 5:
        size = 8
    elif which == 7:
        size = 2 if reg == 2 or reg == 3 else (10 if reg == 6 else 8)
    bits = whole(8 * size)
    settings = fpu_settings(c)
    status = c.fpu_status
    if fpu_is_empty(c, 0):
        stored = fpu_stack_underflow(c)
        pattern = float80.INDEFINITE
        if which == 7 and reg == 6:
            pattern = 0xFFFFC000000000000000
        elif integer:
            pattern = 1 << bits - 1
        elif size != 10:
            pattern = 0xFFC00000 if size == 4 else 0xFFF8000000000000
    else:
        value, flags = fpu_raw(c, 0), 0
        if which == 7 and reg == 6:
            pattern, flags = float80.to_bcd(value, settings)
        elif integer:
            pattern, flags = float80.to_integer(value, bits, settings)
        elif size == 10:
            pattern = value
        else:
            pattern, flags = float80.to_float(value, bits, settings)
        stored = fpu_raise(c, flags)
        # An unmasked overflow or underflow of a store to memory leaves memory and stack as they were.
        if flags & ~c.fpu_control & (float80.OVERFLOW | float80.UNDERFLOW):
            stored = False
    if not stored:
        return 0
    if fpu_deposit(c, p, ea, seg, size, pattern) < 0:
        c.fpu_status = status
        return -1
    if pops:
        fpu_pop(c)
    return 0


def fpu_full_tag(c: Core) -> int:
    """The tag word as it is stored: valid, zero, special or empty."""
    word = 0
    for at in range(8):
        tag = c.fpu_tag >> 2 * at & 3
        if tag != 3:
            exponent, low = c.mm_high[at] & 0x7FFF, c.mm_low[at]
            if exponent == 0 and low == 0:
                tag = 1
            elif exponent in (0, 0x7FFF) or low >= 0:
                tag = 2
            else:
                tag = 0
        word |= tag << 2 * at
    return word


@calls_python
def fpu_environment(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FLDENV, FLDCW, FNSTENV, FNSTCW, FRSTOR, FNSAVE and FNSTSW m16."""
    word: i64
    if which == 1 and reg == 5:
        word = read(c, p, seg, ea, 2)
        if word < 0:
            return -1
        c.fpu_control = mask32(word) & 0xF7F | 0x40
        fpu_summary(c)
        return 0
    if which == 1 and reg == 7:
        return write(c, p, seg, ea, c.fpu_control, 2)
    if which == 5 and reg == 7:
        return write(c, p, seg, ea, c.fpu_status, 2)
    size: i64 = 2 if marks(c, p) & MARK_SIZE16 else 4
    if reg == 4:
        return fpu_load_environment(c, p, ea, seg, size, 1 if which == 5 else 0)
    return fpu_store_environment(c, p, ea, seg, size, 1 if which == 5 else 0)


def fpu_environment_words(c: Core, size: int) -> list[int]:
    """The seven words of the environment (SDM 1, 8.1.10), in protected or real format."""
    if size == 4:
        head = [c.fpu_control | 0xFFFF0000, c.fpu_status | 0xFFFF0000, fpu_full_tag(c) | 0xFFFF0000]
        if c.protected:
            return [*head, c.fpu_ip, c.fpu_cs | (c.fpu_opcode & 0x7FF) << 16, c.fpu_dp, c.fpu_ds | 0xFFFF0000]
        ip = c.fpu_ip + (c.fpu_cs << 4) & 0xFFFFFFFF
        dp = c.fpu_dp + (c.fpu_ds << 4) & 0xFFFFFFFF
        return [*head, ip & 0xFFFF | 0xFFFF0000, (ip >> 16) << 12 | c.fpu_opcode & 0x7FF,
                dp & 0xFFFF | 0xFFFF0000, (dp >> 16) << 12]  # fmt: skip
    head = [c.fpu_control, c.fpu_status, fpu_full_tag(c)]
    if c.protected:
        return [*head, c.fpu_ip & 0xFFFF, c.fpu_cs, c.fpu_dp & 0xFFFF, c.fpu_ds]
    ip = c.fpu_ip + (c.fpu_cs << 4) & 0xFFFFF
    dp = c.fpu_dp + (c.fpu_ds << 4) & 0xFFFFF
    return [*head, ip & 0xFFFF, (ip >> 16) << 12 | c.fpu_opcode & 0x7FF, dp & 0xFFFF, (dp >> 16) << 12]


@calls_python
def fpu_store_environment(c: Core, p: i64, ea: u32, seg: i64, size: i64, everything: i64) -> i64:
    """FNSTENV and FNSAVE."""
    image: Any = 0
    step = whole(8 * size)
    words = fpu_environment_words(c, size)
    for number, word in enumerate(words):
        image |= word << step * number
    length: i64 = 7 * size
    if everything:
        for number in range(8):
            image |= fpu_raw(c, number) << 7 * step + 80 * number
        length = length + 80
    if fpu_deposit(c, p, ea, seg, length, image) < 0:
        return -1
    if everything:
        fpu_reset_registers(c)
    else:
        c.fpu_control |= 0x3F
        fpu_summary(c)
    return 0


@calls_python
def fpu_load_environment(c: Core, p: i64, ea: u32, seg: i64, size: i64, everything: i64) -> i64:
    """FLDENV and FRSTOR."""
    length: i64 = 7 * size + (80 if everything else 0)
    image = fpu_fetch(c, p, ea, seg, length)
    if image is None:
        return -1
    bits = whole(8 * size)
    mask = (1 << bits) - 1
    words = [image >> bits * index & mask for index in range(7)]
    c.fpu_control = words[0] & 0xF7F | 0x40
    c.fpu_status = words[1] & 0xFFFF
    c.fpu_tag = words[2] & 0xFFFF
    if c.protected:
        c.fpu_ip = words[3]
        c.fpu_cs = words[4] & 0xFFFF
        if size == 4:
            c.fpu_opcode = words[4] >> 16 & 0x7FF
        c.fpu_dp = words[5]
        c.fpu_ds = words[6] & 0xFFFF
    else:
        c.fpu_ip = words[3] & 0xFFFF | (words[4] >> 12 & 0xFFFF) << 16
        c.fpu_cs = 0
        c.fpu_opcode = words[4] & 0x7FF
        c.fpu_dp = words[5] & 0xFFFF | (words[6] >> 12 & 0xFFFF) << 16
        c.fpu_ds = 0
    fpu_summary(c)
    if everything:
        tag = c.fpu_tag
        for index in range(8):
            fpu_put(c, index, image >> 7 * bits + 80 * index & (1 << 80) - 1)
        c.fpu_tag = tag
    return 0


def fx_ready(c: Core, p: i64, ea: u32, seg: i64) -> i64:
    """The checks of FXSAVE and FXRSTOR: #NM, and #GP(0) where not on 16 bytes."""
    if c.cr[0] & (CR0_EM | CR0_TS):
        return fault(c, NM, 0)
    if mask32(ea + c.base[seg]) & 15:
        return fault(c, 13, 0)
    return 0


@calls_python
def op_fxsave(c: Core, p: i64) -> i64:
    """FXSAVE: 512 bytes of which the first 160 are written, and the rest left."""
    ea: u32 = mask32(effective(c, p))
    seg: i64 = segment_of(c, p)
    if fx_ready(c, p, ea, seg) < 0:
        return -1
    tags: u32 = 0
    index: i64
    for index in range(8):
        if c.fpu_tag >> (2 * index) & 3 != 3:
            tags |= 1 << index
    fields = (
        (c.fpu_control, 0), (c.fpu_status, 16), (tags, 32), (c.fpu_opcode & 0x7FF, 48), (c.fpu_ip, 64),
        (c.fpu_cs, 96), (c.fpu_dp, 128), (c.fpu_ds, 160), (c.mxcsr, 192),
    )  # fmt: skip
    image: Any = 0
    for value, shift in fields:
        image |= value << shift
    for number in range(8):
        image |= fpu_raw(c, number) << 256 + 128 * number
    return fpu_deposit(c, p, ea, seg, 160, image)


@calls_python
def op_fxrstor(c: Core, p: i64) -> i64:
    """FXRSTOR."""
    ea: u32 = mask32(effective(c, p))
    seg: i64 = segment_of(c, p)
    if fx_ready(c, p, ea, seg) < 0:
        return -1
    image = fpu_fetch(c, p, ea, seg, 160)
    if image is None:
        return -1
    c.fpu_control = image & 0xF7F | 0x40
    c.fpu_status = image >> 16 & 0xFFFF
    c.fpu_opcode = image >> 48 & 0x7FF
    c.fpu_ip = image >> 64 & 0xFFFFFFFF
    c.fpu_cs = image >> 96 & 0xFFFF
    c.fpu_dp = image >> 128 & 0xFFFFFFFF
    c.fpu_ds = image >> 160 & 0xFFFF
    for index in range(8):
        fpu_put(c, index, image >> 256 + 128 * index & (1 << 80) - 1)
    c.fpu_tag = 0
    for index in range(8):
        if not image >> 32 + index & 1:
            fpu_set_tag(c, index, 3)
    fpu_summary(c)
    return 0
