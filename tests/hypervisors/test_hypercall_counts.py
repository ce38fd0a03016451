"""A call that the ROM makes by a published hypercall is counted under its own name, as one through the gate is."""

from __future__ import annotations

import struct

import pytest
from pagedguest import BASE, DATA, GDT, IDT, KERNEL_DS, LDT, LOCAL, STACK_TOP, TABLES, PagedGuest
from rulebreaking import FREE, WINDOW

ENTRY = BASE + TABLES + (WINDOW - BASE >> 12) * 4
GATE_HIGH, DATA_HIGH = 0xC0048E00, 0x00CFF300  # high words of an interrupt gate and of a user's data segment
# Call: stack arguments, registers, and the hypercall that docs/abis.md names for Xen and for lguest ("" is the gate,
# None is none).
CALLS: dict[str, tuple[tuple[int, ...], dict[str, int], str | None, str | None]] = {
    "SetGDT": ((), {"eax": BASE + DATA}, "set_gdt", "LOAD_GDT_ENTRY"),
    "SetIDT": ((), {"eax": BASE + DATA + 8}, "set_trap_table", "LOAD_IDT_ENTRY"),
    "SetLDT": ((), {"eax": LOCAL}, "mmuext_op", ""),
    "WriteGDTEntry": (
        (DATA_HIGH,),
        {"eax": BASE + GDT, "edx": 6, "ecx": 0xFFFF},
        "update_descriptor",
        "LOAD_GDT_ENTRY",
    ),
    "WriteLDTEntry": ((DATA_HIGH,), {"eax": BASE + LDT, "edx": 1, "ecx": 0xFFFF}, "update_descriptor", ""),
    "WriteIDTEntry": (
        (GATE_HIGH,),
        {"eax": BASE + IDT, "edx": 6, "ecx": 0x608000},
        "set_trap_table",
        "LOAD_IDT_ENTRY",
    ),
    "UpdateKernelStack": ((), {"eax": KERNEL_DS, "edx": BASE + STACK_TOP}, "stack_switch", "SET_STACK"),
    "CLTS": ((), {}, "fpu_taskswitch", "TS"),
    "SetCR0": ((), {"eax": 0x80010019}, "fpu_taskswitch", "TS"),
    "SetCR3": ((), {"eax": 0x8000}, "mmuext_op", "NEW_PGTABLE"),
    "SetDR": ((), {"eax": 0, "edx": 0}, "set_debugreg", ""),
    "GetDR": ((), {"eax": 0}, "get_debugreg", ""),
    "SetPxE": ((), {"eax": FREE | 3, "edx": ENTRY, "ecx": WINDOW | 0x11}, "mmu_update", "SET_PTE"),
    "AllocatePage": ((0, 0), {"eax": FREE >> 12, "edx": 1, "ecx": 0}, "mmuext_op", None),
    "ReleasePage": ((), {"eax": FREE >> 12, "edx": 1}, "mmuext_op", None),
    "InvalPage": ((), {"eax": WINDOW}, "mmuext_op", "SET_PTE"),
    "FlushTLB": ((), {"eax": 3}, "mmuext_op", "FLUSH_TLB"),
    "WBINVD": ((), {}, "mmuext_op", None),
    "SetIOPLMask": ((), {"eax": 0x3000}, "physdev_op", ""),
    "SetAlarm": ((0, 0), {"eax": 0, "edx": 0, "ecx": 0}, "", ""),
    "Reboot": ((), {"eax": 1}, "sched_op", "SHUTDOWN"),
    "Shutdown": ((), {}, "sched_op", "SHUTDOWN"),
}
ALIASES = {("lguest", "InvalPage"): "SetPxE"}  # one hypercall for two calls


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hypervisor", ["xen", "lguest"])
def test_calls_are_counted(hypervisor: str, name: str) -> None:
    guest = PagedGuest(hypervisor)
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    guest.memory.write(DATA, struct.pack("<HIHHI", 0xFF, BASE + GDT, 0, 0x7FF, BASE + IDT))
    personality = guest.personality
    personality.calls.clear()
    personality.hypercalls.clear()
    stack, registers, *by = CALLS[name]
    wanted = by[hypervisor == "lguest"]
    guest.call(name, *stack, **registers)
    assert personality.violation is None
    if wanted is None:
        assert not personality.hypercalls
        assert not personality.calls
        return
    assert set(personality.hypercalls) == {wanted or "gate"}
    # What lguest is told of, the guest has written: a write to a page table is looked at.
    assert set(personality.traps) <= ({"guarded write"} if hypervisor == "lguest" else set())
    if hypervisor == "lguest" and name in ("SetGDT", "SetIDT"):
        assert personality.hypercalls[wanted] == (32 if name == "SetGDT" else 256)
    else:
        assert personality.calls[ALIASES.get((hypervisor, name), name)] == 1
