"""The string instructions, alone and repeated.

May import words, state, access, paging, operands, alu and inout.  A repeated
instruction works page-wise where both sides are plain memory; it stops after
``CHUNK`` elements with EIP at itself, as it does for an interrupt, so that no
single step runs long.
"""

from __future__ import annotations

from vmipatch.emu.cpu.alu import alu_sub
from vmipatch.emu.cpu.flags import get_zf
from vmipatch.emu.cpu.host import port_read, port_write
from vmipatch.emu.cpu.inout import DONE, check_port
from vmipatch.emu.cpu.operands import (
    MARK_REP,
    MARK_REPNE,
    get_register,
    load_place,
    marks,
    modify_sized,
    put_register,
    read_sized,
    segment_of,
    store_place,
    write_sized,
)
from vmipatch.emu.cpu.state import DF, EAX, ECX, EDI, EDX, ES, ESI, TF, TLB_ENTRIES, Core
from vmipatch.emu.cpu.words import cast, copy_bytes, fill_bytes, i64, mask32, u32

REPEAT = 2  # a semantic function's result: stop here, EIP stays at this instruction
CHUNK = 16384

MOVS = 0
STOS = 1
LODS = 2
CMPS = 3
SCAS = 4
INS = 5
OUTS = 6


def compare(c: Core, a: u32, b: u32, size: i64) -> None:
    """The flags of a - b."""
    if size == 4:
        alu_sub(c, a, b, 32)
    elif size == 2:
        alu_sub(c, a, b, 16)
    else:
        alu_sub(c, a, b, 8)


def move_index(c: Core, r: i64, amount: i64, mask: u32) -> None:
    """Advance ESI or EDI in the address size."""
    c.reg[r] = (c.reg[r] & ~mask) | (mask32(c.reg[r] + amount) & mask)


def one(c: Core, p: i64, what: i64, size: i64, mask: u32) -> i64:
    """One element; 0 or -1 with nothing changed."""
    step: i64 = -size if c.flags & DF else size
    value: i64
    other: i64
    source: i64 = c.reg[ESI] & mask
    target: i64 = c.reg[EDI] & mask
    if what == MOVS:
        value = read_sized(c, p, segment_of(c, p), source, size)
        if value < 0 or write_sized(c, p, ES, target, mask32(value), size) < 0:
            return -1
        move_index(c, ESI, step, mask)
        move_index(c, EDI, step, mask)
    elif what == STOS:
        if write_sized(c, p, ES, target, get_register(c, EAX, size), size) < 0:
            return -1
        move_index(c, EDI, step, mask)
    elif what == LODS:
        value = read_sized(c, p, segment_of(c, p), source, size)
        if value < 0:
            return -1
        put_register(c, EAX, mask32(value), size)
        move_index(c, ESI, step, mask)
    elif what == CMPS:
        value = read_sized(c, p, segment_of(c, p), source, size)
        if value < 0:
            return -1
        other = read_sized(c, p, ES, target, size)
        if other < 0:
            return -1
        compare(c, mask32(value), mask32(other), size)
        move_index(c, ESI, step, mask)
        move_index(c, EDI, step, mask)
    elif what == SCAS:
        value = read_sized(c, p, ES, target, size)
        if value < 0:
            return -1
        compare(c, get_register(c, EAX, size), mask32(value), size)
        move_index(c, EDI, step, mask)
    elif what == INS:
        return one_in(c, p, size, mask, step)
    else:
        value = read_sized(c, p, segment_of(c, p), source, size)
        if value < 0 or check_port(c, c.reg[EDX] & 0xFFFF, size, 1, mask32(value)) < 0:
            return -1
        port_write(c, c.reg[EDX] & 0xFFFF, size, mask32(value))
        move_index(c, ESI, step, mask)
    return 0


def one_in(c: Core, p: i64, size: i64, mask: u32, step: i64) -> i64:
    """INS: the destination is checked before the port is read."""
    if check_port(c, c.reg[EDX] & 0xFFFF, size, 0, 0) < 0:
        return -1
    place: i64 = modify_sized(c, p, ES, c.reg[EDI] & mask, size)
    if place < 0:
        return -1
    linear: u32 = c.modify_linear
    load_place(c, place, size)
    value: u32 = port_read(c, c.reg[EDX] & 0xFFFF, size)
    c.modify_linear = linear
    store_place(c, place, value, size)
    move_index(c, EDI, step, mask)
    return 0


def op_string(c: Core, p: i64, what: i64, size: i64) -> i64:
    """Any string instruction."""
    mask: u32 = c.code[p + 5]
    repeats: u32 = marks(c, p) & (MARK_REP | MARK_REPNE)
    done: i64 = 0
    fast: i64
    stepping: u32 = c.flags & TF | c.single
    if repeats == 0:
        if one(c, p, what, size, mask) < 0:
            return -1
        return DONE if what >= INS else 0
    while c.reg[ECX] & mask:
        fast = 0
        if what <= STOS and stepping == 0:
            fast = many(c, p, what, size, mask)
        if fast:
            done = done + 1 + fast // 64
        else:
            if one(c, p, what, size, mask) < 0:
                return -1
            move_index(c, ECX, -1, mask)
            done = done + 1
            if (what in (CMPS, SCAS)) and get_zf(c) == (1 if repeats & MARK_REPNE else 0):
                return 0
        if (c.stop or done >= CHUNK or stepping) and c.reg[ECX] & mask:
            return REPEAT
    return DONE if what >= INS else 0


def fast_place(c: Core, seg: i64, offset: i64, length: i64, is_write: i64) -> i64:
    """The backing place of a run of bytes that one TLB entry covers, or -1."""
    top: i64 = c.write_top[seg] if is_write else c.read_top[seg]
    if offset + length > top:
        return -1
    linear: u32 = mask32(offset + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if c.tlb[t + is_write] != cast(i64, linear >> 12) << 12:
        return -1
    return linear + c.tlb[t + 3]


def many(c: Core, p: i64, what: i64, size: i64, mask: u32) -> i64:
    """As many elements of REP MOVS or STOS as lie in plain memory of one page; 0: none."""
    if c.flags & DF:
        return 0
    count: i64 = c.reg[ECX] & mask
    target: i64 = c.reg[EDI] & mask
    source: i64 = c.reg[ESI] & mask
    room: i64 = 4096 - ((target + c.base[ES]) & 0xFFF)
    if room > cast(i64, mask) + 1 - target:
        room = cast(i64, mask) + 1 - target
    if what == MOVS:
        other: i64 = 4096 - ((source + c.base[segment_of(c, p)]) & 0xFFF)
        if other < room:
            room = other
        if room > cast(i64, mask) + 1 - source:
            room = cast(i64, mask) + 1 - source
    if count > room // size:
        count = room // size
    if count == 0:
        return 0
    to: i64 = fast_place(c, ES, target, count * size, 1)
    if to < 0:
        return 0
    if what == MOVS:
        at: i64 = fast_place(c, segment_of(c, p), source, count * size, 0)
        if at < 0:
            return 0
        if to > at and to < at + count * size and (to - at) % size != 0:
            return 0
        copy_bytes(c.host, to, at, count * size)
        move_index(c, ESI, count * size, mask)
    else:
        fill_bytes(c.host, to, count * size, c.reg[EAX], size)
    move_index(c, EDI, count * size, mask)
    move_index(c, ECX, -count, mask)
    return count
