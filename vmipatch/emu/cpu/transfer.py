"""Far control transfers: JMP, CALL and RET far, IRET, INT n, SYSENTER and SYSEXIT.

May import words, state, faults, flags, access, segments, stack, tasks and
interrupts.  Each function works for the instruction at ``c.p``; it returns
``STOP`` with CS:EIP at the target, or ``FAULT`` with nothing changed.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import effective
from vmipatch.emu.cpu.faults import GP, LEAVING, NP, STACK, TS, fault, gp
from vmipatch.emu.cpu.flags import get_eflags, get_of, set_flags
from vmipatch.emu.cpu.inout import DONE
from vmipatch.emu.cpu.interrupts import EXCEPTION, SOFT, deliver, wants_exit
from vmipatch.emu.cpu.operands import MARK_MEMORY, marks, read_sized, segment_of
from vmipatch.emu.cpu.segments import (
    BIG,
    CODE,
    CONFORMING,
    PRESENT,
    SYSTEM_NOT,
    descriptor_base,
    descriptor_limit,
    drop_inaccessible,
    fill_segment,
    find_descriptor,
    load_stack_descriptor,
    mark_accessed,
    set_cpl,
    set_from_descriptor,
    set_mode,
    set_real,
    set_v86,
    update_all_tops,
    user_access,
)
from vmipatch.emu.cpu.stack import drop, frame_check, frame_write, peek
from vmipatch.emu.cpu.state import (
    AC,
    CS,
    DF,
    DS,
    ES,
    ESP,
    FAULT,
    FS,
    GS,
    ID,
    IF,
    IOPL,
    NT,
    RF,
    SS,
    STOP,
    TF,
    VIF,
    VIP,
    VM,
    Core,
)
from vmipatch.emu.cpu.tasks import BY_CALL, BY_JUMP, check_tss, return_task, switch_task, tss_stack
from vmipatch.emu.cpu.words import i64, mask32, u32

CONTROL_FLAGS = 0x277700  # every writable flag that is not arithmetic: ID AC RF NT IOPL DF IF TF


def this_eip(c: Core, p: i64) -> u32:
    """EIP of the instruction at a record."""
    return mask32(c.eip + (c.code[p + 6] & 0xFFFF))


def next_eip(c: Core, p: i64) -> u32:
    """EIP behind the instruction at a record."""
    return mask32(c.eip + (c.code[p + 6] & 0xFFFF) + c.code8[p * 4 + 10])


def write_flags(c: Core, value: u32, changeable: u32) -> None:
    """Set the arithmetic flags, and those control flags that are in ``changeable``."""
    before: u32 = c.flags
    set_flags(c, value)
    c.flags = (before & ~changeable) | (value & changeable)
    if (before ^ c.flags) & VM:
        set_mode(c)
    if (before ^ c.flags) & AC:
        update_all_tops(c)


def changeable_flags(c: Core, size: i64) -> u32:
    """The control flags that POPF and IRET may change at this privilege and operand size."""
    mask: u32 = TF | DF | NT
    if size == 4:
        mask |= AC | ID
    if c.cpl == 0:
        mask |= IOPL
    if c.cpl <= (c.flags >> 12) & 3:
        mask |= IF
    return mask


def jump_far(c: Core, p: i64, selector: u32, offset: u32, is_call: u32, size: i64) -> i64:
    """JMP and CALL far, direct and through memory; ``size`` is the operand size in bytes."""
    c.p = p
    selector &= 0xFFFF
    if c.protected == 0:
        if offset > c.limit[CS]:
            return gp(c, 0)
        if is_call and push_return(c, p, size) < 0:
            return FAULT
        if c.vm:
            set_v86(c, CS, selector)
        else:
            set_real(c, CS, selector)
        c.eip = offset
        return STOP
    if (selector & 0xFFFC) == 0:
        return gp(c, 0)
    if find_descriptor(c, selector, GP) < 0:
        return FAULT
    attr: u32 = c.desc_high >> 8
    dpl: u32 = (attr >> 5) & 3
    error: u32 = selector & 0xFFFC
    if attr & SYSTEM_NOT:
        if check_code(c, selector, attr) < 0:
            return FAULT
        if offset > descriptor_limit(c.desc_low, c.desc_high):
            return gp(c, 0)
        return enter_code(c, p, selector, offset, is_call, size)
    kind: u32 = attr & 0x1F
    if kind != 1 and kind != 9 and kind != 4 and kind != 12 and kind != 5:
        return gp(c, error)
    if dpl < c.cpl or dpl < (selector & 3):
        return gp(c, error)
    if kind == 1 or kind == 9:
        if check_tss(c, selector, GP, 0) < 0:
            return FAULT
        return go_task(c, p, selector, is_call)
    if (attr & PRESENT) == 0:
        return fault(c, NP, error)
    if kind == 5:
        target: u32 = c.desc_low >> 16
        if check_tss(c, target, GP, 0) < 0:
            return FAULT
        return go_task(c, p, target, is_call)
    return through_gate(c, p, is_call)


def go_task(c: Core, p: i64, selector: u32, is_call: u32) -> i64:
    """Switch to the task found last."""
    if switch_task(c, selector, BY_CALL if is_call else BY_JUMP, next_eip(c, p), get_eflags(c)) < 0:
        return FAULT
    return STOP


def check_code(c: Core, selector: u32, attr: u32) -> i64:
    """Privilege and presence of a code segment that is the direct target of a far transfer."""
    dpl: u32 = (attr >> 5) & 3
    error: u32 = selector & 0xFFFC
    if (attr & CODE) == 0:
        return gp(c, error)
    if attr & CONFORMING:
        if dpl > c.cpl:
            return gp(c, error)
    elif (selector & 3) > c.cpl or dpl != c.cpl:
        return gp(c, error)
    if (attr & PRESENT) == 0:
        return fault(c, NP, error)
    return 0


def push_return(c: Core, p: i64, size: i64) -> i64:
    """Push CS and the next EIP on the current stack."""
    esp: u32 = c.reg[ESP]
    if frame_check(c, esp, c.attr[SS], c.limit[SS], 2 * size, STACK, 0) < 0:
        return -1
    user: i64 = user_access(c)
    if frame_write(c, c.base[SS], c.attr[SS], esp, c.sel[CS], size, user) < 0:
        return -1
    if frame_write(c, c.base[SS], c.attr[SS], mask32(esp - size), next_eip(c, p), size, user) < 0:
        return -1
    c.reg[ESP] = (esp & ~c.stack_mask) | (mask32(esp - 2 * size) & c.stack_mask)
    return 0


def enter_code(c: Core, p: i64, selector: u32, offset: u32, is_call: u32, size: i64) -> i64:
    """Load CS from the descriptor found last, at the same privilege."""
    low: u32 = c.desc_low
    if mark_accessed(c) < 0:
        return FAULT
    high: u32 = c.desc_high
    if is_call and push_return(c, p, size) < 0:
        return FAULT
    set_from_descriptor(c, CS, (selector & 0xFFFC) | c.cpl, low, high)
    c.eip = offset
    return STOP


def through_gate(c: Core, p: i64, is_call: u32) -> i64:
    """Through the call gate found last."""
    gate_low: u32 = c.desc_low
    gate_high: u32 = c.desc_high
    size: i64 = 4 if gate_high & 0x800 else 2
    selector: u32 = gate_low >> 16
    offset: u32 = gate_low & 0xFFFF
    error: u32 = selector & 0xFFFC
    if size == 4:
        offset |= gate_high & 0xFFFF0000
    if error == 0:
        return gp(c, 0)
    if find_descriptor(c, selector, GP) < 0:
        return FAULT
    attr: u32 = c.desc_high >> 8
    dpl: u32 = (attr >> 5) & 3
    if (attr & (SYSTEM_NOT | CODE)) != (SYSTEM_NOT | CODE) or dpl > c.cpl:
        return gp(c, error)
    if is_call == 0 and (attr & CONFORMING) == 0 and dpl != c.cpl:
        return gp(c, error)
    if (attr & PRESENT) == 0:
        return fault(c, NP, error)
    if is_call == 0 or attr & CONFORMING or dpl == c.cpl:
        if offset > descriptor_limit(c.desc_low, c.desc_high):
            return gp(c, 0)
        return enter_code(c, p, selector, offset, is_call, size)
    return call_inner(c, p, selector, offset, size, gate_high & 0x1F)


def call_inner(c: Core, p: i64, selector: u32, offset: u32, size: i64, count: i64) -> i64:
    """CALL through a gate to a more privileged level: new stack, parameters copied."""
    low: u32 = c.desc_low
    high: u32 = c.desc_high
    at: u32 = c.desc_at
    level: u32 = (high >> 13) & 3
    if tss_stack(c, level) < 0:
        return FAULT
    stack: u32 = c.tss_ss
    esp: u32 = c.tss_esp
    if load_stack_descriptor(c, stack, level, TS) < 0:
        return FAULT
    stack_low: u32 = c.desc_low
    stack_high: u32 = c.desc_high
    base: u32 = descriptor_base(stack_low, stack_high)
    attr: u32 = stack_high >> 8
    limit: u32 = descriptor_limit(stack_low, stack_high)
    if frame_check(c, esp, attr, limit, size * (4 + count), STACK, stack & 0xFFFC) < 0:
        return FAULT
    if offset > descriptor_limit(low, high):
        return gp(c, 0)
    top: u32 = esp
    if frame_write(c, base, attr, top, c.sel[SS], size, 0) < 0:
        return FAULT
    top = mask32(top - size)
    if frame_write(c, base, attr, top, c.reg[ESP], size, 0) < 0:
        return FAULT
    top = mask32(top - size)
    i: i64
    value: i64
    for i in range(count - 1, -1, -1):
        value = peek(c, p, i * size, size)
        if value < 0:
            return FAULT
        if frame_write(c, base, attr, top, mask32(value), size, 0) < 0:
            return FAULT
        top = mask32(top - size)
    if frame_write(c, base, attr, top, c.sel[CS], size, 0) < 0:
        return FAULT
    top = mask32(top - size)
    if frame_write(c, base, attr, top, next_eip(c, p), size, 0) < 0:
        return FAULT
    top = mask32(top - size)
    c.desc_low = low
    c.desc_high = high
    c.desc_at = at
    if mark_accessed(c) < 0:
        return FAULT
    mask: u32 = mask32(-1) if attr & BIG else 0xFFFF
    set_cpl(c, level)
    set_from_descriptor(c, SS, stack, stack_low, stack_high)
    set_from_descriptor(c, CS, (selector & 0xFFFC) | level, low, c.desc_high)
    c.reg[ESP] = (esp & ~mask) | (top & mask)
    c.eip = offset
    return STOP


def check_return(c: Core, selector: u32) -> i64:
    """Check CS popped by a far return; its descriptor is left found."""
    error: u32 = selector & 0xFFFC
    if error == 0:
        return gp(c, 0)
    if find_descriptor(c, selector, GP) < 0:
        return -1
    attr: u32 = c.desc_high >> 8
    dpl: u32 = (attr >> 5) & 3
    if (attr & (SYSTEM_NOT | CODE)) != (SYSTEM_NOT | CODE) or (selector & 3) < c.cpl:
        return gp(c, error)
    if (dpl > (selector & 3)) if attr & CONFORMING else (dpl != (selector & 3)):
        return gp(c, error)
    if (attr & PRESENT) == 0:
        return fault(c, NP, error)
    return mark_accessed(c)


def return_to(c: Core, p: i64, selector: u32, offset: u32, frame: i64, release: i64, size: i64, flags: i64) -> i64:
    """The common end of RETF and IRET in protected mode.

    ``frame`` is what the popped words take, ``release`` the bytes RET n frees
    on both stacks, ``flags`` the popped EFLAGS or -1.
    """
    if check_return(c, selector) < 0:
        return FAULT
    low: u32 = c.desc_low
    high: u32 = c.desc_high
    level: u32 = selector & 3
    changeable: u32 = 0
    if flags >= 0:
        changeable = changeable_flags(c, size)
        if size == 4:
            changeable |= RF
            if c.cpl == 0:
                changeable |= VIF | VIP
    if level == c.cpl:
        if offset > descriptor_limit(low, high):
            return gp(c, 0)
        set_from_descriptor(c, CS, selector, low, high)
        drop(c, frame + release)
        c.eip = offset
        if flags >= 0:
            write_flags(c, mask32(flags), changeable)
        return STOP
    outer: i64 = peek(c, p, frame + release, size)
    if outer < 0:
        return FAULT
    word: i64 = peek(c, p, frame + release + size, 2)
    if word < 0:
        return FAULT
    stack: u32 = mask32(word)
    if load_stack_descriptor(c, stack, level, GP) < 0:
        return FAULT
    if offset > descriptor_limit(low, high):
        return gp(c, 0)
    set_cpl(c, level)
    set_from_descriptor(c, CS, selector, low, high)
    set_from_descriptor(c, SS, stack, c.desc_low, c.desc_high)
    esp: u32 = mask32(outer)
    if size == 2:
        esp = (c.reg[ESP] & 0xFFFF0000) | esp
    if c.stack_mask == 0xFFFF:
        esp = (c.reg[ESP] & 0xFFFF0000) | (esp & 0xFFFF)
    c.reg[ESP] = esp
    drop(c, release)
    drop_inaccessible(c)
    c.eip = offset
    if flags >= 0:
        write_flags(c, mask32(flags), changeable)
    return STOP


def return_far(c: Core, p: i64, release: i64, size: i64) -> i64:
    """RETF and RETF imm16."""
    c.p = p
    eip: i64 = peek(c, p, 0, size)
    if eip < 0:
        return FAULT
    word: i64 = peek(c, p, size, size)
    if word < 0:
        return FAULT
    selector: u32 = mask32(word) & 0xFFFF
    if c.protected:
        return return_to(c, p, selector, mask32(eip), 2 * size, release, size, -1)
    if eip > c.limit[CS]:
        return gp(c, 0)
    if c.vm:
        set_v86(c, CS, selector)
    else:
        set_real(c, CS, selector)
    drop(c, 2 * size + release)
    c.eip = mask32(eip)
    return STOP


def return_interrupt(c: Core, p: i64, size: i64) -> i64:
    """IRET and IRETD."""
    c.p = p
    if c.protected and c.flags & NT:
        c.nmi_blocked = 0
        if return_task(c, next_eip(c, p)) < 0:
            return FAULT
        return STOP
    if c.vm and (c.flags & IOPL) != IOPL:
        return gp(c, 0)
    eip: i64 = peek(c, p, 0, size)
    if eip < 0:
        return FAULT
    word: i64 = peek(c, p, size, size)
    if word < 0:
        return FAULT
    popped: i64 = peek(c, p, 2 * size, size)
    if popped < 0:
        return FAULT
    selector: u32 = mask32(word) & 0xFFFF
    result: i64 = STOP
    if c.protected:
        if size == 4 and popped & VM and c.cpl == 0:
            result = return_to_v86(c, p, mask32(eip), selector, mask32(popped))
        else:
            result = return_to(c, p, selector, mask32(eip), 3 * size, 0, size, popped)
        if result == STOP:
            c.nmi_blocked = 0
        return result
    if eip > c.limit[CS]:
        return gp(c, 0)
    if c.vm:
        set_v86(c, CS, selector)
        write_flags(c, mask32(popped), (CONTROL_FLAGS & ~(IOPL | (RF | AC | ID if size == 2 else 0))))
    else:
        set_real(c, CS, selector)
        write_flags(c, mask32(popped), CONTROL_FLAGS if size == 4 else CONTROL_FLAGS & 0xFFFF)
    drop(c, 3 * size)
    c.eip = mask32(eip)
    c.nmi_blocked = 0
    return STOP


def return_to_v86(c: Core, p: i64, eip: u32, selector: u32, flags: u32) -> i64:
    """IRETD at CPL 0 with VM set in the popped EFLAGS."""
    i: i64
    word: i64
    for i in range(6):
        word = peek(c, p, 12 + 4 * i, 4)
        if word < 0:
            return FAULT
        c.task_words[i] = mask32(word)
    if eip > 0xFFFF:
        return gp(c, 0)
    write_flags(c, flags, CONTROL_FLAGS | VM | VIF | VIP)
    set_v86(c, CS, selector)
    set_v86(c, SS, c.task_words[1] & 0xFFFF)
    set_v86(c, ES, c.task_words[2] & 0xFFFF)
    set_v86(c, DS, c.task_words[3] & 0xFFFF)
    set_v86(c, FS, c.task_words[4] & 0xFFFF)
    set_v86(c, GS, c.task_words[5] & 0xFFFF)
    c.reg[ESP] = c.task_words[0]
    c.eip = eip
    set_cpl(c, 3)
    update_all_tops(c)
    return STOP


def software_interrupt(c: Core, p: i64, vector: i64, checks_iopl: u32) -> i64:
    """INT n, INT3 and INTO; in V86 mode INT n needs IOPL 3."""
    c.p = p
    if checks_iopl and c.vm and (c.flags & IOPL) != IOPL:
        return gp(c, 0)
    if wants_exit(c, vector, 0, SOFT):
        c.vector = LEAVING
        return FAULT
    c.task_done = 0
    if deliver(c, vector, SOFT, 0, next_eip(c, p)) < 0:
        return FAULT
    c.no_trap = 1  # TF was cleared on the way: no single-step trap for the INT itself
    return STOP


def op_into(c: Core, p: i64) -> i64:
    """INTO."""
    if get_of(c) == 0:
        return DONE
    return software_interrupt(c, p, 4, 0)


def op_int1(c: Core, p: i64) -> i64:
    """INT1 (ICEBP): a #DB that no gate's DPL stops."""
    c.p = p
    c.task_done = 0
    if deliver(c, 1, EXCEPTION, 0, next_eip(c, p)) < 0:
        return FAULT
    c.no_trap = 1
    return STOP


