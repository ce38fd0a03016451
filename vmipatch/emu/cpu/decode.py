"""The decoder: bytes to one record, by the tables that forms.py makes of the opcode table.

May import words, state, forms' constants and operands' marks.  The layout of a
record is in operands.py.
"""

from __future__ import annotations

from vmipatch.emu.cpu.operands import (
    MARK_ADDRESS16,
    MARK_LOCK,
    MARK_MEMORY,
    MARK_REP,
    MARK_REPNE,
    MARK_SIZE16,
)
from vmipatch.emu.cpu.state import DS, EBP, ESP, SS, ZERO, Core
from vmipatch.emu.cpu.words import i64, load8, load16, load32, mask32, p8, signed8, signed16, u32

MORE = -1  # the bytes at hand end inside the instruction
TOO_LONG = -2  # more than 15 bytes: #GP(0)
UNDEFINED = -3  # no instruction: #UD

LONGEST = 15

# Kinds of forms.py, as the engine's constants
KIND_BYTE = 1
KIND_SIGNED = 2
KIND_FULL = 3
KIND_WORD = 4
KIND_FAR = 5
KIND_OFFSET = 6
KIND_REL8 = 7
KIND_REL = 8
KIND_ENTER = 9
KIND_ONE = 10
TABLE_TWO_BYTE = 256
TABLE_GROUP = 0x8000
LEAF_MODRM = 1
LEAF_END = 2
LEAF_LOCK = 4


def decode(c: Core, p: i64, source: p8, at: i64, available: i64, key: i64) -> i64:
    """Decode at ``source[at]`` into the record at ``p``; the length, or MORE, TOO_LONG, UNDEFINED.

    ``key`` bit 0 is CS.D.  The record's word 6 and the targets of jumps are the
    caller's: the immediate of a jump is left in word 4, sign extended.  Returns
    with ``c.leaf`` at the leaf.
    """
    n: i64 = 0
    size16: u32 = 0 if key & 1 else 1
    address16: u32 = size16
    toggle_size: u32 = 0
    toggle_address: u32 = 0
    mark: u32 = 0
    segment: i64 = -1
    byte: u32
    map_at: i64 = 0
    while True:
        if n >= LONGEST:
            return TOO_LONG
        if n >= available:
            return MORE
        byte = load8(source, at + n)
        n = n + 1
        if byte == 0x66:
            toggle_size = 1
        elif byte == 0x67:
            toggle_address = 1
        elif byte == 0xF0:
            mark |= MARK_LOCK
        elif byte == 0xF2:
            mark = (mark & ~MARK_REP) | MARK_REPNE
        elif byte == 0xF3:
            mark = (mark & ~MARK_REPNE) | MARK_REP
        elif (byte & 0xE7) == 0x26:
            segment = (byte >> 3) & 3
        elif byte == 0x64 or byte == 0x65:
            segment = byte - 0x60
        else:
            break
    size16 ^= toggle_size
    address16 ^= toggle_address
    if byte == 0x0F:
        if n >= LONGEST:
            return TOO_LONG
        if n >= available:
            return MORE
        byte = load8(source, at + n)
        n = n + 1
        map_at = TABLE_TWO_BYTE
    leaf: i64 = c.tables[map_at + byte]
    modrm: u32 = 0
    has_modrm: u32 = 0
    if leaf & TABLE_GROUP or (leaf != 0 and c.tables[leaf] & LEAF_MODRM):
        if n >= LONGEST:
            return TOO_LONG
        if n >= available:
            return MORE
        modrm = load8(source, at + n)
        n = n + 1
        has_modrm = 1
        if leaf & TABLE_GROUP:
            leaf = c.tables[(leaf & ~TABLE_GROUP) + ((modrm >> 3) & 7) + (8 if modrm >= 0xC0 else 0)]
    if leaf == 0:
        return UNDEFINED
    kinds: u32 = c.tables[leaf]
    c.leaf = leaf
    b8: i64 = p * 4
    i: i64
    for i in range(3, 8):
        c.code[p + i] = 0
    c.code8[b8 + 6] = ZERO
    c.code8[b8 + 7] = ZERO
    c.code8[b8 + 8] = 0
    c.code[p + 5] = 0xFFFF if address16 else mask32(-1)
    memory: u32 = 0
    opcode: u32 = byte
    c.code8[b8 + 4] = 0
    c.code8[b8 + 5] = 0
    if has_modrm:
        if modrm < 0xC0 and not (map_at and opcode >= 0x20 and opcode <= 0x23):
            memory = 1
            if address16:
                n = address_16(c, p, source, at, n, available, modrm)
            else:
                n = address_32(c, p, source, at, n, available, modrm)
            if n < 0:
                return n
        else:
            c.code8[b8 + 5] = modrm & 7
        if (kinds >> 4) & 3 == 1:
            c.code8[b8 + 4] = (modrm >> 3) & 7
    if (kinds >> 8) & 3 == 3:
        c.code8[b8 + 5] = opcode & 7
    n = immediate(c, p, source, at, n, available, (kinds >> 12) & 15, size16, address16)
    if n < 0:
        return n
    if n > LONGEST:
        return TOO_LONG
    if (kinds >> 12) & 15 == KIND_OFFSET:
        memory = 1
        c.code8[b8 + 9] = DS
    elif has_modrm == 0 or memory == 0:
        c.code8[b8 + 9] = DS
    if segment >= 0:
        c.code8[b8 + 9] = segment
    handler: u32 = c.tables[leaf + 1 + memory + 2 * size16]
    if handler == 0:
        return UNDEFINED
    if size16 == 0 and c.tables[leaf + 7] and handler:
        handler = fast_handler(c, leaf, handler, memory, address16, c.code8[b8 + 7])
    if mark & MARK_LOCK and (memory == 0 or (kinds & LEAF_LOCK) == 0):
        return UNDEFINED
    if (opcode >= 0xD8 and opcode <= 0xDF) and map_at == 0:
        c.code[p + 7] = (opcode & 7) << 8 | modrm
    if memory:
        mark |= MARK_MEMORY
    if size16:
        mark |= MARK_SIZE16
    if address16:
        mark |= MARK_ADDRESS16
    c.code8[b8 + 10] = n & 0xFF
    c.code8[b8 + 11] = mark
    c.code[p] = handler
    return n


