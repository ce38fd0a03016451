"""The engine's functions that ordinary Python calls: run, look at and change the state.

May import every other part of the engine.  :mod:`cpu` makes a class of them.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu.access import linear_read, linear_write
from vmipatch.emu.cpu.blocks import flush_code
from vmipatch.emu.cpu.decode import decode
from vmipatch.emu.cpu.flags import get_eflags, set_flags
from vmipatch.emu.cpu.paging import flush_page, flush_tlb, forget_code, slow_writes, translate
from vmipatch.emu.cpu.pause import stop_after
from vmipatch.emu.cpu.run import hand_over, run_loop, settle
from vmipatch.emu.cpu.segments import fill_segment, set_cpl, set_mode, update_all_tops
from vmipatch.emu.cpu.state import TLB_ENTRIES, TLB_WORDS, Core
from vmipatch.emu.cpu.system import arm_debug
from vmipatch.emu.cpu.words import COMPILED, cast, exported, i64, mask32, u32
from vmipatch.emu.cpu.x87_state import fpu_put, fpu_raw, fpu_reset

image_of: Any = None
put_image: Any = None


@exported
def run_engine(c: Core, budget: i64, done: i64) -> i64:
    """Run at most ``budget`` instructions after ``done``; the exit reason."""
    reason: i64
    c.until = done + budget
    c.remaining = budget
    c.link_from = 0
    c.p = 0
    c.running = 1
    reason = run_loop(c)
    settle(c)
    c.running = 0
    return reason


@exported
def stop_engine(c: Core) -> None:
    """End the run after the instruction that is under way (called from a device)."""
    if c.running:
        stop_after(c)
    else:
        c.stop = 1


@exported
def instruction_count(c: Core) -> i64:
    """Instructions retired, exact in the middle of one too."""
    return c.until - c.remaining - (c.code[c.p + 6] >> 16 if c.p > 0 else 0)


@exported
def current_eip(c: Core) -> u32:
    """EIP of the instruction under way, or of the next one."""
    if c.p > 0:
        return mask32(c.eip + (c.code[c.p + 6] & 0xFFFF))
    return c.eip


@exported
def load_decoder(c: Core, table: object) -> None:
    """Take the decoder's tables."""
    words: list[int] = list(table)  # type: ignore[call-overload]
    i: i64
    for i in range(len(words)):
        c.tables[i] = words[i]


@exported
def decode_length(c: Core, code: object, wide: i64) -> i64:
    """The length of the instruction that up to 16 bytes begin with; ``wide`` is CS.D.

    -1: it goes on behind them; -2: longer than 15 bytes; -3: no instruction.
    """
    i: i64
    given: bytes = bytes(code)  # type: ignore[call-overload]
    count: i64 = len(given) if len(given) < 16 else 16
    for i in range(count):
        c.instruction[i] = given[i]
    return decode(c, 8, c.instruction, 0, count, wide)


@exported
def put_reg(c: Core, r: i64, value: u32) -> None:
    """Set a general register."""
    c.reg[r & 7] = value


@exported
def put_control(c: Core, which: i64, value: u32) -> None:
    """Set a control register without checks; translations are dropped."""
    c.cr[which] = value
    set_mode(c)
    flush_tlb(c, 0)
    update_all_tops(c)


@exported
def put_cr2(c: Core, value: u32) -> None:
    """Set CR2 alone."""
    c.cr[2] = value


@exported
def inject(c: Core, vector: i64, kind: i64, error: u32) -> i64:
    """Deliver an interrupt (kind 2) or exception (3) at CS:EIP, hooks not asked; 0, or an exit reason."""
    c.halted = 0
    return hand_over(c, vector, kind, error)


@exported
def put_debug(c: Core, which: i64, value: u32) -> None:
    """Set a debug register."""
    c.dr[which] = value
    arm_debug(c)


@exported
def put_segment(c: Core, s: i64, selector: u32, base: u32, limit: u32, attr: u32) -> None:
    """Set a segment register and its hidden part."""
    fill_segment(c, s, selector, base, limit, attr)


