"""Ending a chain of records early: the records that stand for "stop here", and how one is put in place.

May import words and state.
"""

from __future__ import annotations

from vmipatch.emu.cpu.state import Core
from vmipatch.emu.cpu.words import i64

OP_STALE = 0  # leave the block before this record
OP_STALE_FIRST = 1  # the same for a first record: whoever enters a dropped block has paid nothing
OP_STOP = 2  # put in place of a record for once: leave the block before it, then put it back
OP_END = 3  # behind the last record of a block that runs on into the next

BIAS = 1 << 60  # taken from c.remaining and c.until: no block can be entered
BIASED = -(1 << 58)  # c.remaining at or below this says so


def stop_after(c: Core) -> None:
    """Return to the run loop once the instruction at ``c.p`` is done."""
    c.stop = 1
    if c.remaining > BIASED:
        c.remaining = c.remaining - BIAS
        c.until = c.until - BIAS
    at: i64 = c.p + 8
    if c.p > 0 and c.patched_at == 0:
        c.patched_at = at
        c.patched_op = c.code[at]
        c.code[at] = OP_STOP
