"""Hardware task switches, and the stacks that a TSS holds.

May import words, state, faults, access, segments and flags.  The order of
checks and writes follows SDM 3A, 7.3: faults before the switch commits belong
to the old task, those while loading the new segment registers to the new one.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import linear_read, linear_write
from vmipatch.emu.cpu.faults import GP, NP, STACK, TS, fault, gp
from vmipatch.emu.cpu.flags import get_eflags, set_flags
from vmipatch.emu.cpu.paging import flush_tlb, load_pdptes, translate
from vmipatch.emu.cpu.segments import (
    CODE,
    CONFORMING,
    PRESENT,
    SYSTEM_NOT,
    WRITABLE,
    find_descriptor,
    mark_accessed,
    set_cpl,
    set_from_descriptor,
    set_mode,
    set_null,
    set_v86,
    update_all_tops,
)
from vmipatch.emu.cpu.state import (
    CR0_PG,
    CR0_TS,
    CR4_PAE,
    CS,
    ES,
    ESP,
    GS,
    LDTR,
    NT,
    SS,
    TR,
    VM,
    Core,
)
from vmipatch.emu.cpu.words import i64, mask32, u32

BY_JUMP = 0
BY_CALL = 1  # CALL, interrupt or exception: the old task is linked
BY_IRET = 2

FLAG_MASK = 0x3F7FD5


def tss_stack(c: Core, level: u32) -> i64:
    """Read SS:ESP for a privilege level out of the current TSS."""
    error: u32 = c.sel[TR] & 0xFFFC
    word: i64
    if c.attr[TR] & 8:
        if level * 8 + 11 > c.limit[TR]:
            return fault(c, TS, error)
        word = linear_read(c, mask32(c.base[TR] + level * 8 + 4), 4, 0)
        if word < 0:
            return -1
        c.tss_esp = mask32(word)
        word = linear_read(c, mask32(c.base[TR] + level * 8 + 8), 2, 0)
    else:
        if level * 4 + 5 > c.limit[TR]:
            return fault(c, TS, error)
        word = linear_read(c, mask32(c.base[TR] + level * 4 + 2), 2, 0)
        if word < 0:
            return -1
        c.tss_esp = mask32(word)
        word = linear_read(c, mask32(c.base[TR] + level * 4 + 4), 2, 0)
    if word < 0:
        return -1
    c.tss_ss = mask32(word)
    return 0


def task_gate(c: Core, selector: u32, return_eip: u32, flags: u32, push_error: i64, error: u32) -> i64:
    """Switch through a task gate of the IDT."""
    if check_tss(c, selector, GP, 0) < 0:
        c.error |= c.external
        return -1
    if switch_task(c, selector, BY_CALL, return_eip, flags) < 0:
        return -1
    if push_error:
        size: i64 = 4 if c.attr[TR] & 8 else 2
        top: u32 = mask32(c.reg[ESP] - size) & c.stack_mask
        if top + size - 1 > c.limit[SS]:
            return fault(c, STACK, c.external)
        if linear_write(c, mask32(c.base[SS] + top), error, size, 8 if c.cpl == 3 else 0) < 0:
            return -1
        c.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | top
    return 0


def check_tss(c: Core, selector: u32, vector: i64, busy: u32) -> i64:
    """Check a TSS selector (``busy``: 1 for IRET's back link); its descriptor is left found."""
    if selector & 4 or (selector & 0xFFFC) == 0:
        return fault(c, vector, selector & 0xFFFC)
    if find_descriptor(c, selector, vector) < 0:
        return -1
    kind: u32 = (c.desc_high >> 8) & 0x1F
    if kind != (3 if busy else 1) and kind != (11 if busy else 9):
        return fault(c, vector, selector & 0xFFFC)
    if (c.desc_high & 0x8000) == 0:
        return fault(c, NP, selector & 0xFFFC)
    return 0


def read_tss(c: Core, base: u32, offset: i64, size: i64) -> u32:
    """A field of a TSS that is known to be mapped."""
    return mask32(linear_read(c, mask32(base + offset), size, 0))


def set_busy(c: Core, selector: u32, busy: u32) -> i64:
    """Set or clear the busy bit of a TSS descriptor in the GDT."""
    at: u32 = mask32(c.gdt_base + (selector & 0xFFF8) + 5)
    kind: i64 = linear_read(c, at, 1, 0)
    if kind < 0:
        return -1
    value: u32 = mask32(kind) | 2 if busy else mask32(kind) & 0xFD
    return linear_write(c, at, value, 1, 0)


def save_task(c: Core, return_eip: u32, flags: u32) -> None:
    """Write the dynamic fields of the outgoing task; its TSS is known to be writable."""
    base: u32 = c.base[TR]
    i: i64
    if c.attr[TR] & 8:
        linear_write(c, mask32(base + 32), return_eip, 4, 0)
        linear_write(c, mask32(base + 36), flags, 4, 0)
        for i in range(8):
            linear_write(c, mask32(base + 40 + 4 * i), c.reg[i], 4, 0)
        for i in range(6):
            linear_write(c, mask32(base + 72 + 4 * i), c.sel[i], 2, 0)
        return
    linear_write(c, mask32(base + 14), return_eip & 0xFFFF, 2, 0)
    linear_write(c, mask32(base + 16), flags & 0xFFFF, 2, 0)
    for i in range(8):
        linear_write(c, mask32(base + 18 + 2 * i), c.reg[i] & 0xFFFF, 2, 0)
    for i in range(4):
        linear_write(c, mask32(base + 34 + 2 * i), c.sel[i], 2, 0)


def switch_task(c: Core, selector: u32, source: i64, return_eip: u32, flags: u32) -> i64:
    """Switch to the task whose TSS descriptor was found last; 0, or -1."""
    low: u32 = c.desc_low
    high: u32 = c.desc_high
    base: u32 = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
    limit: u32 = (low & 0xFFFF) | (high & 0xF0000)
    if high & 0x800000:
        limit = limit << 12 | 0xFFF
    wide: u32 = (high >> 11) & 1
    if limit < (0x67 if wide else 0x2B):
        return fault(c, TS, selector & 0xFFFC)
    old_selector: u32 = c.sel[TR]
    old_last: u32 = 95 if c.attr[TR] & 8 else 41
    # Everything that will be touched must be mapped before anything changes.
    if translate(c, c.base[TR], 1) == -1 or translate(c, mask32(c.base[TR] + old_last), 1) == -1:
        return -1
    if translate(c, base, 1 if source == BY_CALL else 0) == -1:
        return -1
    if translate(c, mask32(base + (103 if wide else 43)), 0) == -1:
        return -1
    if source != BY_CALL and set_busy(c, old_selector, 0) < 0:
        return -1
    if source == BY_IRET:
        flags &= ~NT
    save_task(c, return_eip, flags)
    new_cr3: u32 = 0
    new_eip: u32
    new_flags: u32
    ldt: u32
    i: i64
    regs: i64
    if wide:
        new_cr3 = read_tss(c, base, 28, 4)
        new_eip = read_tss(c, base, 32, 4)
        new_flags = read_tss(c, base, 36, 4)
        ldt = read_tss(c, base, 96, 2)
        for i in range(8):
            c.task_words[i] = read_tss(c, base, 40 + 4 * i, 4)
        for i in range(6):
            c.task_words[8 + i] = read_tss(c, base, 72 + 4 * i, 2)
        c.task_words[14] = read_tss(c, base, 100, 1) & 1
    else:
        new_eip = read_tss(c, base, 14, 2)
        new_flags = read_tss(c, base, 16, 2)
        ldt = read_tss(c, base, 42, 2)
        for i in range(8):
            c.task_words[i] = read_tss(c, base, 18 + 2 * i, 2) | 0xFFFF0000
        for i in range(4):
            c.task_words[8 + i] = read_tss(c, base, 34 + 2 * i, 2)
        c.task_words[12] = 0
        c.task_words[13] = 0
        c.task_words[14] = 0
    if source == BY_CALL:
        linear_write(c, base, old_selector, 2, 0)
        new_flags |= NT
    if source != BY_IRET:
        if set_busy(c, selector, 1) < 0:
            return -1
        high |= 0x200
    # The switch is done: from here faults are in the new task.
    c.p = 0
    c.task_done = 1
    c.cr[0] |= CR0_TS
    c.sel[TR] = selector
    c.base[TR] = base
    c.limit[TR] = limit
    c.attr[TR] = ((high >> 8) & 0xF0FF) | 2
    c.dr[7] &= ~0x155
    if c.task_words[14]:
        c.pending_trap |= 0x8000
        c.stop = 1
    if wide and c.cr[0] & CR0_PG and new_cr3 != c.cr[3]:
        c.cr[3] = new_cr3
        if c.cr[4] & CR4_PAE and load_pdptes(c, new_cr3) < 0:
            return -1
        flush_tlb(c, 1)
    for regs in range(8):
        c.reg[regs] = c.task_words[regs]
    c.eip = new_eip
    set_flags(c, new_flags)
    c.flags = new_flags & (FLAG_MASK if wide else 0x7FD5)
    set_mode(c)
    return load_task_segments(c, ldt)


def load_task_segments(c: Core, ldt: u32) -> i64:
    """Load LDTR and the segment registers of the new task from ``task_words``."""
    i: i64
    for i in range(6):
        set_null(c, i, c.task_words[8 + i])
    set_null(c, LDTR, ldt)
    if ldt & 0xFFFC:
        if ldt & 4 or find_descriptor(c, ldt, TS) < 0:
            return fault(c, TS, ldt & 0xFFFC)
        if (c.desc_high >> 8) & 0x1F != 2 or (c.desc_high & 0x8000) == 0:
            return fault(c, TS, ldt & 0xFFFC)
        set_from_descriptor(c, LDTR, ldt, c.desc_low, c.desc_high)
    if c.flags & VM:
        for i in range(6):
            set_v86(c, i, c.task_words[8 + i])
        set_cpl(c, 3)
        update_all_tops(c)
        return 0
    selector: u32 = c.task_words[8 + CS]
    level: u32 = selector & 3
    if (selector & 0xFFFC) == 0:
        return fault(c, TS, 0)
    set_cpl(c, level)
    if find_descriptor(c, selector, TS) < 0:
        return -1
    attr: u32 = c.desc_high >> 8
    dpl: u32 = (attr >> 5) & 3
    if (attr & (SYSTEM_NOT | CODE)) != (SYSTEM_NOT | CODE):
        return fault(c, TS, selector & 0xFFFC)
    if (dpl > level) if attr & CONFORMING else (dpl != level):
        return fault(c, TS, selector & 0xFFFC)
    if (attr & PRESENT) == 0:
        return fault(c, NP, selector & 0xFFFC)
    if mark_accessed(c) < 0:
        return -1
    set_from_descriptor(c, CS, selector, c.desc_low, c.desc_high)
    selector = c.task_words[8 + SS]
    if (selector & 0xFFFC) == 0:
        return fault(c, TS, 0)
    if find_descriptor(c, selector, TS) < 0:
        return -1
    attr = c.desc_high >> 8
    if (attr & (SYSTEM_NOT | CODE | WRITABLE)) != (SYSTEM_NOT | WRITABLE) or (selector & 3) != level:
        return fault(c, TS, selector & 0xFFFC)
    if ((attr >> 5) & 3) != level:
        return fault(c, TS, selector & 0xFFFC)
    if (attr & PRESENT) == 0:
        return fault(c, STACK, selector & 0xFFFC)
    if mark_accessed(c) < 0:
        return -1
    set_from_descriptor(c, SS, selector, c.desc_low, c.desc_high)
    for i in range(ES, GS + 1):
        if i in (CS, SS):
            continue
        selector = c.task_words[8 + i]
        if (selector & 0xFFFC) == 0:
            continue
        if find_descriptor(c, selector, TS) < 0:
            return -1
        attr = c.desc_high >> 8
        dpl = (attr >> 5) & 3
        if (attr & SYSTEM_NOT) == 0 or (attr & (CODE | WRITABLE)) == CODE:
            return fault(c, TS, selector & 0xFFFC)
        if (attr & (CODE | CONFORMING)) != (CODE | CONFORMING) and (dpl < (selector & 3) or dpl < c.cpl):
            return fault(c, TS, selector & 0xFFFC)
        if (attr & PRESENT) == 0:
            return fault(c, NP, selector & 0xFFFC)
        if mark_accessed(c) < 0:
            return -1
        set_from_descriptor(c, i, selector, c.desc_low, c.desc_high)
    if c.eip > c.limit[CS]:
        return gp(c, 0)
    return 0


def return_task(c: Core, return_eip: u32) -> i64:
    """IRET with NT set: back to the task that the back link names."""
    link: i64 = linear_read(c, c.base[TR], 2, 0)
    if link < 0:
        return -1
    selector: u32 = mask32(link)
    if check_tss(c, selector, TS, 1) < 0:
        return -1
    return switch_task(c, selector, BY_IRET, return_eip, get_eflags(c))
