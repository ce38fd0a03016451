"""System instructions: control and debug registers, descriptor tables, flags, halting.

May import words, state, faults, flags, access, paging, segments, stack,
operands and transfer.  Each function returns 0 (go on with the next record),
``DONE`` (end the block: something changed that the run loop must look at), or
a negative result.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import effective
from vmipatch.emu.cpu.faults import DB, NP, fault, gp, leave, ud
from vmipatch.emu.cpu.flags import get_eflags, set_zf
from vmipatch.emu.cpu.inout import DONE
from vmipatch.emu.cpu.operands import (
    MARK_MEMORY,
    MARK_SIZE16,
    get_register,
    marks,
    put_register,
    read_e,
    read_sized,
    reg_a,
    reg_b,
    segment_of,
    write_e,
    write_sized,
)
from vmipatch.emu.cpu.paging import flush_page, flush_tlb, load_pdptes
from vmipatch.emu.cpu.segments import (
    CODE,
    CONFORMING,
    SYSTEM_NOT,
    WRITABLE,
    descriptor_limit,
    find_descriptor,
    load_segment,
    set_from_descriptor,
    set_mode,
    set_null,
    update_all_tops,
)
from vmipatch.emu.cpu.stack import drop, peek, push
from vmipatch.emu.cpu.state import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_DE,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    EXIT_HYPERCALL,
    IF,
    IOPL,
    LDTR,
    RF,
    SS,
    TR,
    VIF,
    VIP,
    VM,
    Core,
)
from vmipatch.emu.cpu.tasks import set_busy
from vmipatch.emu.cpu.transfer import changeable_flags, write_flags
from vmipatch.emu.cpu.words import i64, mask32, u32

CR0_WRITABLE = 0xE005003F
FIND_QUIETLY = 255


def not_ring0(c: Core) -> i64:
    """Privileged instruction: #GP(0) outside CPL 0 (V86 included)."""
    if c.cpl != 0:
        return gp(c, 0)
    return 0


def set_cr0(c: Core, value: u32) -> i64:
    """MOV CR0 and LMSW, with the checks and what follows from each bit."""
    before: u32 = c.cr[0]
    value = (value & CR0_WRITABLE) | CR0_ET
    if value & CR0_PG and (value & CR0_PE) == 0:
        return gp(c, 0)
    if value & CR0_NW and (value & CR0_CD) == 0:
        return gp(c, 0)
    if value & CR0_PG and (before & CR0_PG) == 0 and c.cr[4] & CR4_PAE and load_pdptes(c, c.cr[3]) < 0:
        return -1
    c.cr[0] = value
    if (before ^ value) & (CR0_PG | CR0_WP | CR0_PE):
        flush_tlb(c, 0)
    set_mode(c)
    update_all_tops(c)
    return 0


def op_mov_from_control(c: Core, p: i64) -> i64:
    """MOV r32, CRn."""
    which: i64 = reg_a(c, p)
    if which != 0 and which != 2 and which != 3 and which != 4:
        return ud(c)
    if not_ring0(c) < 0:
        return -1
    c.reg[reg_b(c, p)] = c.cr[which]
    return 0


def op_mov_to_control(c: Core, p: i64) -> i64:
    """MOV CRn, r32."""
    which: i64 = reg_a(c, p)
    value: u32 = c.reg[reg_b(c, p)]
    if which != 0 and which != 2 and which != 3 and which != 4:
        return ud(c)
    if not_ring0(c) < 0:
        return -1
    if which == 0:
        if set_cr0(c, value) < 0:
            return -1
    elif which == 2:
        c.cr[2] = value
    elif which == 3:
        if c.cr[0] & CR0_PG and c.cr[4] & CR4_PAE and load_pdptes(c, value) < 0:
            return -1
        c.cr[3] = value
        flush_tlb(c, 1)
    else:
        return set_cr4(c, value)
    return DONE


def set_cr4(c: Core, value: u32) -> i64:
    """MOV CR4; bits that this processor model lacks are #GP(0)."""
    before: u32 = c.cr[4]
    if value & ~c.cr4_allowed:
        return gp(c, 0)
    if c.cr[0] & CR0_PG and value & CR4_PAE and (before & CR4_PAE) == 0 and load_pdptes(c, c.cr[3]) < 0:
        return -1
    c.cr[4] = value
    if (before ^ value) & (CR4_PAE | CR4_PGE | CR4_PSE):
        flush_tlb(c, 0)
    return DONE