def fast_handler(c: Core, leaf: i64, handler: u32, memory: u32, address16: u32, index: i64) -> u32:
    """The fast handler of a leaf, where the operand allows it, else the one given."""
    fast: u32 = c.tables[leaf + 7] & 0xFFFF
    if memory:
        if address16:
            return handler
        fast = c.tables[leaf + 7] >> 16 if index == ZERO else c.tables[leaf + 8]
    return fast if fast else handler


def address_32(c: Core, p: i64, source: p8, at: i64, n: i64, available: i64, modrm: u32) -> i64:
    """A 32-bit address form: base, index, scale and displacement into the record; the new length."""
    b8: i64 = p * 4
    mode: u32 = modrm >> 6
    base: i64 = modrm & 7
    segment: i64 = DS
    if base == 4:
        if n >= LONGEST:
            return TOO_LONG
        if n >= available:
            return MORE
        sib: u32 = load8(source, at + n)
        n = n + 1
        base = sib & 7
        if (sib >> 3) & 7 != 4:
            c.code8[b8 + 7] = (sib >> 3) & 7
            c.code8[b8 + 8] = sib >> 6
    wide: u32 = 0
    if base == EBP and mode == 0:
        wide = 1
        base = ZERO
    elif base in (ESP, EBP):
        segment = SS
    c.code8[b8 + 6] = base
    c.code8[b8 + 9] = segment
    if mode == 2 or wide:
        if n + 4 > LONGEST:
            return TOO_LONG
        if n + 4 > available:
            return MORE
        c.code[p + 3] = load32(source, at + n)
        return n + 4
    if mode == 1:
        if n + 1 > LONGEST:
            return TOO_LONG
        if n + 1 > available:
            return MORE
        c.code[p + 3] = mask32(signed8(load8(source, at + n)))
        return n + 1
    return n


