"""Memory accesses of instructions: segment check, TLB, and the slow path behind them.

May import words, state, faults, host and paging.  A read returns the value, or
-1 with a fault raised; a write returns 0 or -1; :func:`modify` returns a place
in the backing buffer where the handler may load and store, or -1.  ``ea`` is
the offset in the segment (32 bits, in a 64-bit word so that limit checks cannot
wrap).  ``size`` is a literal at every call from a handler.
"""

from __future__ import annotations

from vmipatch.emu.cpu.faults import ALIGN, STACK, fault, gp
from vmipatch.emu.cpu.host import bus_read, bus_write
from vmipatch.emu.cpu.memory import HOOKED
from vmipatch.emu.cpu.paging import (
    FRAME,
    READ,
    USER,
    WRITE,
    must_be_slow,
    note_write,
    page_write_exit,
    translate,
)
from vmipatch.emu.cpu.pause import stop_after
from vmipatch.emu.cpu.state import AC, CR0_AM, SS, TLB_ENTRIES, TLB_HALF, Core
from vmipatch.emu.cpu.words import cast, i64, inline, load8, load16, load32, mask32, store8, store16, store32, u32


@inline
def effective(c: Core, p: i64) -> i64:
    """The offset of a memory operand: base + index * scale + displacement, in the address size."""
    ea: u32 = (c.reg[c.code8[p * 4 + 6]] + (c.reg[c.code8[p * 4 + 7]] << c.code8[p * 4 + 8]) + c.code[p + 3]) & c.code[
        p + 5
    ]
    return ea


@inline
def effective_simple(c: Core, p: i64) -> i64:
    """:func:`effective` where there is no index and the address size is 32 bits."""
    return mask32(c.reg[c.code8[p * 4 + 6]] + c.code[p + 3])


@inline
def effective_indexed(c: Core, p: i64) -> i64:
    """:func:`effective` where the address size is 32 bits."""
    return mask32(c.reg[c.code8[p * 4 + 6]] + (c.reg[c.code8[p * 4 + 7]] << c.code8[p * 4 + 8]) + c.code[p + 3])