def op_far(c: Core, p: i64, is_call: u32, size: i64) -> i64:
    """JMP and CALL far: the pointer is in the instruction, or in memory."""
    if marks(c, p) & MARK_MEMORY:
        ea: i64 = effective(c, p)
        offset: i64 = read_sized(c, p, segment_of(c, p), ea, size)
        if offset < 0:
            return FAULT
        selector: i64 = read_sized(c, p, segment_of(c, p), mask32(ea + size) & c.code[p + 5], 2)
        if selector < 0:
            return FAULT
        return jump_far(c, p, mask32(selector), mask32(offset), is_call, size)
    return jump_far(c, p, c.code[p + 7], c.code[p + 4], is_call, size)


def sysenter(c: Core, p: i64) -> i64:
    """SYSENTER (SDM 2): flat CPL 0 segments from the MSRs."""
    c.p = p
    if c.protected == 0 and c.vm == 0:
        return gp(c, 0)
    if (c.sysenter_cs & 0xFFFC) == 0:
        return gp(c, 0)
    c.flags &= ~(VM | IF | RF)
    set_mode(c)
    flat_code_and_stack(c, c.sysenter_cs & 0xFFFC, 0)
    c.reg[ESP] = c.sysenter_esp
    c.eip = c.sysenter_eip
    return STOP


def sysexit(c: Core, p: i64) -> i64:
    """SYSEXIT (SDM 2): flat CPL 3 segments, EIP from EDX and ESP from ECX."""
    c.p = p
    if c.protected == 0 or c.cpl != 0 or (c.sysenter_cs & 0xFFFC) == 0:
        return gp(c, 0)
    flat_code_and_stack(c, ((c.sysenter_cs & 0xFFFC) + 16) | 3, 3)
    c.reg[ESP] = c.reg[1]
    c.eip = c.reg[2]
    return STOP


def flat_code_and_stack(c: Core, selector: u32, level: u32) -> None:
    """CS and SS as SYSENTER and SYSEXIT set them: base 0, 4 GiB, without reading descriptors."""
    set_cpl(c, level)
    fill_segment(c, CS, selector, 0, mask32(-1), 0xC09B | level << 5)
    fill_segment(c, SS, mask32(selector + 8) & 0xFFFF, 0, mask32(-1), 0xC093 | level << 5)
    update_all_tops(c)