def debug_index(c: Core, which: i64) -> i64:
    """DR4 and DR5 are DR6 and DR7, or #UD with CR4.DE; general detect is #DB. -1: fault."""
    if which == 4 or which == 5:
        if c.cr[4] & CR4_DE:
            return ud(c)
        which = which + 2
    if not_ring0(c) < 0:
        return -1
    if c.dr[7] & 0x2000:
        c.dr[6] |= 0x2000
        return fault(c, DB, 0)
    return which


def op_mov_from_debug(c: Core, p: i64) -> i64:
    """MOV r32, DRn."""
    which: i64 = debug_index(c, reg_a(c, p))
    if which < 0:
        return -1
    c.reg[reg_b(c, p)] = c.dr[which]
    return 0


def op_mov_to_debug(c: Core, p: i64) -> i64:
    """MOV DRn, r32."""
    which: i64 = debug_index(c, reg_a(c, p))
    if which < 0:
        return -1
    value: u32 = c.reg[reg_b(c, p)]
    if which == 6:
        value = (value & 0xE00F) | 0xFFFF0FF0
    elif which == 7:
        value = (value & 0xFFFF2FFF) | 0x400
    c.dr[which] = value
    arm_debug(c)
    return DONE


def arm_debug(c: Core) -> None:
    """Work out from DR7 (and the host's tables) which accesses must be watched."""
    i: i64
    code: u32 = 0
    data: u32 = 0
    for i in range(4):
        if (c.dr[7] >> (2 * i)) & 3:
            if (c.dr[7] >> (16 + 4 * i)) & 3:
                data = 1
            else:
                code = 1
    for i in range(0, 48, 3):
        if c.watch_table[i + 2]:
            data |= 2
    c.debug_active = code
    if c.watchpoints != data:
        c.watchpoints = data
        flush_tlb(c, 0)


def op_clts(c: Core, p: i64) -> i64:
    """CLTS."""
    if not_ring0(c) < 0:
        return -1
    c.cr[0] &= ~CR0_TS
    return 0


def op_lmsw(c: Core, p: i64) -> i64:
    """LMSW: the low four bits of CR0; PE can be set but not cleared."""
    if not_ring0(c) < 0:
        return -1
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    if set_cr0(c, (c.cr[0] & ~mask32(0xE)) | (mask32(value) & 0xF)) < 0:
        return -1
    return DONE


def op_smsw(c: Core, p: i64) -> i64:
    """SMSW; a 32-bit register gets all of CR0."""
    if marks(c, p) & MARK_MEMORY:
        return write_e(c, p, c.cr[0] & 0xFFFF, 2)
    put_register(c, reg_b(c, p), c.cr[0], 2 if marks(c, p) & MARK_SIZE16 else 4)
    return 0


def op_load_table(c: Core, p: i64, interrupts: i64) -> i64:
    """LGDT and LIDT; with a 16-bit operand size the base has 24 bits."""
    if not_ring0(c) < 0:
        return -1
    ea: i64 = effective(c, p)
    limit: i64 = read_sized(c, p, segment_of(c, p), ea, 2)
    if limit < 0:
        return -1
    word: i64 = read_sized(c, p, segment_of(c, p), mask32(ea + 2) & c.code[p + 5], 4)
    if word < 0:
        return -1
    base: u32 = mask32(word)
    if marks(c, p) & MARK_SIZE16:
        base &= 0xFFFFFF
    if interrupts:
        c.idt_base = base
        c.idt_limit = mask32(limit)
    else:
        c.gdt_base = base
        c.gdt_limit = mask32(limit)
    return 0


def op_store_table(c: Core, p: i64, interrupts: i64) -> i64:
    """SGDT and SIDT: always six bytes, as 386 and later store them."""
    ea: i64 = effective(c, p)
    limit: u32 = c.idt_limit if interrupts else c.gdt_limit
    base: u32 = c.idt_base if interrupts else c.gdt_base
    if write_sized(c, p, segment_of(c, p), ea, limit & 0xFFFF, 2) < 0:
        return -1
    return write_sized(c, p, segment_of(c, p), mask32(ea + 2) & c.code[p + 5], base, 4)


