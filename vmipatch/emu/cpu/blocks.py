"""The cache of decoded code: blocks of records, keyed by where their bytes are.

May import words, state, paging, decode, flow and faults.  A block is a head (8
words) and one record per instruction, never over a page boundary:

======  ==================================================================
word 1  backing offset of the first byte
word 2  number of instructions; 0 once dropped
word 3  bytes
word 4  key (CS.D)
word 5  slot in the hash table
======  ==================================================================

The head at word 0 and the records behind it are the scratch block, for code
that is not kept: an instruction across two pages or out of the bus, the first
few records of a block when the budget ends inside, single steps.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import user_bit
from vmipatch.emu.cpu.decode import (
    KIND_REL,
    KIND_REL8,
    LEAF_END,
    MORE,
    UNDEFINED,
    decode,
)
from vmipatch.emu.cpu.faults import gp
from vmipatch.emu.cpu.flow import jump_slot, jump_tag
from vmipatch.emu.cpu.host import bus_read
from vmipatch.emu.cpu.operands import MARK_SIZE16
from vmipatch.emu.cpu.paging import FETCH, GONE, slow_page, translate
from vmipatch.emu.cpu.pause import OP_END
from vmipatch.emu.cpu.state import CS, HASH_SIZE, JUMP_SIZE, MOST_BLOCKS, SCRATCH_WORDS, Core
from vmipatch.emu.cpu.words import cast, i64, load8, mask32, p8, u32

LONGEST_BLOCK = 48
OP_UNDEFINED = 4  # with the next two, the fixed handlers of flow.py
OP_TOO_LONG = 5
OP_CLASS_EXIT = 6


def flush_code(c: Core) -> None:
    """Drop all decoded code."""
    i: i64
    for i in range(HASH_SIZE):
        c.hash_key[i] = 0
    for i in range(c.memory.total_pages):
        c.page_list[i] = 0
        c.code_bits[i] = 0
    for i in range(JUMP_SIZE):
        c.jump_tag[i] = 0
    c.next_free = SCRATCH_WORDS
    c.next_cell = 2
    c.code[2] = 0
    c.link_from = 0
    c.patched_at = 0
    c.flushes = c.flushes + 1


def hash_slot(c: Core, place: i64, key: i64) -> i64:
    """The slot that holds a block's key, or the one where it should go: there its key is 0 or GONE.

    Slots of dropped blocks are taken again, or those of code that is often written over would pile up.
    """
    wanted: i64 = (place | key << 34) + 1
    slot: i64 = (place ^ (place >> 9) ^ (key << 5)) & (HASH_SIZE - 1)
    gone: i64 = -1
    while c.hash_key[slot] != 0:
        if c.hash_key[slot] == wanted:
            return slot
        if c.hash_key[slot] == GONE and gone < 0:
            gone = slot
        slot = (slot + 1) & (HASH_SIZE - 1)
    return gone if gone >= 0 else slot


def find_block(c: Core) -> i64:
    """The head of the block at CS:EIP; 0 is the scratch block; -1: a fault."""
    if c.eip >= c.cs_top:
        return gp(c, 0)
    linear: u32 = mask32(c.eip + c.base[CS])
    slot: i64 = jump_slot(linear)
    head: i64
    if c.jump_tag[slot] == jump_tag(c, linear):
        head = c.jump_block[slot]
        if c.code[head + 2] != 0:
            return head
    place: i64 = translate(c, linear, FETCH | user_bit(c))
    if place == -1:
        return -1
    if place < 0:
        return build_scratch(c, linear, place)
    at: i64 = hash_slot(c, place, c.key)
    if c.hash_key[at] != 0 and c.hash_key[at] != GONE:
        head = c.hash_block[at]
    else:
        if c.next_free + 8 * (LONGEST_BLOCK + 4) > c.arena_size or c.next_cell > 2 * MOST_BLOCKS:
            flush_code(c)
            at = hash_slot(c, place, c.key)
        head = build_block(c, c.next_free, c.host, place, place, 4096 - (place & 0xFFF), LONGEST_BLOCK)
        if head < 0:
            return build_scratch(c, linear, place)
        keep_block(c, head, at, place)
    c.jump_tag[slot] = jump_tag(c, linear)
    c.jump_block[slot] = mask32(head)
    return head


def keep_block(c: Core, head: i64, at: i64, place: i64) -> None:
    """Enter a block that was just built into the tables."""
    count: i64 = c.code[head + 2]
    page: i64 = place >> 12
    c.next_free = head + 8 * (count + 2)
    c.code[head + 5] = mask32(at)
    c.hash_key[at] = (place | c.key << 34) + 1
    c.hash_block[at] = mask32(head)
    cell: i64 = c.next_cell
    c.next_cell = cell + 2
    c.cells[cell] = mask32(head)
    c.cells[cell + 1] = c.page_list[page]
    c.page_list[page] = mask32(cell)
    if c.code_bits[page] == 0:
        slow_page(c, page << 12)
    first: i64 = (place >> 7) & 31
    last: i64 = ((place + c.code[head + 3] - 1) >> 7) & 31
    i: i64
    for i in range(first, last + 1):
        c.code_bits[page] = c.code_bits[page] | cast(u32, 1) << i


def build_block(c: Core, head: i64, source: p8, at: i64, place: i64, available: i64, most: i64) -> i64:
    """Decode up to ``most`` instructions to a head; the head, or MORE if not even one is whole."""
    count: i64 = 0
    used: i64 = 0
    p: i64 = head + 8
    ended: u32 = 0
    length: i64
    while count < most and ended == 0 and used < available:
        length = decode(c, p, source, at + used, available - used, c.key)
        if length == MORE:
            break
        if length < 0:
            c.code[p] = OP_UNDEFINED if length == UNDEFINED else OP_TOO_LONG
            c.code[p + 7] = 0
            c.code8[p * 4 + 10] = 1
            length = 1
            ended = 1
        else:
            if c.tables[c.leaf] & LEAF_END:
                ended = 1
            if c.exit_classes and (c.exit_classes >> c.tables[c.leaf + 5]) & 1 and c.tables[c.leaf + 5]:
                c.code[p + 7] = c.code[p] | c.tables[c.leaf + 5] << 16
                c.code[p] = OP_CLASS_EXIT
                ended = 1
            elif ended:
                place_jump(c, p, used, length, place)
        c.code[p + 6] = mask32(used)
        used = used + length
        count = count + 1
        p = p + 8
    if count == 0:
        return MORE
    end_block(c, head, count, used, place, ended)
    return head


def place_jump(c: Core, p: i64, used: i64, length: i64, place: i64) -> None:
    """Work out the target and the fall-through of a relative jump, and which may be linked."""
    kind: u32 = (c.tables[c.leaf] >> 12) & 15
    if kind != KIND_REL and kind != KIND_REL8:
        return
    conditional: u32 = 1 if c.tables[c.leaf + 6] else 0
    target: u32 = mask32(used + length + c.code[p + 4])
    c.code[p + 3] = target
    c.code[p + 4] = mask32(used + length)
    if conditional == 0:
        return  # LOOP and JCXZ keep their address mask
    c.code[p + 5] = may_link(place, target)
    c.code[p + 7] = may_link(place, mask32(used + length))
    if c.code8[p * 4 + 11] & MARK_SIZE16:
        c.code[p + 5] = 0


def may_link(place: i64, offset: u32) -> u32:
    """1 if the byte ``offset`` (mod 2**32) from a block's first is in the same page."""
    where: u32 = mask32((place & 0xFFF) + offset)
    return 1 if place >= 0 and where < 4096 else 0


