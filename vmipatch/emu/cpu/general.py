"""General instructions that are rare enough for one version over all sizes and forms.

May import words, state, faults, flags, alu, access, stack and operands.
Results as in system.py.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import effective, modified, modify, read
from vmipatch.emu.cpu.alu import alu_add, alu_bt, alu_btc, alu_btr, alu_bts, alu_sub, set_logic, sign_extend, width_mask
from vmipatch.emu.cpu.faults import BR, DE, fault, ud
from vmipatch.emu.cpu.flags import (
    arithmetic_flags,
    get_af,
    get_cf,
    set_cf,
    set_flag_bits,
    set_zf,
)
from vmipatch.emu.cpu.operands import (
    MARK_MEMORY,
    get8,
    get_register,
    load_place,
    marks,
    modify_sized,
    put8,
    put16,
    put_register,
    read_e,
    read_sized,
    reg_a,
    reg_b,
    segment_of,
    store_place,
    write_e,
)
from vmipatch.emu.cpu.stack import drop, peek, push
from vmipatch.emu.cpu.state import AF, CF, DF, EAX, EBP, EBX, ECX, EDX, ESP, OF, SS, Core
from vmipatch.emu.cpu.words import cast, i64, mask32, store32, u32, u64


def set_product(c: Core, low: u32, lost: u32, bits: i64) -> None:
    """Flags of MUL and one-operand IMUL: CF and OF say that the upper half counts."""
    c.res = sign_extend(low, bits)
    c.aux = cast(u32, lost) << 31


def op_mul(c: Core, p: i64, size: i64) -> i64:
    """MUL."""
    value: i64 = read_e(c, p, size)
    if value < 0:
        return -1
    product: u64 = cast(u64, value) * get_register(c, EAX, size)
    if size == 1:
        put16(c, EAX, mask32(product))
        set_product(c, mask32(product) & 0xFF, 1 if product >> 8 else 0, 8)
    elif size == 2:
        put16(c, EAX, mask32(product) & 0xFFFF)
        put16(c, EDX, mask32(product >> 16))
        set_product(c, mask32(product) & 0xFFFF, 1 if product >> 16 else 0, 16)
    else:
        c.reg[EAX] = mask32(product & 0xFFFFFFFF)
        c.reg[EDX] = mask32(product >> 32)
        set_product(c, c.reg[EAX], 1 if product >> 32 else 0, 32)
    return 0


def op_imul(c: Core, p: i64, size: i64) -> i64:
    """IMUL with one operand."""
    value: i64 = read_e(c, p, size)
    if value < 0:
        return -1
    product: i64 = sign_extend(mask32(value), size * 8) * sign_extend(get_register(c, EAX, size), size * 8)
    low: u32 = mask32(product) & width_mask(size * 8)
    lost: u32 = 0 if sign_extend(low, size * 8) == product else 1
    if size == 1:
        put16(c, EAX, mask32(product) & 0xFFFF)
    elif size == 2:
        put16(c, EAX, low)
        put16(c, EDX, mask32(product >> 16) & 0xFFFF)
    else:
        c.reg[EAX] = low
        c.reg[EDX] = mask32(product >> 32)
    set_product(c, low, lost, size * 8)
    return 0


def op_div(c: Core, p: i64, size: i64) -> i64:
    """DIV; #DE for 0 and for a quotient that does not fit."""
    value: i64 = read_e(c, p, size)
    if value < 0:
        return -1
    if value == 0:
        return fault(c, DE, 0)
    dividend: u64
    if size == 1:
        dividend = c.reg[EAX] & 0xFFFF
    elif size == 2:
        dividend = (c.reg[EDX] & 0xFFFF) << 16 | c.reg[EAX] & 0xFFFF
    else:
        dividend = cast(u64, c.reg[EDX]) << 32 | c.reg[EAX]
    divisor: u64 = cast(u64, value)
    quotient: u64 = dividend // divisor
    rest: u64 = dividend % divisor
    if quotient >> (size * 8):
        return fault(c, DE, 0)
    put_division(c, mask32(quotient), mask32(rest), size)
    return 0


def put_division(c: Core, quotient: u32, rest: u32, size: i64) -> None:
    """Store quotient and remainder; the flags (undefined) stay."""
    if size == 1:
        put8(c, 0, quotient)
        put8(c, 4, rest)
    else:
        put_register(c, EAX, quotient, size)
        put_register(c, EDX, rest, size)