def op_lldt(c: Core, p: i64) -> i64:
    """LLDT."""
    if c.protected == 0:
        return ud(c)
    if not_ring0(c) < 0:
        return -1
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    selector: u32 = mask32(value)
    if (selector & 0xFFFC) == 0:
        set_null(c, LDTR, selector)
        return 0
    if selector & 4:
        return gp(c, selector & 0xFFFC)
    if find_descriptor(c, selector, 13) < 0:
        return -1
    if (c.desc_high >> 8) & 0x1F != 2:
        return gp(c, selector & 0xFFFC)
    if (c.desc_high & 0x8000) == 0:
        return fault(c, NP, selector & 0xFFFC)
    set_from_descriptor(c, LDTR, selector, c.desc_low, c.desc_high)
    return 0


def op_ltr(c: Core, p: i64) -> i64:
    """LTR: the TSS must be available, and becomes busy."""
    if c.protected == 0:
        return ud(c)
    if not_ring0(c) < 0:
        return -1
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    selector: u32 = mask32(value)
    if (selector & 0xFFFC) == 0:
        return gp(c, 0)
    if selector & 4:
        return gp(c, selector & 0xFFFC)
    if find_descriptor(c, selector, 13) < 0:
        return -1
    kind: u32 = (c.desc_high >> 8) & 0x1F
    if kind != 1 and kind != 9:
        return gp(c, selector & 0xFFFC)
    if (c.desc_high & 0x8000) == 0:
        return fault(c, NP, selector & 0xFFFC)
    if set_busy(c, selector, 1) < 0:
        return -1
    set_from_descriptor(c, TR, selector, c.desc_low, c.desc_high | 0x200)
    return 0


def op_store_selector(c: Core, p: i64, which: i64) -> i64:
    """SLDT and STR."""
    if c.protected == 0:
        return ud(c)
    if marks(c, p) & MARK_MEMORY:
        return write_e(c, p, c.sel[which], 2)
    put_register(c, reg_b(c, p), c.sel[which], 2 if marks(c, p) & MARK_SIZE16 else 4)
    return 0


def look_at(c: Core, selector: u32) -> i64:
    """Find a descriptor for LAR, LSL, VERR or VERW. 1: it is there and visible, 0: not, -1: fault."""
    if (selector & 0xFFFC) == 0:
        return 0
    if find_descriptor(c, selector, FIND_QUIETLY) < 0:
        return 0 if c.vector == FIND_QUIETLY else -1
    attr: u32 = c.desc_high >> 8
    if (attr & (SYSTEM_NOT | CODE | CONFORMING)) == (SYSTEM_NOT | CODE | CONFORMING):
        return 1
    dpl: u32 = (attr >> 5) & 3
    if dpl < c.cpl or dpl < (selector & 3):
        return 0
    return 1


def op_lar(c: Core, p: i64, wants_limit: i64) -> i64:
    """LAR and LSL."""
    if c.protected == 0:
        return ud(c)
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    seen: i64 = look_at(c, mask32(value))
    if seen < 0:
        return -1
    kind: u32 = (c.desc_high >> 8) & 0x1F
    if seen and kind < 16:
        seen = 2574 >> kind & 1 if wants_limit else 6718 >> kind & 1
    set_zf(c, mask32(seen))
    if seen:
        result: u32 = descriptor_limit(c.desc_low, c.desc_high) if wants_limit else c.desc_high & 0x00F0FF00
        put_register(c, reg_a(c, p), result, 2 if marks(c, p) & MARK_SIZE16 else 4)
    return 0


def op_verify(c: Core, p: i64, for_write: i64) -> i64:
    """VERR and VERW."""
    if c.protected == 0:
        return ud(c)
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    seen: i64 = look_at(c, mask32(value))
    if seen < 0:
        return -1
    attr: u32 = c.desc_high >> 8
    if seen:
        if (attr & SYSTEM_NOT) == 0:
            seen = 0
        elif for_write:
            seen = 1 if (attr & (CODE | WRITABLE)) == WRITABLE else 0
        else:
            seen = 0 if (attr & (CODE | WRITABLE)) == CODE else 1
    set_zf(c, mask32(seen))
    return 0


def op_arpl(c: Core, p: i64) -> i64:
    """ARPL."""
    if c.protected == 0:
        return ud(c)
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    level: u32 = get_register(c, reg_a(c, p), 2) & 3
    if (value & 3) < level:
        if write_e(c, p, (mask32(value) & 0xFFFC) | level, 2) < 0:
            return -1
        set_zf(c, 1)
    else:
        set_zf(c, 0)
    return 0


def op_invlpg(c: Core, p: i64) -> i64:
    """INVLPG; the segment's base counts, its limit does not."""
    if not_ring0(c) < 0:
        return -1
    flush_page(c, mask32(effective(c, p) + c.base[segment_of(c, p)]))
    return DONE


