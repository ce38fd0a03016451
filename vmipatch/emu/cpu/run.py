"""The run loop: from block to block, with everything that happens between instructions.

May import every other part of the engine.  The order between two instructions
is that of the SDM (3A, 6.9): traps of the last one, NMI, interrupts, then
faults of fetching the next.
"""

from __future__ import annotations

from vmipatch.emu.cpu.blocks import copy_to_scratch, find_block
from vmipatch.emu.cpu.faults import DB, LEAVING
from vmipatch.emu.cpu.flow import HANDLERS
from vmipatch.emu.cpu.host import acknowledge
from vmipatch.emu.cpu.interrupts import EXCEPTION, HARD, interrupt, wants_exit
from vmipatch.emu.cpu.pause import BIAS, BIASED, OP_STOP
from vmipatch.emu.cpu.state import (
    CS,
    EXIT_BREAKPOINT,
    EXIT_HALT,
    EXIT_LIMIT,
    EXIT_NONE,
    EXIT_REQUESTED,
    EXIT_SHUTDOWN,
    EXIT_WATCHPOINT,
    FAULT,
    IF,
    LOOKUP,
    RF,
    SCRATCH_WORDS,
    TF,
    Core,
)
from vmipatch.emu.cpu.words import COMPILED, cast, i64, mask32, u32

DR6_BS = 0x4000


def settle(c: Core) -> None:
    """Back at a boundary: undo what stop_after did to end the chain."""
    if c.remaining <= BIASED:
        c.remaining = c.remaining + BIAS
        c.until = c.until + BIAS
    if c.patched_at:
        if c.code[c.patched_at] == OP_STOP:
            c.code[c.patched_at] = c.patched_op
        c.patched_at = 0
    c.p = 0


def chain(c: Core, p: i64) -> i64:
    """Run from a record until something needs the run loop."""
    if COMPILED:
        return HANDLERS[c.code[p]](c, p)
    while p >= 0:
        p = HANDLERS[c.code[p]](c, p)
    return p


def raise_exception(c: Core, vector: i64, error: u32) -> i64:
    """Deliver an exception at CS:EIP; an exit reason, or EXIT_NONE."""
    if wants_exit(c, vector, error, EXCEPTION):
        return c.exit_reason
    return hand_over(c, vector, EXCEPTION, error)


def hand_over(c: Core, vector: i64, kind: i64, error: u32) -> i64:
    """Deliver to the guest; an exit reason, or EXIT_NONE."""
    c.link_from = 0
    result: i64 = interrupt(c, vector, kind, error, c.eip)
    if result == 1:
        return EXIT_SHUTDOWN
    if result == 2:
        return c.exit_reason
    return EXIT_NONE


def debug_trap(c: Core) -> i64:
    """#DB for what the last instruction did (single step, data breakpoints, task switch)."""
    c.dr[6] |= c.pending_trap
    c.pending_trap = 0
    if wants_exit(c, DB, 0, EXCEPTION):
        return c.exit_reason
    return hand_over(c, DB, EXCEPTION, 0)


def events(c: Core) -> i64:
    """Look at everything that may come between two instructions; an exit reason, or EXIT_NONE."""
    reason: i64
    vector: i64
    if c.shut_down:
        return EXIT_SHUTDOWN
    if c.host_stop:
        c.host_stop = 0
        return EXIT_REQUESTED
    c.stop = 0
    if c.watch_hit:
        c.watch_hit = 0
        return EXIT_WATCHPOINT
    if c.pending_trap and c.shadow != 2:
        reason = debug_trap(c)
        if reason != EXIT_NONE:
            return reason
    if c.shadow == 0:
        if c.nmi_pending and c.nmi_blocked == 0:
            c.nmi_pending = 0
            c.halted = 0
            if wants_exit(c, 2, 0, HARD):
                return c.exit_reason
            c.nmi_blocked = 1
            reason = hand_over(c, 2, HARD, 0)
            if reason != EXIT_NONE:
                return reason
        if c.interrupt_pin and c.flags & IF:
            c.halted = 0
            vector = acknowledge(c)
            if wants_exit(c, vector, 0, HARD):
                return c.exit_reason
            reason = hand_over(c, vector, HARD, 0)
            if reason != EXIT_NONE:
                return reason
    if c.halted:
        return EXIT_HALT
    return EXIT_NONE