def op_idiv(c: Core, p: i64, size: i64) -> i64:
    """IDIV, truncating towards zero."""
    value: i64 = read_e(c, p, size)
    if value < 0:
        return -1
    if value == 0:
        return fault(c, DE, 0)
    bits: i64 = size * 8
    high: u32
    low: u32
    if size == 1:
        low = c.reg[EAX] & 0xFF
        high = (c.reg[EAX] >> 8) & 0xFF
    else:
        low = get_register(c, EAX, size)
        high = get_register(c, EDX, size)
    divisor: i64 = sign_extend(mask32(value), bits)
    size_of_divisor: u64 = cast(u64, -divisor if divisor < 0 else divisor)
    dividend: u64 = cast(u64, high) << bits | low
    negative: u32 = (high >> (bits - 1)) & 1
    if negative:
        if bits == 32:
            dividend = cast(u64, (dividend ^ ALL_ONES) + 1) & ALL_ONES
        else:
            dividend = ((cast(u64, 1) << (2 * bits)) - dividend) & ((cast(u64, 1) << (2 * bits)) - 1)
    quotient: u64 = dividend // size_of_divisor
    rest: u64 = dividend % size_of_divisor
    if quotient > cast(u64, 1) << (bits - 1):
        return fault(c, DE, 0)
    signed: i64 = cast(i64, quotient)
    if negative != (1 if divisor < 0 else 0):
        signed = -signed
    elif quotient >> (bits - 1):
        return fault(c, DE, 0)
    remainder: i64 = -cast(i64, rest) if negative else cast(i64, rest)
    put_division(c, mask32(signed) & width_mask(bits), mask32(remainder) & width_mask(bits), size)
    return 0


ALL_ONES = 0xFFFFFFFFFFFFFFFF


def op_widen(c: Core, p: i64, size: i64) -> i64:
    """CBW and CWDE."""
    if size == 2:
        put16(c, EAX, mask32(sign_extend(c.reg[EAX] & 0xFF, 8)) & 0xFFFF)
    else:
        c.reg[EAX] = mask32(sign_extend(c.reg[EAX] & 0xFFFF, 16))
    return 0


def op_widen_pair(c: Core, p: i64, size: i64) -> i64:
    """CWD and CDQ."""
    if size == 2:
        put16(c, EDX, 0xFFFF if c.reg[EAX] & 0x8000 else 0)
    else:
        c.reg[EDX] = mask32(-1) if c.reg[EAX] >> 31 else 0
    return 0


def op_lahf(c: Core, p: i64) -> i64:
    """LAHF."""
    put8(c, 4, (arithmetic_flags(c) & 0xD5) | 2)
    return 0


def op_sahf(c: Core, p: i64) -> i64:
    """SAHF."""
    set_flag_bits(c, 0xD5, get8(c, 4))
    return 0


def op_change_flag(c: Core, p: i64, what: i64) -> i64:
    """CMC (0), CLC (1), STC (2), CLD (3), STD (4)."""
    if what == 0:
        set_cf(c, get_cf(c) ^ 1)
    elif what == 1:
        set_cf(c, 0)
    elif what == 2:
        set_cf(c, 1)
    elif what == 3:
        c.flags &= ~DF
    else:
        c.flags |= DF
    return 0


def op_salc(c: Core, p: i64) -> i64:
    """SALC."""
    put8(c, 0, 0xFF if get_cf(c) else 0)
    return 0


def decimal_adjust(c: Core, subtract: u32) -> i64:
    """DAA and DAS (SDM 2)."""
    al: u32 = c.reg[EAX] & 0xFF
    before: u32 = al
    carry: u32 = get_cf(c)
    out: u32 = 0
    half: u32 = 0
    if (al & 15) > 9 or get_af(c):
        if subtract:
            out = carry | (1 if al < 6 else 0)
            al = (al - 6) & 0xFF
        else:
            out = carry | (1 if al > 0xF9 else 0)
            al = (al + 6) & 0xFF
        half = AF
    if before > 0x99 or carry:
        al = (al - 0x60 if subtract else al + 0x60) & 0xFF
        out = 1
    put8(c, 0, al)
    set_logic(c, al, 8)
    set_flag_bits(c, AF | CF | OF, half | out)
    return 0


