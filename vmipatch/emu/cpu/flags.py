"""The arithmetic flags, kept as the last result until somebody asks.

May import words and state.

``res`` is the last result, sign extended to 64 bits: ZF says that its low 32
bits are zero, SF that it is negative, PF comes from its low byte xor bits
32..39 (for a result those are all equal, and an even number of flips does not
change a parity).  ``aux`` is the vector of carries out of each bit, moved up so
that bit 31 is the carry out of the operand's top bit: CF is bit 31, OF is bit
31 xor bit 30, AF is bit 3.
"""

from __future__ import annotations

from vmipatch.emu.cpu.state import AF, ARITHMETIC, CF, PF, SF, ZF, Core
from vmipatch.emu.cpu.words import cast, i64, inline, mask32, u32

PARITY_NIBBLES = 0x9669  # bit n is set where the nibble n has an even number of ones


@inline
def get_cf(c: Core) -> u32:
    return c.aux >> 31


@inline
def get_of(c: Core) -> u32:
    return ((c.aux >> 31) ^ (c.aux >> 30)) & 1


@inline
def get_zf(c: Core) -> u32:
    return 1 if mask32(c.res) == 0 else 0


@inline
def get_sf(c: Core) -> u32:
    return 1 if c.res < 0 else 0


@inline
def get_pf(c: Core) -> u32:
    byte: i64 = (c.res ^ (c.res >> 32)) & 0xFF
    return (PARITY_NIBBLES >> ((byte ^ (byte >> 4)) & 15)) & 1


@inline
def get_af(c: Core) -> u32:
    return (c.aux >> 3) & 1


@inline
def condition(c: Core, code: i64) -> u32:
    """The condition ``code`` of Jcc, SETcc and CMOVcc (0..15)."""
    result: u32
    which: i64 = code >> 1
    if which == 0:
        result = get_of(c)
    elif which == 1:
        result = get_cf(c)
    elif which == 2:
        result = get_zf(c)
    elif which == 3:
        result = get_cf(c) | get_zf(c)
    elif which == 4:
        result = get_sf(c)
    elif which == 5:
        result = get_pf(c)
    elif which == 6:
        result = get_sf(c) ^ get_of(c)
    else:
        result = (get_sf(c) ^ get_of(c)) | get_zf(c)
    return result ^ (code & 1)


@inline
def set_flags(c: Core, value: u32) -> None:
    """Set the six arithmetic flags from a word laid out as EFLAGS."""
    carry: u32 = value & CF
    over: u32 = (value >> 11) & 1
    c.aux = cast(u32, carry) << 31 | cast(u32, carry ^ over) << 30 | (value & AF) >> 1
    low: i64 = 0 if value & ZF else 0x100
    if (value & PF) == 0:
        low = low + (cast(i64, 1) << 32)
    if value & SF:
        low = low - (cast(i64, 1) << 62)
    c.res = low


@inline
def arithmetic_flags(c: Core) -> u32:
    """The six arithmetic flags as they stand in EFLAGS."""
    return get_cf(c) | get_pf(c) << 2 | get_af(c) << 4 | get_zf(c) << 6 | get_sf(c) << 7 | get_of(c) << 11


def get_eflags(c: Core) -> u32:
    """EFLAGS whole; bit 1 is always set."""
    return (c.flags & ~ARITHMETIC) | arithmetic_flags(c) | 2


@inline
def set_cf_of(c: Core, carry: u32, over: u32) -> None:
    """Change CF and OF alone."""
    c.aux = (c.aux & 0x3FFFFFFF) | cast(u32, carry) << 31 | cast(u32, (carry ^ over) & 1) << 30


@inline
def set_cf(c: Core, carry: u32) -> None:
    """Change CF alone."""
    set_cf_of(c, carry, get_of(c))


def set_zf(c: Core, zero: u32) -> None:
    """Change ZF alone."""
    set_flags(c, (arithmetic_flags(c) & ~ZF) | (ZF if zero else 0))


def set_flag_bits(c: Core, mask: u32, value: u32) -> None:
    """Change the arithmetic flags in ``mask``."""
    set_flags(c, (arithmetic_flags(c) & ~mask) | (value & mask))