def instruction_breakpoint(c: Core) -> i64:
    """Debug registers and the host's breakpoints at CS:EIP; an exit reason, or EXIT_NONE.

    ``c.p`` is -1 where a #DB was delivered instead.
    """
    linear: u32 = mask32(c.eip + c.base[CS])
    i: i64
    hit: u32 = 0
    if c.breakpoints and c.skip_break == 0:
        for i in range(c.breakpoints):
            if c.break_table[i] == linear:
                c.exit_address = linear
                return EXIT_BREAKPOINT
    c.skip_break = 0
    if c.debug_active and (c.flags & RF) == 0:
        for i in range(4):
            if (c.dr[7] >> (2 * i)) & 3 and (c.dr[7] >> (16 + 4 * i)) & 3 == 0 and c.dr[i] == linear:
                hit |= cast(u32, 1) << i
    if hit:
        c.dr[6] |= hit
        # The pushed image has RF as it was: the handler sets it to go on (SDM 3B, 17.3.1.1).
        c.p = -1
        if wants_exit(c, DB, 0, EXCEPTION):
            return c.exit_reason
        return hand_over(c, DB, EXCEPTION, 0)
    return EXIT_NONE


def after_fault(c: Core) -> i64:
    """A handler found a fault: bring CS:EIP and the count to its instruction, and deliver."""
    p: i64 = c.p
    left: i64 = c.code[p + 6] >> 16
    if p > 0:
        c.eip = mask32(c.eip + (c.code[p + 6] & 0xFFFF))
    else:
        left = 0
    vector: i64 = c.vector
    if vector == LEAVING:
        c.remaining = c.remaining + left
        settle(c)
        return c.exit_reason
    # A fault counts as one instruction, so that a guest that does nothing but fault still ends.
    c.remaining = c.remaining + left - 1
    settle(c)
    return raise_exception(c, vector, c.error)


def step_mode(c: Core) -> u32:
    """Whether the next instruction must run alone."""
    if c.single or c.shadow or c.debug_active or c.breakpoints or c.flags & (TF | RF) or c.skip_exit:
        return 1
    return 0


def run_loop(c: Core) -> i64:
    """Run until ``c.remaining`` is used up or something needs the host; the exit reason."""
    reason: i64
    head: i64
    count: i64
    result: i64
    link: i64
    trap: u32
    while True:
        if c.stop or c.halted or c.shut_down or c.nmi_pending or c.pending_trap or c.interrupt_pin:
            reason = events(c)
            if reason != EXIT_NONE:
                return reason
        if c.remaining <= 0:
            return EXIT_LIMIT
        trap = 0
        count = c.remaining
        if step_mode(c):
            if c.debug_active or c.breakpoints:
                reason = instruction_breakpoint(c)
                if reason != EXIT_NONE:
                    return reason
                if c.p < 0:
                    c.p = 0
                    c.remaining = c.remaining - 1
                    continue
            trap = c.flags & TF
            c.flags &= ~RF
            c.shadow = 0
            c.no_trap = 0
            count = 1
        link = c.link_from
        head = find_block(c)
        if head < 0:
            c.link_from = 0
            c.p = 0
            result = FAULT
        else:
            if c.link_from and link >= SCRATCH_WORDS and head:
                c.code[link] = mask32(head)
            c.link_from = 0
            if c.code[head + 2] > count or c.eip + cast(i64, c.code[head + 3]) > c.cs_top:
                result = run_part(c, head, count)
            else:
                c.remaining = c.remaining - c.code[head + 2]
                result = chain_guarded(c, head, count)
        if result == FAULT:
            reason = after_fault(c)
            if reason != EXIT_NONE:
                return reason
            continue
        if result != LOOKUP:
            c.link_from = 0
        settle(c)
        if trap and c.no_trap == 0:
            c.pending_trap |= DR6_BS
        if c.single:
            reason = events(c)
            if reason == EXIT_NONE:
                reason = EXIT_LIMIT
            return reason


def chain_guarded(c: Core, head: i64, count: i64) -> i64:
    """Run a whole block and, unless in step mode, whatever follows it."""
    result: i64
    rest: i64
    if count > 1 or c.remaining == 0:
        return chain(c, head + 8)
    # One instruction alone: hold back the rest of the budget so that nothing is entered behind it.
    rest = c.remaining
    c.remaining = 0
    c.until = c.until - rest
    result = chain(c, head + 8)
    c.remaining = c.remaining + rest
    c.until = c.until + rest
    return result


def run_part(c: Core, head: i64, count: i64) -> i64:
    """Run the first ``count`` instructions of a block, or those that CS's limit lets be fetched."""
    fit: i64 = 0
    most: i64 = c.code[head + 2]
    p: i64
    if count > most:
        count = most
    while fit < count:
        p = head + 8 + 8 * fit
        if c.eip + cast(i64, c.code[p + 6] & 0xFFFF) + c.code8[p * 4 + 10] > c.cs_top:
            break
        fit = fit + 1
    if fit == 0:
        c.p = 0
        c.vector = 13
        c.error = 0
        return FAULT
    copy_to_scratch(c, head, fit)
    c.remaining = c.remaining - fit
    return chain_guarded(c, 0, count)