@inline
def read(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """Read an operand."""
    if ea + size > c.read_top[seg]:
        return read_slow(c, p, seg, ea, size)
    linear: u32 = mask32(ea + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if c.tlb[t] != cast(i64, mask32(linear + (size - 1)) >> 12) << 12:
        return read_slow(c, p, seg, ea, size)
    if size == 4:
        return load32(c.host, linear + c.tlb[t + 3])
    if size == 2:
        return load16(c.host, linear + c.tlb[t + 3])
    return load8(c.host, linear + c.tlb[t + 3])


@inline
def write(c: Core, p: i64, seg: i64, ea: i64, value: u32, size: i64) -> i64:
    """Write an operand."""
    if ea + size > c.write_top[seg]:
        return write_slow(c, p, seg, ea, value, size)
    linear: u32 = mask32(ea + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if c.tlb[t + 1] != cast(i64, mask32(linear + (size - 1)) >> 12) << 12:
        return write_slow(c, p, seg, ea, value, size)
    if size == 4:
        store32(c.host, linear + c.tlb[t + 3], value)
    elif size == 2:
        store16(c.host, linear + c.tlb[t + 3], value)
    else:
        store8(c.host, linear + c.tlb[t + 3], value)
    return 0


@inline
def misses_read(c: Core, seg: i64, ea: i64, size: i64) -> u32:
    """Whether the fast path does not cover reading an operand; nothing is done."""
    linear: u32 = mask32(ea + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if ea + size > c.read_top[seg] or c.tlb[t] != cast(i64, mask32(linear + (size - 1)) >> 12) << 12:
        return 1
    return 0


@inline
def misses_write(c: Core, seg: i64, ea: i64, size: i64) -> u32:
    """Whether the fast path does not cover writing an operand; nothing is done."""
    linear: u32 = mask32(ea + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if ea + size > c.write_top[seg] or c.tlb[t + 1] != cast(i64, mask32(linear + (size - 1)) >> 12) << 12:
        return 1
    return 0


@inline
def known_place(c: Core, seg: i64, ea: i64) -> i64:
    """The place of an operand that the fast path covers."""
    linear: u32 = mask32(ea + c.base[seg])
    return linear + c.tlb[((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set + 3]


@inline
def modify(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """The place of an operand to be read and written; -1 if it may not be.

    The handler stores there and then calls :func:`modified`.
    """
    if ea + size > c.write_top[seg]:
        return modify_slow(c, p, seg, ea, size)
    linear: u32 = mask32(ea + c.base[seg])
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4 + c.user_set
    if c.tlb[t + 1] != cast(i64, mask32(linear + (size - 1)) >> 12) << 12:
        return modify_slow(c, p, seg, ea, size)
    return linear + c.tlb[t + 3]


@inline
def modified(c: Core, place: i64) -> None:
    """Finish a read-modify-write at a place that :func:`modify` gave."""
    if place == c.scratch:
        modify_finish(c)


def segment_fault(c: Core, seg: i64) -> i64:
    """#SS(0) or #GP(0), by the segment."""
    if seg == SS:
        return fault(c, STACK, 0)
    return gp(c, 0)


def check_segment(c: Core, seg: i64, ea: i64, size: i64, write_access: i64) -> i64:
    """Check rights and limit of a segment for an access; the linear address, or -1."""
    attr: u32 = c.attr[seg]
    if (attr & 0x90) != 0x90:  # not present (a null selector), or a system segment
        return gp(c, 0) if seg != SS else fault(c, STACK, 0)
    if attr & 8:  # code
        if write_access or (attr & 2) == 0:
            return gp(c, 0)
    elif write_access and (attr & 2) == 0:
        return gp(c, 0)
    if (attr & 0xC) == 4:  # expand-down data
        top: i64 = 0xFFFFFFFF if attr & 0x4000 else 0xFFFF
        if ea <= c.limit[seg] or ea + size - 1 > top:
            return segment_fault(c, seg)
    elif ea + size - 1 > c.limit[seg]:
        return segment_fault(c, seg)
    linear: u32 = mask32(ea + c.base[seg])
    if c.flags & AC and c.cpl == 3 and c.cr[0] & CR0_AM and linear & (size - 1):
        return fault(c, ALIGN, 0)
    return linear


@inline
def user_bit(c: Core) -> i64:
    """USER for accesses at CPL 3."""
    return USER if c.user_set else 0


def read_slow(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """Read that the fast path does not cover."""
    c.p = p
    linear: i64 = check_segment(c, seg, ea, size, 0)
    if linear < 0:
        return -1
    return linear_read(c, mask32(linear), size, user_bit(c))


def write_slow(c: Core, p: i64, seg: i64, ea: i64, value: u32, size: i64) -> i64:
    """Write that the fast path does not cover."""
    c.p = p
    linear: i64 = check_segment(c, seg, ea, size, 1)
    if linear < 0:
        return -1
    return linear_write(c, mask32(linear), value, size, user_bit(c))


def linear_read(c: Core, linear: u32, size: i64, user: i64) -> i64:
    """Read 1, 2 or 4 bytes at a linear address; ``user`` is USER or 0 (supervisor)."""
    value: u32
    place: i64
    if (linear & 0xFFF) + size <= 4096:
        place = translate(c, linear, READ | user)
        if place == -1:
            return -1
        if c.watchpoints:
            check_watch(c, linear, size, 0)
        if place < 0:
            value = bus_read(c, -2 - place, size)
            return value
        if size == 4:
            return load32(c.host, place)
        if size == 2:
            return load16(c.host, place)
        return load8(c.host, place)
    first: i64 = translate(c, linear, READ | user)
    if first == -1:
        return -1
    second: i64 = translate(c, mask32(mask32(linear + size - 1) & FRAME), READ | user)
    if second == -1:
        return -1
    if c.watchpoints:
        check_watch(c, linear, size, 0)
    return read_split(c, linear, first, second, size)


def read_split(c: Core, linear: u32, first: i64, second: i64, size: i64) -> i64:
    """Read bytes on both sides of a page boundary."""
    value: u32 = 0
    here: i64 = 4096 - (linear & 0xFFF)
    i: i64
    for i in range(size):
        place: i64 = step(first, i) if i < here else step(second, i - here)
        byte: u32 = load8(c.host, place) if place >= 0 else bus_read(c, -2 - place, 1) & 0xFF
        value |= byte << (8 * i)
    return value


def step(place: i64, by: i64) -> i64:
    """Advance a translation, which counts downwards on the bus."""
    return place + by if place >= 0 else place - by


def write_place(c: Core, linear: u32, size: i64, user: i64) -> i64:
    """Translate for a write inside one page, do what the page's marks ask; -1: fault or exit."""
    place: i64 = translate(c, linear, WRITE | user)
    if place < 0:
        return place
    page: i64 = place >> 12
    if c.page_flags[page] & HOOKED:
        return page_write_exit(c, linear, place, size)
    return place


def wrote(c: Core, linear: u32, place: i64, size: i64, user: i64) -> None:
    """After the checks of a write: dirty log, decoded code, and the fast tag back if it may be."""
    note_write(c, place, size)
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4
    if user:
        t = t + TLB_HALF
    if must_be_slow(c, place >> 12) == 0 and c.tlb[t + 1] == ((linear & FRAME) | 1):
        c.tlb[t + 1] = linear & FRAME


def linear_write(c: Core, linear: u32, value: u32, size: i64, user: i64) -> i64:
    """Write 1, 2 or 4 bytes at a linear address; all checks before the first byte."""
    first: i64 = write_place(c, linear, size, user)
    if first == -1:
        return -1
    if (linear & 0xFFF) + size <= 4096:
        if c.watchpoints:
            check_watch(c, linear, size, 1)
        if first < 0:
            bus_write(c, -2 - first, size, value)
            return 0
        wrote(c, linear, first, size, user)
        if size == 4:
            store32(c.host, first, value)
        elif size == 2:
            store16(c.host, first, value)
        else:
            store8(c.host, first, value)
        return 0
    second: i64 = write_place(c, mask32(linear + size - 1) & FRAME, size, user)
    if second == -1:
        return -1
    if c.watchpoints:
        check_watch(c, linear, size, 1)
    write_split(c, linear, first, second, value, size)
    return 0


def write_split(c: Core, linear: u32, first: i64, second: i64, value: u32, size: i64) -> None:
    """Write bytes on both sides of a page boundary; both translations are good."""
    here: i64 = 4096 - (linear & 0xFFF)
    i: i64
    for i in range(size):
        place: i64 = step(first, i) if i < here else step(second, i - here)
        if place >= 0:
            note_write(c, place, 1)
            store8(c.host, place, value >> (8 * i))
        else:
            bus_write(c, -2 - place, 1, (value >> (8 * i)) & 0xFF)


def modify_slow(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """Read-modify-write that the fast path does not cover; see :func:`modify`."""
    c.p = p
    checked: i64 = check_segment(c, seg, ea, size, 1)
    if checked < 0:
        return -1
    return modify_linear(c, mask32(checked), size, user_bit(c))


def modify_linear(c: Core, linear: u32, size: i64, user: i64) -> i64:
    """As :func:`modify`, for a linear address."""
    first: i64 = write_place(c, linear, size, user)
    if first == -1:
        return -1
    second: i64 = first
    if (linear & 0xFFF) + size > 4096:
        second = write_place(c, mask32(linear + size - 1) & FRAME, size, user)
        if second == -1:
            return -1
    elif first >= 0:
        if c.watchpoints:
            check_watch(c, linear, size, 1)
        wrote(c, linear, first, size, user)
        return first
    if c.watchpoints:
        check_watch(c, linear, size, 1)
    c.modify_linear = linear
    c.modify_size = size
    c.modify_h1 = first
    c.modify_h2 = second
    if (linear & 0xFFF) + size > 4096:
        store32(c.host, c.scratch, mask32(read_split(c, linear, first, second, size)))
    else:
        store32(c.host, c.scratch, bus_read(c, -2 - first, size))
    return c.scratch


def modify_finish(c: Core) -> None:
    """Move a result from the scratch place to where it belongs."""
    value: u32 = load32(c.host, c.scratch)
    if (c.modify_linear & 0xFFF) + c.modify_size > 4096:
        write_split(c, c.modify_linear, c.modify_h1, c.modify_h2, value, c.modify_size)
    else:
        if c.modify_size < 4:
            value &= 0xFF if c.modify_size == 1 else 0xFFFF
        bus_write(c, -2 - c.modify_h1, c.modify_size, value)


def check_watch(c: Core, linear: u32, size: i64, write_access: i64) -> None:
    """Note data breakpoints (DR7) and the host's watchpoints that an access touches."""
    i: i64
    for i in range(4):
        kind: u32 = (c.dr[7] >> (16 + 4 * i)) & 3
        if (c.dr[7] >> (2 * i)) & 3 == 0 or kind == 0 or kind == 2 or (kind == 1 and write_access == 0):
            continue
        length: i64 = ((c.dr[7] >> (18 + 4 * i)) & 3) + 1
        start: i64 = c.dr[i] & ~(length - 1)
        if linear < start + length and start < linear + size:
            c.pending_trap |= cast(u32, 1) << i
            stop_after(c)
    if c.watchpoints & 2:
        host_watch(c, linear, size, write_access)


def host_watch(c: Core, linear: u32, size: i64, write_access: i64) -> None:
    """The host's watchpoints, a short table of (address, length, kinds)."""
    i: i64
    for i in range(0, 48, 3):
        kinds: u32 = c.watch_table[i + 2]
        if (kinds & (2 if write_access else 1)) == 0:
            continue
        start: i64 = c.watch_table[i]
        if linear < start + c.watch_table[i + 1] and start < linear + size:
            c.watch_hit = 1
            c.exit_address = linear
            c.exit_size = size
            c.exit_write = mask32(write_access)
            stop_after(c)
