"""Going from record to record and from block to block; near jumps, calls and returns.

May import words, state, faults, flags, access and stack.

Compiled, a handler ends by calling the handler of the next record in tail
position, which the C compiler turns into a jump: threaded code, with the
processor and the record's index in registers all the way.  Uncompiled it
returns that index to a loop.  Only what cannot go on in this chain returns to
the run loop, with one of the negative codes of state.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmipatch.emu.cpu.faults import gp, leave, ud
from vmipatch.emu.cpu.pause import OP_STOP
from vmipatch.emu.cpu.state import CS, EXIT_INSTRUCTION, JUMP_SIZE, LOOKUP, STOP, Core
from vmipatch.emu.cpu.words import COMPILED, cast, i64, inline, mask32, u32

if not COMPILED:
    HANDLERS: list[Callable[[Any, int], int]] = []


@inline
def dispatch(c: Core, p: i64) -> i64:
    """Go on with the record at ``p``."""
    if COMPILED:
        return HANDLERS[c.code[p]](c, p)
    return p


@inline
def advance(c: Core, p: i64) -> i64:
    """Go on with the next record."""
    if COMPILED:
        return HANDLERS[c.code[p + 8]](c, p + 8)
    return p + 8


@inline
def next_of(c: Core, p: i64) -> u32:
    """EIP behind the instruction at a record."""
    return mask32(c.eip + (c.code[p + 6] & 0xFFFF) + c.code8[p * 4 + 10])


def to_cached(c: Core, target: u32) -> i64:
    """Enter the block at EIP ``target`` by the jump cache, or let the run loop find it."""
    linear: u32 = mask32(target + c.base[CS])
    slot: i64 = jump_slot(linear)
    c.eip = target
    if c.jump_tag[slot] != jump_tag(c, linear):
        return LOOKUP
    return enter(c, target, c.jump_block[slot])


@inline
def jump_slot(linear: u32) -> i64:
    return (linear ^ (linear >> 12)) & (JUMP_SIZE - 1)


@inline
def jump_tag(c: Core, linear: u32) -> i64:
    """What the jump cache knows a block by; never 0."""
    tag: i64 = cast(i64, linear) | c.key << 32 | (cast(i64, 1) << 33 if c.user_set else 0)
    return tag | c.generation << 34


@inline
def enter(c: Core, target: u32, q: i64) -> i64:
    """Enter the block whose head is at ``q``, if CS's limit and the budget allow all of it."""
    rest: i64 = c.remaining - c.code[q + 2]
    c.eip = target
    if rest < 0 or cast(i64, target) + c.code[q + 3] > c.cs_top:
        return LOOKUP
    c.remaining = rest
    return dispatch(c, q + 8)


@inline
def linked(c: Core, p: i64, target: u32, link: i64) -> i64:
    """Jump inside a page: word ``link`` of the record keeps the block found last time."""
    q: i64 = c.code[p + link]
    if q <= 1:
        return unlinked(c, p, target, link)
    c.link_from = p + link
    rest: i64 = c.remaining - c.code[q + 2]
    if rest < 0 or cast(i64, target) + c.code[q + 3] > c.cs_top:
        return unlinked(c, p, target, link)
    c.eip = target
    c.remaining = rest
    return dispatch(c, q + 8)


def unlinked(c: Core, p: i64, target: u32, link: i64) -> i64:
    """A direct jump that no link serves (yet); beyond CS's limit it is #GP(0)."""
    if target >= c.cs_top:
        c.p = p
        return gp(c, 0)
    c.link_from = p + link if c.code[p + link] != 0 else 0
    return to_cached(c, target)


def fall(c: Core, p: i64, target: u32, link: i64) -> i64:
    """Run on at ``target``; beyond CS's limit that is the next fetch's fault, not this instruction's."""
    c.link_from = p + link if c.code[p + link] != 0 else 0
    return to_cached(c, target)


@inline
def fall_linked(c: Core, p: i64, target: u32, link: i64) -> i64:
    """:func:`linked` for what follows a jump that is not taken."""
    q: i64 = c.code[p + link]
    c.link_from = p + link
    rest: i64 = c.remaining - c.code[q + 2]
    if q <= 1 or rest < 0 or cast(i64, target) + c.code[q + 3] > c.cs_top:
        return fall(c, p, target, link)
    c.eip = target
    c.remaining = rest
    return dispatch(c, q + 8)


@inline
def jump_to(c: Core, p: i64, target: u32) -> i64:
    """Jump to a computed EIP."""
    if target >= c.cs_top:
        c.p = p
        return gp(c, 0)
    c.link_from = 0
    return to_cached(c, target)


@inline
def check_target(c: Core, p: i64, target: u32) -> i64:
    """0, or -1 with #GP(0): a target beyond CS's limit, found before anything is pushed."""
    if target >= c.cs_top:
        c.p = p
        return gp(c, 0)
    return 0


def finish(c: Core, p: i64, result: i64) -> i64:
    """What follows a semantic function's result other than 0: end of block, repeat, fault."""
    if result < 0:
        return result
    c.remaining = c.remaining + (c.code[p + 6] >> 16) - 1
    if result == 1:
        c.eip = next_of(c, p)
    else:
        c.eip = mask32(c.eip + (c.code[p + 6] & 0xFFFF))
    return STOP


def handle_stale(c: Core, p: i64) -> i64:
    """A record of a block that was dropped while it ran."""
    c.remaining = c.remaining + (c.code[p + 6] >> 16)
    c.eip = mask32(c.eip + (c.code[p + 6] & 0xFFFF))
    return STOP


def handle_stale_first(c: Core, p: i64) -> i64:
    """The first record of a dropped block: nothing was paid for it."""
    return LOOKUP


def handle_stop(c: Core, p: i64) -> i64:
    """A record that is to wait until the run loop has looked around."""
    if c.patched_at == p and c.code[p] == OP_STOP:
        c.code[p] = c.patched_op
        c.patched_at = 0
    return handle_stale(c, p)


def handle_end(c: Core, p: i64) -> i64:
    """Run on into the next block."""
    return fall_linked(c, p, mask32(c.eip + c.code[p + 3]), 5)


def handle_undefined(c: Core, p: i64) -> i64:
    """Bytes that are no instruction: #UD."""
    c.p = p
    return ud(c)


def handle_too_long(c: Core, p: i64) -> i64:
    """More than 15 bytes: #GP(0)."""
    c.p = p
    return gp(c, 0)


def handle_class_exit(c: Core, p: i64) -> i64:
    """An instruction that the host asked to see; the real handler waits in word 7."""
    c.p = p
    if c.skip_exit:
        c.skip_exit = 0
        return dispatch_as(c, p, c.code[p + 7] & 0xFFFF)
    c.exit_class = c.code[p + 7] >> 16
    c.exit_length = c.code8[p * 4 + 10]
    return leave(c, EXIT_INSTRUCTION)


def dispatch_as(c: Core, p: i64, handler: i64) -> i64:
    """Run the record at ``p`` by another handler than its own."""
    return HANDLERS[handler](c, p)


def op_loop(c: Core, p: i64, count: u32, taken: u32, size: i64) -> i64:
    """The end of LOOP, LOOPE, LOOPNE and JCXZ; ``count`` is the new (E)CX."""
    target: u32 = mask32(c.eip + c.code[p + 3])
    if size == 2:
        target &= 0xFFFF
    if taken and check_target(c, p, target) < 0:
        return -1
    c.reg[1] = (c.reg[1] & ~c.code[p + 5]) | count
    c.link_from = 0
    return to_cached(c, target if taken else mask32(c.eip + c.code[p + 4]))
