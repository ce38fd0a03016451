"""The stack: pushes and pops of instructions, and frames on a stack that is not loaded yet.

May import words, state, faults, paging and access.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import linear_write, read, write
from vmipatch.emu.cpu.faults import fault
from vmipatch.emu.cpu.state import ESP, SS, Core
from vmipatch.emu.cpu.words import cast, i64, inline, mask32, u32


@inline
def push(c: Core, p: i64, value: u32, size: i64) -> i64:
    """Push; ESP changes once the write is done."""
    top: u32 = mask32(c.reg[ESP] - size) & c.stack_mask
    if write(c, p, SS, top, value, size) < 0:
        return -1
    c.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | top
    return 0


@inline
def peek(c: Core, p: i64, offset: i64, size: i64) -> i64:
    """The value ``offset`` bytes above the top of the stack."""
    return read(c, p, SS, mask32(c.reg[ESP] + offset) & c.stack_mask, size)


@inline
def drop(c: Core, amount: i64) -> None:
    """Move ESP up by ``amount``."""
    c.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | (mask32(c.reg[ESP] + amount) & c.stack_mask)


@inline
def pop(c: Core, p: i64, size: i64) -> i64:
    """Pop; -1 with ESP unchanged on a fault."""
    value: i64 = peek(c, p, 0, size)
    if value < 0:
        return -1
    drop(c, size)
    return value


def frame_check(c: Core, esp: u32, attr: u32, limit: u32, amount: i64, vector: i64, error: u32) -> i64:
    """Whether ``amount`` bytes fit below ``esp`` in a stack segment."""
    mask: u32 = mask32(-1) if attr & 0x4000 else 0xFFFF
    low: i64 = mask32(esp - amount) & mask
    last: i64 = low + amount - 1
    if (attr & 0xC) == 4:
        if low <= limit or last > mask:
            return fault(c, vector, error)
    elif last > limit:
        return fault(c, vector, error)
    return 0


def frame_write(c: Core, base: u32, attr: u32, esp: u32, value: u32, size: i64, user: i64) -> i64:
    """Store at ``esp - size`` of a stack segment given by its base and attributes."""
    mask: u32 = mask32(-1) if attr & 0x4000 else 0xFFFF
    return linear_write(c, mask32(base + cast(u32, mask32(esp - size) & mask)), value, size, user)
