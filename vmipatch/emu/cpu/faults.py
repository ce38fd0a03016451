"""Raising a fault: the vector and error code that the run loop delivers.

May import words and state.  A function that finds a fault calls one of these
and returns their value up to the handler, which returns ``FAULT`` without
having changed a register: every fault is restartable.
"""

from __future__ import annotations

from vmipatch.emu.cpu.state import FAULT, Core
from vmipatch.emu.cpu.words import i64, u32

DE = 0
DB = 1
NMI = 2
BP = 3
OVERFLOW = 4
BR = 5
UD = 6
NM = 7
DOUBLE = 8
TS = 10
NP = 11
STACK = 12
GP = 13
PAGE_FAULT = 14
MF = 16
ALIGN = 17
MC = 18

LEAVING = 256  # c.vector: no fault, the instruction leaves the engine undone; c.exit_reason is set


def fault(c: Core, vector: i64, error: u32) -> i64:
    """Fault ``vector`` with an error code (ignored for a vector that has none)."""
    c.vector = vector
    c.error = error
    return FAULT


def gp(c: Core, error: u32) -> i64:
    """#GP with a selector (or 0) as its error code."""
    return fault(c, GP, error)


def ud(c: Core) -> i64:
    """#UD."""
    return fault(c, UD, 0)


def leave(c: Core, reason: i64) -> i64:
    """Leave the engine with the state at this instruction, which is not done."""
    c.vector = LEAVING
    c.exit_reason = reason
    return FAULT
