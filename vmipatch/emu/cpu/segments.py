"""Segment registers: descriptors, loading them with every check, the cached limits.

May import words, state, faults, paging and access.  Attributes are kept as the
upper half of a descriptor shifted right by 8: bits 0..7 the access byte, bits
12..15 AVL, L, D/B, G.  ``read_top`` and ``write_top`` are the offsets one past
the last that a plain access may touch, or -1 where :func:`check_segment` must
look closer (expand-down, null, wrong type, alignment checks on).
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import linear_read, linear_write
from vmipatch.emu.cpu.faults import NP, STACK, fault, gp
from vmipatch.emu.cpu.paging import USER
from vmipatch.emu.cpu.state import (
    AC,
    CR0_AM,
    CR0_PE,
    CS,
    ES,
    GS,
    LDTR,
    SS,
    TLB_HALF,
    VM,
    Core,
)
from vmipatch.emu.cpu.words import cast, i64, mask32, u32

# Attribute bits
PRESENT = 0x80
SYSTEM_NOT = 0x10  # S: 1 for code and data
CODE = 8
CONFORMING = 4
EXPAND_DOWN = 4
WRITABLE = 2  # readable, for code
ACCESSED = 1
BIG = 0x4000
GRANULAR = 0x8000

REAL_DATA = 0x93
V86_DATA = 0xF3


def update_tops(c: Core, s: i64) -> None:
    """Work out the fast limits of a segment from its cached descriptor."""
    attr: u32 = c.attr[s]
    top: i64 = cast(i64, c.limit[s]) + 1
    c.read_top[s] = -1
    c.write_top[s] = -1
    if (attr & 0x90) == 0x90 and (c.flags & AC == 0 or c.cpl != 3 or c.cr[0] & CR0_AM == 0):
        if attr & CODE:
            if attr & WRITABLE:
                c.read_top[s] = top
        elif (attr & EXPAND_DOWN) == 0:
            c.read_top[s] = top
            if attr & WRITABLE:
                c.write_top[s] = top
    if s == CS:
        c.cs_top = top
        c.key = 1 if attr & BIG else 0
    elif s == SS:
        c.stack_mask = mask32(-1) if attr & BIG else 0xFFFF


def update_all_tops(c: Core) -> None:
    """After a change of CPL, AC or AM."""
    s: i64
    for s in range(ES, GS + 1):
        update_tops(c, s)


def set_cpl(c: Core, level: u32) -> None:
    """Change the privilege level."""
    if c.cpl != level:
        c.cpl = level
        c.user_set = TLB_HALF if level == 3 else 0
        if c.cr[0] & CR0_AM:
            update_all_tops(c)


def set_mode(c: Core) -> None:
    """Work out the derived mode bits after a change of CR0.PE or EFLAGS.VM."""
    c.protected = 1 if c.cr[0] & CR0_PE and (c.flags & VM) == 0 else 0
    c.vm = 1 if c.flags & VM else 0


def fill_segment(c: Core, s: i64, selector: u32, base: u32, limit: u32, attr: u32) -> None:
    """Set a segment register and its cached descriptor."""
    c.sel[s] = selector
    c.base[s] = base
    c.limit[s] = limit
    c.attr[s] = attr
    update_tops(c, s)


def descriptor_base(low: u32, high: u32) -> u32:
    return low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000


def descriptor_limit(low: u32, high: u32) -> u32:
    limit: u32 = (low & 0xFFFF) | (high & 0xF0000)
    if high & 0x800000:
        limit = limit << 12 | 0xFFF
    return limit


def set_from_descriptor(c: Core, s: i64, selector: u32, low: u32, high: u32) -> None:
    """Set a segment register from a descriptor that passed its checks."""
    fill_segment(c, s, selector, descriptor_base(low, high), descriptor_limit(low, high), (high >> 8) & 0xF0FF)


def set_null(c: Core, s: i64, selector: u32) -> None:
    """Load a null selector: the register becomes unusable."""
    fill_segment(c, s, selector, 0, 0, 0)


def set_real(c: Core, s: i64, selector: u32) -> None:
    """Load in real mode: base from the selector, the cached limit stays (so unreal mode works)."""
    attr: u32 = (c.attr[s] & 0xF000) | REAL_DATA
    fill_segment(c, s, selector, selector << 4, c.limit[s], attr)


def set_v86(c: Core, s: i64, selector: u32) -> None:
    """Load in V86 mode."""
    fill_segment(c, s, selector, selector << 4, 0xFFFF, V86_DATA)


def find_descriptor(c: Core, selector: u32, vector: i64) -> i64:
    """Read a descriptor into ``desc_low`` and ``desc_high``; ``vector`` with the selector if outside."""
    table: u32
    limit: u32
    if selector & 4:
        if (c.attr[LDTR] & PRESENT) == 0:
            return fault(c, vector, selector & 0xFFFC)
        table = c.base[LDTR]
        limit = c.limit[LDTR]
    else:
        table = c.gdt_base
        limit = c.gdt_limit
    if (selector | 7) > limit:
        return fault(c, vector, selector & 0xFFFC)
    c.desc_at = mask32(table + (selector & 0xFFF8))
    low: i64 = linear_read(c, c.desc_at, 4, 0)
    if low < 0:
        return -1
    high: i64 = linear_read(c, mask32(c.desc_at + 4), 4, 0)
    if high < 0:
        return -1
    c.desc_low = mask32(low)
    c.desc_high = mask32(high)
    return 0


def mark_accessed(c: Core) -> i64:
    """Set the accessed bit of the descriptor found last, in memory and in ``desc_high``."""
    if c.desc_high & 0x100:
        return 0
    if linear_write(c, mask32(c.desc_at + 5), (c.desc_high >> 8) & 0xFF | 1, 1, 0) < 0:
        return -1
    c.desc_high |= 0x100
    return 0


def load_segment(c: Core, s: i64, selector: u32) -> i64:
    """MOV, POP, LDS and so on to DS, ES, FS, GS or SS (SDM 2, MOV); 0, or -1."""
    selector &= 0xFFFF
    if c.protected == 0:
        if c.vm:
            set_v86(c, s, selector)
        else:
            set_real(c, s, selector)
        return 0
    if s == SS:
        if load_stack_descriptor(c, selector, c.cpl, 13) < 0:
            return -1
        set_from_descriptor(c, SS, selector, c.desc_low, c.desc_high)
        return 0
    if (selector & 0xFFFC) == 0:
        set_null(c, s, selector)
        return 0
    if find_descriptor(c, selector, 13) < 0:
        return -1
    attr: u32 = c.desc_high >> 8
    dpl: u32 = (attr >> 5) & 3
    if (attr & SYSTEM_NOT) == 0 or (attr & (CODE | WRITABLE)) == CODE:
        return gp(c, selector & 0xFFFC)
    if (attr & (CODE | CONFORMING)) != (CODE | CONFORMING) and (dpl < (selector & 3) or dpl < c.cpl):
        return gp(c, selector & 0xFFFC)
    if (attr & PRESENT) == 0:
        return fault(c, NP, selector & 0xFFFC)
    if mark_accessed(c) < 0:
        return -1
    set_from_descriptor(c, s, selector, c.desc_low, c.desc_high)
    return 0


def load_stack_descriptor(c: Core, selector: u32, level: u32, vector: i64) -> i64:
    """Check a selector for SS at privilege ``level``; the descriptor is left in ``desc_low/high``.

    ``vector`` is #GP for MOV SS and far returns, #TS for a stack out of the TSS.
    """
    error: u32 = selector & 0xFFFC
    if error == 0:
        return fault(c, vector, 0)
    if find_descriptor(c, selector, vector) < 0:
        return -1
    attr: u32 = c.desc_high >> 8
    if (selector & 3) != level or (attr & (SYSTEM_NOT | CODE | WRITABLE)) != (SYSTEM_NOT | WRITABLE):
        return fault(c, vector, error)
    if ((attr >> 5) & 3) != level:
        return fault(c, vector, error)
    if (attr & PRESENT) == 0:
        return fault(c, STACK, error)
    return mark_accessed(c)


def drop_inaccessible(c: Core) -> None:
    """After a return to an outer level, null the data segments it may not use."""
    s: i64
    for s in range(ES, GS + 1):
        if s in (CS, SS):
            continue
        attr: u32 = c.attr[s]
        conforming: i64 = 1 if (attr & (CODE | CONFORMING)) == (CODE | CONFORMING) else 0
        if attr & SYSTEM_NOT and conforming == 0 and ((attr >> 5) & 3) < c.cpl:
            set_null(c, s, 0)


def user_access(c: Core) -> i64:
    """USER for accesses made at the current privilege."""
    return USER if c.cpl == 3 else 0
