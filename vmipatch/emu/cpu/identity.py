"""CPUID, the time-stamp counter and model-specific registers.

May import words, state, faults, operands and inout.  What a processor model
answers is data (``specs/cpus``); the model-specific registers that nothing else
looks at are plain storage.
"""

from __future__ import annotations

from vmipatch.emu.cpu.faults import gp
from vmipatch.emu.cpu.host import note_error
from vmipatch.emu.cpu.inout import DONE
from vmipatch.emu.cpu.state import CR4_PCE, CR4_TSD, EAX, ECX, EDX, Core
from vmipatch.emu.cpu.words import calls_python, cast, i64, mask32, u32, u64

MSR_TSC = 0x10
MSR_APIC_BASE = 0x1B
MSR_SYSENTER_CS = 0x174
MSR_SYSENTER_ESP = 0x175
MSR_SYSENTER_EIP = 0x176
MSR_EFER = 0xC0000080


@calls_python
def find_leaf(c: Core, leaf: u32, part: i64) -> u32:
    """EAX, EBX, ECX or EDX (part 0..3) of a CPUID leaf; an unknown one answers as the highest basic one."""
    leaves: dict[int, tuple[int, int, int, int]] = c.leaves  # type: ignore[assignment]
    known = leaves.get(leaf)
    if known is None:
        known = leaves[leaves[0][0]] if leaf < 0x80000000 else (0, 0, 0, 0)
    return known[part]


def op_cpuid(c: Core, p: i64) -> i64:
    """CPUID."""
    leaf: u32 = c.reg[EAX]
    c.reg[EAX] = find_leaf(c, leaf, 0)
    c.reg[3] = find_leaf(c, leaf, 1)
    c.reg[ECX] = find_leaf(c, leaf, 2)
    c.reg[EDX] = find_leaf(c, leaf, 3)
    return 0


def time_stamp(c: Core, p: i64) -> i64:
    """The time-stamp counter: one tick an instruction, plus what was skipped and written."""
    return (c.until - c.remaining - (c.code[p + 6] >> 16)) + c.tsc_offset + c.tsc_adjust


def op_rdtsc(c: Core, p: i64) -> i64:
    """RDTSC."""
    if c.cr[4] & CR4_TSD and c.cpl != 0:
        return gp(c, 0)
    ticks: u64 = cast(u64, time_stamp(c, p))
    c.reg[EAX] = mask32(ticks & 0xFFFFFFFF)
    c.reg[EDX] = mask32((ticks >> 32) & 0xFFFFFFFF)
    return 0


def op_rdpmc(c: Core, p: i64) -> i64:
    """RDPMC: two counters that stand still."""
    if c.cpl != 0 and (c.cr[4] & CR4_PCE) == 0:
        return gp(c, 0)
    if c.reg[ECX] > 1:
        return gp(c, 0)
    c.reg[EAX] = 0
    c.reg[EDX] = 0
    return 0


@calls_python
def stored_msr(c: Core, index: u32, part: i64) -> i64:
    """The low (0) or high (1) half of a stored MSR; -1 if there is none of that number."""
    msrs: dict[int, int] = c.msrs  # type: ignore[assignment]
    value = msrs.get(index)
    if value is None:
        return -1
    result: i64 = (value >> (32 * part)) & 0xFFFFFFFF
    return result


@calls_python
def store_msr(c: Core, index: u32, low: u32, high: u32) -> i64:
    """Set a stored MSR; -1 if there is none of that number or it is read-only."""
    msrs: dict[int, int] = c.msrs  # type: ignore[assignment]
    if index not in msrs:
        return -1
    value: u64 = cast(u64, high) << 32 | low
    msrs[index] = value
    if index == MSR_APIC_BASE and hasattr(c.bus, "write_apic_base"):
        try:
            c.bus.write_apic_base(value)
        except Exception as error:
            note_error(c, error)
    return 0


def op_rdmsr(c: Core, p: i64) -> i64:
    """RDMSR."""
    if c.cpl != 0:
        return gp(c, 0)
    index: u32 = c.reg[ECX]
    low: i64
    high: i64 = 0
    if index == MSR_TSC:
        return op_rdtsc(c, p)
    if index == MSR_SYSENTER_CS:
        low = c.sysenter_cs
    elif index == MSR_SYSENTER_ESP:
        low = c.sysenter_esp
    elif index == MSR_SYSENTER_EIP:
        low = c.sysenter_eip
    elif index == MSR_EFER and c.has_nx:
        low = 0x800 if c.efer_nx else 0
    else:
        low = stored_msr(c, index, 0)
        high = stored_msr(c, index, 1)
    if low < 0:
        return gp(c, 0)
    c.reg[EAX] = mask32(low)
    c.reg[EDX] = mask32(high)
    return 0


def op_wrmsr(c: Core, p: i64) -> i64:
    """WRMSR."""
    if c.cpl != 0:
        return gp(c, 0)
    index: u32 = c.reg[ECX]
    low: u32 = c.reg[EAX]
    if index == MSR_TSC:
        c.tsc_adjust = c.tsc_adjust + cast(i64, cast(u64, c.reg[EDX]) << 32 | low) - time_stamp(c, p)
    elif index == MSR_SYSENTER_CS:
        c.sysenter_cs = low & 0xFFFF
    elif index == MSR_SYSENTER_ESP:
        c.sysenter_esp = low
    elif index == MSR_SYSENTER_EIP:
        c.sysenter_eip = low
    elif index == MSR_EFER and c.has_nx:
        if low & ~mask32(0x800):
            return gp(c, 0)
        c.efer_nx = (low >> 11) & 1
    elif store_msr(c, index, low, c.reg[EDX]) < 0:
        return gp(c, 0)
    return DONE