def end_block(c: Core, head: i64, count: i64, used: i64, place: i64, ended: u32) -> None:
    """Fill in the head, the counts left, and the record behind the last."""
    i: i64
    for i in range(count):
        p: i64 = head + 8 + 8 * i
        c.code[p + 6] = (c.code[p + 6] & 0xFFFF) | mask32(count - i) << 16
    q: i64 = head + 8 + 8 * count
    c.code[q] = OP_END
    c.code[q + 3] = mask32(used)
    c.code[q + 5] = may_link(place, mask32(used)) if ended == 0 else 0
    c.code[q + 6] = mask32(used)
    c.code8[q * 4 + 10] = 0
    c.code[head] = 0
    c.code[head + 1] = mask32(place)
    c.code[head + 2] = mask32(count)
    c.code[head + 3] = mask32(used)
    c.code[head + 4] = mask32(c.key)


def build_scratch(c: Core, linear: u32, place: i64) -> i64:
    """One instruction that is not kept: across two pages, or fetched from the bus. 0, or -1."""
    here: i64 = 4096 - (linear & 0xFFF)
    room: i64 = c.cs_top - c.eip
    have: i64 = here if here < 15 else 15
    length: i64
    i: i64
    if have > room:
        have = room
    for i in range(have):
        c.instruction[i] = load8(c.host, place + i) if place >= 0 else bus_read(c, -2 - place + i, 1) & 0xFF
    length = decode(c, 8, c.instruction, 0, have, c.key)
    if length == MORE:
        if have == room:
            return gp(c, 0)
        second: i64 = translate(c, mask32(linear + here), FETCH | user_bit(c))
        if second == -1:
            return -1
        more: i64 = 15 - have
        if have + more > room:
            more = room - have
        for i in range(more):
            c.instruction[have + i] = (
                load8(c.host, second + i) if second >= 0 else bus_read(c, -2 - second + i, 1) & 0xFF
            )
        have = have + more
        length = decode(c, 8, c.instruction, 0, have, c.key)
        if length == MORE:
            return gp(c, 0)
    build_block(c, 0, c.instruction, 0, -1, have, 1)
    return 0


def copy_to_scratch(c: Core, head: i64, count: i64) -> i64:
    """Copy the first ``count`` records of a block to the scratch block."""
    i: i64
    place: i64 = c.code[head + 1] if head else -1
    for i in range(8, 8 + 8 * count):
        c.code[i] = c.code[head + i]
    used: u32 = (c.code[8 * count + 6] & 0xFFFF) + c.code8[(8 * count) * 4 + 10]
    end_block(c, 0, count, used, -1, 0)
    c.code[1] = mask32(place)
    return 0


def trim_scratch(c: Core) -> None:
    """Forget what the scratch block holds."""
    c.code[2] = 0