def op_flush_cache(c: Core, p: i64) -> i64:
    """INVD and WBINVD: there is no cache to see."""
    return not_ring0(c)


def op_halt(c: Core, p: i64) -> i64:
    """HLT."""
    if not_ring0(c) < 0:
        return -1
    c.halted = 1
    return DONE


def op_cli(c: Core, p: i64) -> i64:
    """CLI."""
    if c.cr[0] & CR0_PE and c.cpl > (c.flags >> 12) & 3:
        return gp(c, 0)
    c.flags &= ~IF
    return 0


def op_sti(c: Core, p: i64) -> i64:
    """STI; interrupts stay off for one more instruction if they were."""
    if c.cr[0] & CR0_PE and c.cpl > (c.flags >> 12) & 3:
        return gp(c, 0)
    if c.flags & IF:
        return 0
    c.flags |= IF
    c.shadow = 1
    return DONE


def op_pushf(c: Core, p: i64, size: i64) -> i64:
    """PUSHF; VM and RF read as 0 in the image."""
    if c.vm and (c.flags & IOPL) != IOPL:
        return gp(c, 0)
    value: u32 = get_eflags(c) & ~(VM | RF)
    if size == 2:
        return push(c, p, value & 0xFFFF, 2)
    return push(c, p, value, 4)


def op_popf(c: Core, p: i64, size: i64) -> i64:
    """POPF."""
    if c.vm and (c.flags & IOPL) != IOPL:
        return gp(c, 0)
    value: i64 = peek(c, p, 0, 4) if size == 4 else peek(c, p, 0, 2)
    if value < 0:
        return -1
    drop(c, size)
    if size == 4:
        c.flags &= ~RF
        if c.cpl == 0:
            c.flags &= ~(VIF | VIP)
    write_flags(c, mask32(value), changeable_flags(c, size))
    return DONE


def op_mov_to_segment(c: Core, p: i64) -> i64:
    """MOV Sreg, r/m16."""
    which: i64 = reg_a(c, p)
    if which == 1 or which > 5:
        return ud(c)
    value: i64 = read_e(c, p, 2)
    if value < 0:
        return -1
    if load_segment(c, which, mask32(value)) < 0:
        return -1
    if which == SS:
        c.shadow = 2
        return DONE
    return 0


def op_mov_from_segment(c: Core, p: i64) -> i64:
    """MOV r/m, Sreg: memory gets 16 bits, a register the operand size."""
    which: i64 = reg_a(c, p)
    if which > 5:
        return ud(c)
    if marks(c, p) & MARK_MEMORY:
        return write_e(c, p, c.sel[which], 2)
    put_register(c, reg_b(c, p), c.sel[which], 2 if marks(c, p) & MARK_SIZE16 else 4)
    return 0


def op_push_segment(c: Core, p: i64, which: i64, size: i64) -> i64:
    """PUSH Sreg."""
    if size == 2:
        return push(c, p, c.sel[which], 2)
    return push(c, p, c.sel[which], 4)


def op_pop_segment(c: Core, p: i64, which: i64, size: i64) -> i64:
    """POP Sreg."""
    value: i64 = peek(c, p, 0, 2)
    if value < 0:
        return -1
    if size == 4 and peek(c, p, 0, 4) < 0:
        return -1
    mask: u32 = c.stack_mask
    if load_segment(c, which, mask32(value)) < 0:
        return -1
    c.reg[4] = (c.reg[4] & ~mask) | (mask32(c.reg[4] + size) & mask)
    if which == SS:
        c.shadow = 2
        return DONE
    return 0


def op_load_far(c: Core, p: i64, which: i64, size: i64) -> i64:
    """LES, LDS, LSS, LFS and LGS."""
    ea: i64 = effective(c, p)
    offset: i64 = read_sized(c, p, segment_of(c, p), ea, size)
    if offset < 0:
        return -1
    selector: i64 = read_sized(c, p, segment_of(c, p), mask32(ea + size) & c.code[p + 5], 2)
    if selector < 0:
        return -1
    if load_segment(c, which, mask32(selector)) < 0:
        return -1
    put_register(c, reg_a(c, p), mask32(offset), size)
    return 0


def op_vmcall(c: Core, p: i64) -> i64:
    """VMCALL: leaves for the host's hypervisor, with EIP at the instruction."""
    c.exit_length = c.code8[p * 4 + 10]
    return leave(c, EXIT_HYPERCALL)
