"""Delivery of interrupts and exceptions: real mode vectors, gates, stack switch, double and triple fault.

May import words, state, faults, access, segments, stack, tasks and flags.
Nothing of the processor changes before every check and every push has
succeeded; a fault on the way is combined with the first as the SDM's table of
double-fault conditions says (3A, 6.15).
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import linear_read
from vmipatch.emu.cpu.faults import (
    DE,
    DOUBLE,
    GP,
    LEAVING,
    NP,
    PAGE_FAULT,
    STACK,
    TS,
    fault,
    gp,
)
from vmipatch.emu.cpu.flags import get_eflags
from vmipatch.emu.cpu.segments import (
    BIG,
    CODE,
    CONFORMING,
    PRESENT,
    SYSTEM_NOT,
    descriptor_base,
    descriptor_limit,
    find_descriptor,
    load_stack_descriptor,
    mark_accessed,
    set_cpl,
    set_from_descriptor,
    set_mode,
    set_null,
    set_real,
    user_access,
)
from vmipatch.emu.cpu.stack import frame_check, frame_write
from vmipatch.emu.cpu.state import (
    AC,
    CR0_PE,
    CS,
    DS,
    ES,
    ESP,
    EXIT_VECTOR,
    FS,
    GS,
    IF,
    NT,
    RF,
    SS,
    TF,
    VM,
    Core,
)
from vmipatch.emu.cpu.tasks import task_gate, tss_stack
from vmipatch.emu.cpu.words import cast, i64, mask32, u32

SOFT = 1  # INT n, INT3, INTO: the gate's DPL counts
HARD = 2  # an external interrupt or NMI
EXCEPTION = 3  # an exception: may push an error code


def has_error_code(vector: i64) -> i64:
    """Whether an exception pushes an error code."""
    return (0x27D00 >> vector) & 1 if vector < 32 else 0


def deliver(c: Core, vector: i64, kind: i64, error: u32, return_eip: u32) -> i64:
    """Transfer control to the handler of ``vector``; 0, or -1 with another fault raised.

    ``return_eip`` is the EIP that is pushed.
    """
    flags: u32 = get_eflags(c)
    if kind == EXCEPTION and vector != 1 and vector != 3 and vector != 4 and vector != DOUBLE:
        flags |= RF
    if kind == EXCEPTION and vector == 1:
        c.dr[7] &= ~cast(u32, 0x2000)  # general detect goes off, so that the handler may look (SDM 3B, 17.2.4)
    if (c.cr[0] & CR0_PE) == 0:
        return deliver_real(c, vector, flags, return_eip)
    external: u32 = 0 if kind == SOFT else 1
    gate_error: u32 = mask32(vector * 8 + 2) | external
    if vector * 8 + 7 > c.idt_limit:
        return gp(c, gate_error)
    at: u32 = mask32(c.idt_base + vector * 8)
    word: i64 = linear_read(c, at, 4, 0)
    if word < 0:
        return -1
    low: u32 = mask32(word)
    word = linear_read(c, mask32(at + 4), 4, 0)
    if word < 0:
        return -1
    high: u32 = mask32(word)
    gate: u32 = (high >> 8) & 0x1F
    if gate != 5 and gate != 6 and gate != 7 and gate != 14 and gate != 15:
        return gp(c, gate_error)
    if kind == SOFT and ((high >> 13) & 3) < c.cpl:
        return gp(c, gate_error)
    if (high & 0x8000) == 0:
        return fault(c, NP, gate_error)
    push_error: i64 = has_error_code(vector) if kind == EXCEPTION else 0
    if gate == 5:
        c.external = external
        return task_gate(c, low >> 16, return_eip, flags, push_error, error)
    return deliver_gate(c, low, high, flags, return_eip, external, push_error, error)


def deliver_real(c: Core, vector: i64, flags: u32, return_eip: u32) -> i64:
    """Through the interrupt vector table."""
    if vector * 4 + 3 > c.idt_limit:
        return gp(c, 0)
    word: i64 = linear_read(c, mask32(c.idt_base + vector * 4), 4, 0)
    if word < 0:
        return -1
    if frame_check(c, c.reg[ESP], c.attr[SS], c.limit[SS], 6, STACK, 0) < 0:
        return -1
    esp: u32 = c.reg[ESP]
    if frame_write(c, c.base[SS], c.attr[SS], esp, flags & 0xFFFF, 2, 0) < 0:
        return -1
    if frame_write(c, c.base[SS], c.attr[SS], mask32(esp - 2), c.sel[CS], 2, 0) < 0:
        return -1
    if frame_write(c, c.base[SS], c.attr[SS], mask32(esp - 4), return_eip & 0xFFFF, 2, 0) < 0:
        return -1
    c.reg[ESP] = (esp & ~c.stack_mask) | (mask32(esp - 6) & c.stack_mask)
    c.flags &= ~(IF | TF | AC | RF)
    set_real(c, CS, mask32(word) >> 16)
    c.eip = mask32(word) & 0xFFFF
    return 0


def deliver_gate(
    c: Core, low: u32, high: u32, flags: u32, return_eip: u32, external: u32, push_error: i64, error: u32
) -> i64:
    """Through an interrupt or trap gate of 16 or 32 bits."""
    selector: u32 = low >> 16
    size: i64 = 4 if high & 0x800 else 2
    target: u32 = low & 0xFFFF
    if size == 4:
        target |= high & 0xFFFF0000
    if (selector & 0xFFFC) == 0:
        return gp(c, external)
    if find_descriptor(c, selector, GP) < 0:
        c.error |= external if c.vector == GP else 0
        return -1
    selector_error: u32 = (selector & 0xFFFC) | external
    attr: u32 = c.desc_high >> 8
    level: u32 = (attr >> 5) & 3
    if (attr & (SYSTEM_NOT | CODE)) != (SYSTEM_NOT | CODE) or level > c.cpl:
        return gp(c, selector_error)
    if (attr & PRESENT) == 0:
        return fault(c, NP, selector_error)
    code_low: u32 = c.desc_low
    code_high: u32 = c.desc_high
    code_at: u32 = c.desc_at
    stack_base: u32 = c.base[SS]
    stack_attr: u32 = c.attr[SS]
    stack_limit: u32 = c.limit[SS]
    esp: u32 = c.reg[ESP]
    stack_error: u32 = external
    user: i64 = user_access(c)
    inner: u32 = 1 if (attr & CONFORMING) == 0 and level < c.cpl else 0
    stack_low: u32 = 0
    stack_high: u32 = 0
    stack_selector: u32 = 0
    amount: i64 = size * (3 + push_error)
    if c.vm and (inner == 0 or level != 0):
        return gp(c, selector_error)
    if inner:
        if tss_stack(c, level) < 0:
            c.error |= external
            return -1
        stack_selector = c.tss_ss
        esp = c.tss_esp
        if load_stack_descriptor(c, stack_selector, level, TS) < 0:
            if c.vector != PAGE_FAULT:
                c.error |= external
            return -1
        stack_low = c.desc_low
        stack_high = c.desc_high
        stack_base = descriptor_base(stack_low, stack_high)
        stack_limit = descriptor_limit(stack_low, stack_high)
        stack_attr = stack_high >> 8
        stack_error = (stack_selector & 0xFFFC) | external
        user = 0
        amount = amount + size * (6 if c.vm else 2)
    if frame_check(c, esp, stack_attr, stack_limit, amount, STACK, stack_error) < 0:
        return -1
    if target > descriptor_limit(code_low, code_high):
        return gp(c, external)
    top: u32 = esp
    i: i64
    if inner:
        if c.vm:
            for i in range(4):
                segment: i64 = GS if i == 0 else (FS if i == 1 else (DS if i == 2 else ES))
                if frame_write(c, stack_base, stack_attr, top, c.sel[segment], size, user) < 0:
                    return -1
                top = mask32(top - size)
        if frame_write(c, stack_base, stack_attr, top, c.sel[SS], size, user) < 0:
            return -1
        top = mask32(top - size)
        if frame_write(c, stack_base, stack_attr, top, c.reg[ESP], size, user) < 0:
            return -1
        top = mask32(top - size)
    if frame_write(c, stack_base, stack_attr, top, flags, size, user) < 0:
        return -1
    top = mask32(top - size)
    if frame_write(c, stack_base, stack_attr, top, c.sel[CS], size, user) < 0:
        return -1
    top = mask32(top - size)
    if frame_write(c, stack_base, stack_attr, top, return_eip, size, user) < 0:
        return -1
    top = mask32(top - size)
    if push_error:
        if frame_write(c, stack_base, stack_attr, top, error, size, user) < 0:
            return -1
        top = mask32(top - size)
    c.desc_low = code_low
    c.desc_high = code_high
    c.desc_at = code_at
    if mark_accessed(c) < 0:
        return -1
    was_v86: u32 = c.vm
    c.flags &= ~(TF | NT | VM | RF)
    if (high & 0x100) == 0:
        c.flags &= ~IF
    if was_v86:
        set_null(c, GS, 0)
        set_null(c, FS, 0)
        set_null(c, DS, 0)
        set_null(c, ES, 0)
        set_mode(c)
    if inner:
        set_cpl(c, level)
        set_from_descriptor(c, SS, stack_selector, stack_low, stack_high)
    set_from_descriptor(c, CS, (selector & 0xFFFC) | c.cpl, code_low, c.desc_high)
    mask: u32 = mask32(-1) if stack_attr & BIG else 0xFFFF
    c.reg[ESP] = (esp & ~mask) | (top & mask)
    c.eip = target
    return 0


def is_contributory(vector: i64) -> i64:
    return 1 if vector == DE or (vector >= TS and vector <= GP) else 0


def wants_exit(c: Core, vector: i64, error: u32, kind: i64) -> i64:
    """Whether the host asked to see this vector instead of the guest; fills the exit's details."""
    if (c.exit_vectors[(vector >> 5) & 7] >> (vector & 31)) & 1 == 0:
        return 0
    c.exit_reason = EXIT_VECTOR
    c.exit_vector = vector
    c.exit_error = error
    c.exit_kind = kind
    return 1


def interrupt(c: Core, vector: i64, kind: i64, error: u32, return_eip: u32) -> i64:
    """Deliver, through double fault if need be.

    0: the handler is next. 1: the processor shut down (triple fault). 2: a
    hooked page was to be written and the host must act first.
    """
    while True:
        c.task_done = 0
        if deliver(c, vector, kind, error, return_eip) == 0:
            return 0
        if c.vector == LEAVING:
            return 2
        if c.task_done:
            return_eip = c.eip
        second: i64 = c.vector
        first: i64 = vector if kind == EXCEPTION else 256
        if first == DOUBLE:
            if is_contributory(second) or second == PAGE_FAULT:
                c.shut_down = 1
                return 1
            vector = second
            error = c.error
        elif (is_contributory(first) and is_contributory(second)) or (
            first == PAGE_FAULT and (is_contributory(second) or second == PAGE_FAULT)
        ):
            vector = DOUBLE
            error = 0
        else:
            vector = second
            error = c.error
        kind = EXCEPTION