def address_16(c: Core, p: i64, source: p8, at: i64, n: i64, available: i64, modrm: u32) -> i64:
    """A 16-bit address form."""
    b8: i64 = p * 4
    mode: u32 = modrm >> 6
    form: u32 = modrm & 7
    segment: i64 = DS
    base: i64 = ZERO
    index: i64 = ZERO
    if form < 2:
        base = 3
    elif form < 4 or form == 6:
        base = EBP
    elif form == 4:
        base = 6
    elif form == 5:
        base = 7
    else:
        base = 3
    if form < 4:
        index = 6 + (form & 1)
    if form == 6 and mode == 0:
        base = ZERO
    elif base == EBP:
        segment = SS
    c.code8[b8 + 6] = base
    c.code8[b8 + 7] = index
    c.code8[b8 + 9] = segment
    if mode == 2 or (mode == 0 and form == 6):
        if n + 2 > LONGEST:
            return TOO_LONG
        if n + 2 > available:
            return MORE
        c.code[p + 3] = load16(source, at + n)
        return n + 2
    if mode == 1:
        if n + 1 > LONGEST:
            return TOO_LONG
        if n + 1 > available:
            return MORE
        c.code[p + 3] = mask32(signed8(load8(source, at + n)))
        return n + 1
    return n


def immediate_length(kind: u32, size16: u32, address16: u32) -> i64:
    """Bytes of an immediate of a kind."""
    if kind in (KIND_BYTE, KIND_SIGNED, KIND_REL8):
        return 1
    if kind == KIND_WORD:
        return 2
    if kind in (KIND_FULL, KIND_REL):
        return 2 if size16 else 4
    if kind == KIND_FAR:
        return 4 if size16 else 6
    if kind == KIND_OFFSET:
        return 2 if address16 else 4
    if kind == KIND_ENTER:
        return 3
    return 0


def immediate(
    c: Core, p: i64, source: p8, at: i64, n: i64, available: i64, kind: u32, size16: u32, address16: u32
) -> i64:
    """Take the immediate into words 4 and 7 (an absolute offset into word 3); the new length."""
    length: i64 = immediate_length(kind, size16, address16)
    if n + length > LONGEST:
        return TOO_LONG
    if n + length > available:
        return MORE
    at = at + n
    if kind == KIND_BYTE:
        c.code[p + 4] = load8(source, at)
    elif kind in (KIND_SIGNED, KIND_REL8):
        c.code[p + 4] = mask32(signed8(load8(source, at)))
        if kind == KIND_SIGNED and size16:
            c.code[p + 4] &= 0xFFFF
    elif kind == KIND_WORD:
        c.code[p + 4] = load16(source, at)
    elif kind == KIND_FULL:
        c.code[p + 4] = load16(source, at) if size16 else load32(source, at)
    elif kind == KIND_REL:
        c.code[p + 4] = mask32(signed16(load16(source, at))) if size16 else load32(source, at)
    elif kind == KIND_FAR:
        if size16:
            c.code[p + 4] = load16(source, at)
            c.code[p + 7] = load16(source, at + 2)
        else:
            c.code[p + 4] = load32(source, at)
            c.code[p + 7] = load16(source, at + 4)
    elif kind == KIND_OFFSET:
        c.code[p + 3] = load16(source, at) if address16 else load32(source, at)
    elif kind == KIND_ENTER:
        c.code[p + 4] = load16(source, at)
        c.code[p + 7] = load8(source, at + 2)
    elif kind == KIND_ONE:
        c.code[p + 4] = 1
    return n + length
