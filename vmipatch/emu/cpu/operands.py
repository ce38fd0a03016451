"""Operands of the instructions that are not worth a version of their own per size and form.

May import words, state and access.  Sizes here are in bytes, known only at run time.

A record (8 words; ``p`` is its first word's index) holds:

=========  =====================================================================
word 0     handler number
byte 4     A: the register of the ModRM reg field (or in the opcode)
byte 5     B: the register of the ModRM r/m field (or in the opcode)
byte 6, 7  base and index register of a memory operand (8: none)
byte 8, 9  scale (a shift count), segment register
byte 10    length of the instruction
byte 11    marks, below
word 3     displacement; of a near jump the target, relative to the block
word 4     immediate
word 5     mask of the address size; of a near jump the block it leads to
word 6     offset of the instruction in its block; above bit 16 how many
           instructions are left in the block, this one included
word 7     selector of a far pointer, second immediate, or the second link
=========  =====================================================================
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import effective, modified, modify, read, write
from vmipatch.emu.cpu.state import Core
from vmipatch.emu.cpu.words import (
    i64,
    inline,
    load8,
    load16,
    load32,
    mask32,
    store8,
    store16,
    store32,
    u32,
)

MARK_MEMORY = 1
MARK_SIZE16 = 2
MARK_ADDRESS16 = 4
MARK_REP = 8
MARK_REPNE = 16
MARK_LOCK = 32


@inline
def get8(c: Core, r: i64) -> u32:
    return (c.reg[r & 3] >> ((r & 4) << 1)) & 0xFF


@inline
def get16(c: Core, r: i64) -> u32:
    return c.reg[r] & 0xFFFF


@inline
def get32(c: Core, r: i64) -> u32:
    return c.reg[r]


@inline
def put8(c: Core, r: i64, value: u32) -> None:
    shift: u32 = mask32((r & 4) << 1)
    c.reg[r & 3] = mask32((c.reg[r & 3] & ~(mask32(0xFF) << shift)) | (value & 0xFF) << shift)


@inline
def put16(c: Core, r: i64, value: u32) -> None:
    c.reg[r] = (c.reg[r] & ~mask32(0xFFFF)) | (value & 0xFFFF)


@inline
def put32(c: Core, r: i64, value: u32) -> None:
    c.reg[r] = value


def get_register(c: Core, r: i64, size: i64) -> u32:
    """A general register of ``size`` bytes."""
    if size == 4:
        return c.reg[r]
    if size == 2:
        return get16(c, r)
    return get8(c, r)


def put_register(c: Core, r: i64, value: u32, size: i64) -> None:
    """Set a general register of ``size`` bytes."""
    if size == 4:
        c.reg[r] = value
    elif size == 2:
        put16(c, r, value)
    else:
        put8(c, r, value)


@inline
def reg_a(c: Core, p: i64) -> i64:
    return c.code8[p * 4 + 4]


@inline
def reg_b(c: Core, p: i64) -> i64:
    return c.code8[p * 4 + 5]


@inline
def segment_of(c: Core, p: i64) -> i64:
    return c.code8[p * 4 + 9]


@inline
def marks(c: Core, p: i64) -> u32:
    return c.code8[p * 4 + 11]


def read_sized(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """:func:`read` for a size known at run time."""
    if size == 4:
        return read(c, p, seg, ea, 4)
    if size == 2:
        return read(c, p, seg, ea, 2)
    return read(c, p, seg, ea, 1)


def write_sized(c: Core, p: i64, seg: i64, ea: i64, value: u32, size: i64) -> i64:
    """:func:`write` for a size known at run time."""
    if size == 4:
        return write(c, p, seg, ea, value, 4)
    if size == 2:
        return write(c, p, seg, ea, value, 2)
    return write(c, p, seg, ea, value, 1)


def modify_sized(c: Core, p: i64, seg: i64, ea: i64, size: i64) -> i64:
    """:func:`modify` for a size known at run time."""
    if size == 4:
        return modify(c, p, seg, ea, 4)
    if size == 2:
        return modify(c, p, seg, ea, 2)
    return modify(c, p, seg, ea, 1)


def load_place(c: Core, place: i64, size: i64) -> u32:
    """The value at a place that modify gave."""
    if size == 4:
        return load32(c.host, place)
    if size == 2:
        return load16(c.host, place)
    return load8(c.host, place)


def store_place(c: Core, place: i64, value: u32, size: i64) -> None:
    """Store at a place that modify gave, and finish the access."""
    if size == 4:
        store32(c.host, place, value)
    elif size == 2:
        store16(c.host, place, value)
    else:
        store8(c.host, place, value)
    modified(c, place)


def read_e(c: Core, p: i64, size: i64) -> i64:
    """The r/m operand, or -1."""
    if marks(c, p) & MARK_MEMORY:
        return read_sized(c, p, segment_of(c, p), effective(c, p), size)
    return get_register(c, reg_b(c, p), size)


def write_e(c: Core, p: i64, value: u32, size: i64) -> i64:
    """Set the r/m operand; 0 or -1."""
    if marks(c, p) & MARK_MEMORY:
        return write_sized(c, p, segment_of(c, p), effective(c, p), value, size)
    put_register(c, reg_b(c, p), value, size)
    return 0