def op_daa(c: Core, p: i64) -> i64:
    """DAA."""
    return decimal_adjust(c, 0)


def op_das(c: Core, p: i64) -> i64:
    """DAS."""
    return decimal_adjust(c, 1)


def op_ascii_adjust(c: Core, p: i64, subtract: i64) -> i64:
    """AAA and AAS (SDM 2)."""
    ax: u32 = c.reg[EAX] & 0xFFFF
    adjust: u32 = 1 if (ax & 15) > 9 or get_af(c) else 0
    if adjust:
        ax = (ax - 0x106 if subtract else ax + 0x106) & 0xFFFF
    ax &= 0xFF0F
    put16(c, EAX, ax)
    set_logic(c, ax & 0xFF, 8)
    set_flag_bits(c, AF | CF | OF, AF | CF if adjust else 0)
    return 0


def op_aam(c: Core, p: i64) -> i64:
    """AAM; base 0 is #DE."""
    base: u32 = c.code[p + 4] & 0xFF
    if base == 0:
        return fault(c, DE, 0)
    al: u32 = c.reg[EAX] & 0xFF
    put16(c, EAX, (al // base) << 8 | al % base)
    set_logic(c, al % base, 8)
    return 0


def op_aad(c: Core, p: i64) -> i64:
    """AAD."""
    base: u32 = c.code[p + 4] & 0xFF
    al: u32 = (get8(c, 0) + get8(c, 4) * base) & 0xFF
    put16(c, EAX, al)
    set_logic(c, al, 8)
    return 0


def op_pusha(c: Core, p: i64, size: i64) -> i64:
    """PUSHA: all eight places are checked before the first is written."""
    esp: u32 = c.reg[ESP]
    i: i64
    for i in range(1, 9):
        if modify_sized(c, p, SS, mask32(esp - i * size) & c.stack_mask, size) < 0:
            return -1
    for i in range(8):
        value: u32 = get_register(c, i, size)
        if i == ESP:
            value = esp & width_mask(size * 8)
        if size == 4:
            push(c, p, value, 4)
        else:
            push(c, p, value, 2)
    return 0


def op_popa(c: Core, p: i64, size: i64) -> i64:
    """POPA; ESP's word is skipped."""
    i: i64
    value: i64
    for i in range(8):
        value = peek(c, p, (7 - i) * size, 4) if size == 4 else peek(c, p, (7 - i) * size, 2)
        if value < 0:
            return -1
        c.task_words[i] = mask32(value)
    for i in range(8):
        if i != ESP:
            put_register(c, i, c.task_words[i], size)
    drop(c, 8 * size)
    return 0


def op_enter(c: Core, p: i64, size: i64) -> i64:
    """ENTER (SDM 2), nothing changed before every push has succeeded."""
    room: u32 = c.code[p + 4] & 0xFFFF
    level: i64 = c.code[p + 7] & 31
    esp: u32 = c.reg[ESP]
    ebp: u32 = c.reg[EBP]
    i: i64
    value: i64
    if push_sized(c, p, ebp, size) < 0:
        return -1
    frame: u32 = c.reg[ESP]
    if level > 0:
        for i in range(1, level):
            at: u32 = mask32(ebp - i * size) & c.stack_mask
            value = read_sized(c, p, SS, at, size)
            if value < 0 or push_sized(c, p, mask32(value), size) < 0:
                c.reg[ESP] = esp
                return -1
        if push_sized(c, p, frame, size) < 0:
            c.reg[ESP] = esp
            return -1
    top: u32 = mask32(c.reg[ESP] - room) & c.stack_mask
    if modify_sized(c, p, SS, top, size) < 0:
        c.reg[ESP] = esp
        return -1
    c.reg[ESP] = (esp & ~c.stack_mask) | top
    if size == 4 and c.stack_mask != 0xFFFF:
        c.reg[EBP] = frame
    else:
        put_register(c, EBP, frame, 2 if size == 2 else 4)
        if c.stack_mask == 0xFFFF and size == 4:
            c.reg[EBP] = (ebp & 0xFFFF0000) | (frame & 0xFFFF)
    return 0


def push_sized(c: Core, p: i64, value: u32, size: i64) -> i64:
    """Push 2 or 4 bytes."""
    if size == 4:
        return push(c, p, value, 4)
    return push(c, p, value & 0xFFFF, 2)


def op_leave(c: Core, p: i64, size: i64) -> i64:
    """LEAVE."""
    at: u32 = c.reg[EBP] & c.stack_mask
    value: i64 = read_sized(c, p, SS, at, size)
    if value < 0:
        return -1
    c.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | (mask32(at + size) & c.stack_mask)
    put_register(c, EBP, mask32(value), size)
    return 0


def op_bound(c: Core, p: i64, size: i64) -> i64:
    """BOUND."""
    ea: i64 = effective(c, p)
    low: i64 = read_sized(c, p, segment_of(c, p), ea, size)
    if low < 0:
        return -1
    high: i64 = read_sized(c, p, segment_of(c, p), mask32(ea + size) & c.code[p + 5], size)
    if high < 0:
        return -1
    index: i64 = sign_extend(get_register(c, reg_a(c, p), size), size * 8)
    if index < sign_extend(mask32(low), size * 8) or index > sign_extend(mask32(high), size * 8):
        return fault(c, BR, 0)
    return 0


def op_xlat(c: Core, p: i64) -> i64:
    """XLAT."""
    ea: i64 = mask32(c.reg[EBX] + (c.reg[EAX] & 0xFF)) & c.code[p + 5]
    value: i64 = read(c, p, segment_of(c, p), ea, 1)
    if value < 0:
        return -1
    put8(c, 0, mask32(value))
    return 0


def op_bit_scan(c: Core, p: i64, reverse: i64, size: i64) -> i64:
    """BSF and BSR; of 0 they set ZF and leave the register."""
    value: i64 = read_e(c, p, size)
    if value < 0:
        return -1
    if value == 0:
        set_zf(c, 1)
        return 0
    position: i64 = 0
    if reverse:
        position = size * 8 - 1
        while (value >> position) & 1 == 0:
            position = position - 1
    else:
        while (value >> position) & 1 == 0:
            position = position + 1
    put_register(c, reg_a(c, p), mask32(position), size)
    set_zf(c, 0)
    return 0


def op_bit_register(c: Core, p: i64, what: i64, size: i64) -> i64:
    """BT (0), BTS (1), BTR (2), BTC (3) with a register: it reaches beyond a memory operand."""
    offset: u32 = get_register(c, reg_a(c, p), size)
    bits: i64 = size * 8
    value: u32
    if (marks(c, p) & MARK_MEMORY) == 0:
        value = bit_operation(c, get_register(c, reg_b(c, p), size), offset, what, size)
        if what:
            put_register(c, reg_b(c, p), value, size)
        return 0
    far: i64 = (sign_extend(offset, bits) >> (5 if size == 4 else 4)) * size
    ea: i64 = mask32(effective(c, p) + far) & c.code[p + 5]
    if what == 0:
        seen: i64 = read_sized(c, p, segment_of(c, p), ea, size)
        if seen < 0:
            return -1
        bit_operation(c, mask32(seen), offset, 0, size)
        return 0
    place: i64 = modify_sized(c, p, segment_of(c, p), ea, size)
    if place < 0:
        return -1
    value = bit_operation(c, load_place(c, place, size), offset, what, size)
    store_place(c, place, value, size)
    return 0


def bit_operation(c: Core, a: u32, position: u32, what: i64, size: i64) -> u32:
    """One of the four bit instructions on a word."""
    if size == 4:
        if what == 0:
            return alu_bt(c, a, position, 32)
        if what == 1:
            return alu_bts(c, a, position, 32)
        if what == 2:
            return alu_btr(c, a, position, 32)
        return alu_btc(c, a, position, 32)
    if what == 0:
        return alu_bt(c, a, position, 16)
    if what == 1:
        return alu_bts(c, a, position, 16)
    if what == 2:
        return alu_btr(c, a, position, 16)
    return alu_btc(c, a, position, 16)


def op_xadd(c: Core, p: i64, size: i64) -> i64:
    """XADD."""
    b: u32 = get_register(c, reg_a(c, p), size)
    place: i64 = -1
    a: u32
    if marks(c, p) & MARK_MEMORY:
        place = modify_sized(c, p, segment_of(c, p), effective(c, p), size)
        if place < 0:
            return -1
        a = load_place(c, place, size)
    else:
        a = get_register(c, reg_b(c, p), size)
    total: u32 = alu_add(c, a, b, size * 8)
    put_register(c, reg_a(c, p), a, size)
    if place >= 0:
        store_place(c, place, total, size)
    else:
        put_register(c, reg_b(c, p), total, size)
    return 0


def op_cmpxchg(c: Core, p: i64, size: i64) -> i64:
    """CMPXCHG; memory is written in either case."""
    expected: u32 = get_register(c, EAX, size)
    place: i64 = -1
    a: u32
    if marks(c, p) & MARK_MEMORY:
        place = modify_sized(c, p, segment_of(c, p), effective(c, p), size)
        if place < 0:
            return -1
        a = load_place(c, place, size)
    else:
        a = get_register(c, reg_b(c, p), size)
    new: u32 = a
    alu_sub(c, expected, a, size * 8)
    if expected == a:
        new = get_register(c, reg_a(c, p), size)
    else:
        put_register(c, EAX, a, size)
    if place >= 0:
        store_place(c, place, new, size)
    elif expected == a:
        put_register(c, reg_b(c, p), new, size)
    return 0


def op_cmpxchg8b(c: Core, p: i64) -> i64:
    """CMPXCHG8B."""
    ea: i64 = effective(c, p)
    upper: i64 = mask32(ea + 4) & c.code[p + 5]
    if modify(c, p, segment_of(c, p), upper, 4) < 0 or modify(c, p, segment_of(c, p), ea, 4) < 0:
        return -1
    word: i64 = read(c, p, segment_of(c, p), ea, 4)
    low: u32 = mask32(word)
    word = read(c, p, segment_of(c, p), upper, 4)
    high: u32 = mask32(word)
    new_low: u32 = low
    new_high: u32 = high
    equal: u32 = 1 if low == c.reg[EAX] and high == c.reg[EDX] else 0
    if equal:
        new_low = c.reg[EBX]
        new_high = c.reg[ECX]
    else:
        c.reg[EAX] = low
        c.reg[EDX] = high
    set_zf(c, equal)
    place: i64 = modify(c, p, segment_of(c, p), ea, 4)
    store32(c.host, place, new_low)
    modified(c, place)
    place = modify(c, p, segment_of(c, p), upper, 4)
    store32(c.host, place, new_high)
    modified(c, place)
    return 0


def op_bswap(c: Core, p: i64, size: i64) -> i64:
    """BSWAP; with a 16-bit operand the result is undefined, here 0 as hardware gives."""
    value: u32 = c.reg[reg_b(c, p)]
    if size == 2:
        put16(c, reg_b(c, p), 0)
    else:
        c.reg[reg_b(c, p)] = mask32(
            cast(u32, value & 0xFF) << 24 | (value & 0xFF00) << 8 | (value >> 8) & 0xFF00 | value >> 24
        )
    return 0


def op_xchg(c: Core, p: i64, size: i64) -> i64:
    """XCHG with memory or 8 and 16 bit registers."""
    a: u32 = get_register(c, reg_a(c, p), size)
    b: u32
    if marks(c, p) & MARK_MEMORY:
        place: i64 = modify_sized(c, p, segment_of(c, p), effective(c, p), size)
        if place < 0:
            return -1
        b = load_place(c, place, size)
        store_place(c, place, a, size)
    else:
        b = get_register(c, reg_b(c, p), size)
        put_register(c, reg_b(c, p), a, size)
    put_register(c, reg_a(c, p), b, size)
    return 0


def op_pop_e(c: Core, p: i64, size: i64) -> i64:
    """POP r/m: an address that uses ESP sees it already moved."""
    value: i64 = peek(c, p, 0, 4) if size == 4 else peek(c, p, 0, 2)
    if value < 0:
        return -1
    esp: u32 = c.reg[ESP]
    drop(c, size)
    if write_e(c, p, mask32(value), size) < 0:
        c.reg[ESP] = esp
        return -1
    return 0


def op_undefined(c: Core, p: i64) -> i64:
    """UD2, and every byte sequence that is no instruction."""
    return ud(c)


def op_nothing(c: Core, p: i64) -> i64:
    """NOP, PREFETCH and hint NOPs."""
    return 0