@exported
def put_cpl(c: Core, level: u32) -> None:
    """Set the privilege level."""
    set_cpl(c, level)


@exported
def read_eflags(c: Core) -> u32:
    """EFLAGS."""
    return get_eflags(c)


@exported
def put_eflags(c: Core, value: u32) -> None:
    """Set EFLAGS whole."""
    set_flags(c, value)
    c.flags = value
    set_mode(c)
    update_all_tops(c)


@exported
def drop_page(c: Core, page: i64) -> None:
    """Drop code decoded from a backing page."""
    forget_code(c, page)


@exported
def drop_translations(c: Core) -> None:
    """Drop every translation."""
    flush_tlb(c, 0)


@exported
def drop_translation(c: Core, linear: u32) -> None:
    """Drop the translation of one page."""
    flush_page(c, linear)


@exported
def drop_code(c: Core) -> None:
    """Drop all decoded code."""
    flush_code(c)


@exported
def relog_writes(c: Core) -> None:
    """Make each next write to a page pass through the dirty log."""
    slow_writes(c)


@exported
def place_of(c: Core, linear: u32, access: i64) -> i64:
    """Translate a linear address as :func:`translate` does; accessed bits are set as by an access."""
    vector: i64 = c.vector
    place: i64 = translate(c, linear, access)
    c.vector = vector
    return place


@exported
def peek_linear(c: Core, linear: u32, size: i64) -> i64:
    """Read 1, 2 or 4 bytes at a linear address with supervisor rights; -1 if not mapped."""
    return linear_read(c, linear, size, 0)


@exported
def poke_linear(c: Core, linear: u32, value: u32, size: i64) -> i64:
    """Write 1, 2 or 4 bytes at a linear address with supervisor rights; -1 if not mapped."""
    return linear_write(c, linear, value, size, 0)


@exported
def put_break(c: Core, index: i64, linear: u32) -> None:
    """Set an entry of the table of breakpoints."""
    c.break_table[index] = linear


@exported
def put_watch(c: Core, index: i64, linear: u32, length: u32, kinds: u32) -> None:
    """Set an entry of the table of watchpoints: kinds 1 read, 2 write, 0 none."""
    c.watch_table[3 * index] = linear
    c.watch_table[3 * index + 1] = length
    c.watch_table[3 * index + 2] = kinds
    arm_debug(c)


@exported
def hook_vector(c: Core, vector: i64, hooked: i64) -> None:
    """Make an interrupt vector leave the engine, or not."""
    bit: u32 = cast(u32, 1) << (vector & 31)
    if hooked:
        c.exit_vectors[vector >> 5] |= bit
    else:
        c.exit_vectors[vector >> 5] &= ~bit


@exported
def hook_port(c: Core, port: i64, hooked: i64) -> None:
    """Make a port leave the engine, or not."""
    if hooked:
        c.exit_ports[port >> 3] |= 1 << (port & 7)
    else:
        c.exit_ports[port >> 3] &= ~(1 << (port & 7)) & 0xFF


@exported
def tlb_image(c: Core) -> object:
    """The TLB as an opaque object for :func:`put_tlb`."""
    if COMPILED:
        return (image_of(c.tlb, 8 * TLB_WORDS), image_of(c.tlb_global, 2 * TLB_ENTRIES))
    return (list(c.tlb), bytes(c.tlb_global))


@exported
def put_tlb(c: Core, image: object) -> None:
    """Bring back what :func:`tlb_image` gave."""
    both: Any = image
    words, marks = both
    c.generation = c.generation + 1
    if COMPILED:
        put_image(c.tlb, words)
        put_image(c.tlb_global, marks)
        return
    c.tlb = list(words)
    c.tlb_global[:] = marks


@exported
def reset_fpu(c: Core) -> None:
    """The x87 unit as RESET leaves it."""
    fpu_reset(c)


@exported
def get_st(c: Core, index: i64) -> object:
    """ST(index) as an 80-bit integer."""
    return fpu_raw(c, index)


@exported
def put_st(c: Core, index: i64, value: object) -> None:
    """Set ST(index) from an 80-bit integer; its tag becomes valid."""
    fpu_put(c, index, value)
