"""The VMI calls that a hypervisor performs for a guest that came through the gate, one function a call.

May import violation.  Registers and stack arguments are those of the ABI (specs/abi); where two ABIs of a
generation differ, the number of arguments tells.  The frame is docs/abis.md's: what PUSHAD left, the call's
number, the return address, the stack arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

EDI, ESI, EBP, ESP, EBX, EDX, ECX, EAX, NUMBER, RETURN, ARGUMENTS = range(0, 44, 4)
AP_STATE_BYTES = 0x5A
Performer = Callable[["Base", "Frame"], None]
CALLS: dict[str, Performer] = {}


class Frame:
    """The gate's frame in guest memory, at a linear address that is the guest's word only."""

    def __init__(self, owner: Base, at: int) -> None:
        self._guest = owner.guest
        self.at = at
        words = struct.unpack("<10I", owner.guest.read(at, 40, "call gate's frame"))
        self.edi, self.esi, self.ebp, _, self.ebx, self.edx, self.ecx, self.eax, self.number, self.back = words

    def argument(self, index: int) -> int:
        """A stack argument, from 0."""
        return self._guest.read32(self.at + ARGUMENTS + 4 * index, "stack argument")

    def words_from_return(self, count: int) -> tuple[int, ...]:
        """Words from the return address on: an IRET's frame begins there."""
        return struct.unpack(f"<{count}I", self._guest.read(self.at + RETURN, 4 * count, "IRET frame"))

    def result(self, eax: int, edx: int | None = None) -> None:
        """Write the result into the frame, from where the stub pops it."""
        self._guest.write32(self.at + EAX, eax, "call gate's frame")
        if edx is not None:
            self._guest.write32(self.at + EDX, edx, "call gate's frame")

    def result64(self, value: int) -> None:
        """A result in EDX:EAX."""
        self.result(value & 0xFFFF_FFFF, value >> 32 & 0xFFFF_FFFF)


def call(*names: str) -> Callable[[Performer], Performer]:
    """Register a performer under the names that the ABIs give it."""

    def register(performer: Performer) -> Performer:
        for name in names:
            CALLS[name] = performer
        return performer

    return register


@call(
    "WBINVD", "INVD", "Pause", "IODelay", "SetLinearMapping", "WallclockUpdated", "FlushDeferredCalls",
    "SetDeferredMode", "UpdateIOBitmap", "UpdateInterruptBitmap", "ClonePageTable", "ClonePageDirectory",
    "RegisterPageMapping", "RegisterPageUsage",
)  # fmt: skip
def nothing(p: Base, f: Frame) -> None:
    """Nothing to do here: no cache is modelled, nothing is deferred, and tables are guarded where they are used."""
    if p.op in ("WallclockUpdated", "FlushDeferredCalls"):
        f.result(0)


# --- registers --------------------------------------------------------------------------


@call("SetCR0")
def set_cr0(p: Base, f: Frame) -> None:
    p.control.set_cr0(f.eax)


@call("LMSW")
def lmsw(p: Base, f: Frame) -> None:
    p.control.set_cr0(p.control.get(0) & ~0xE | f.eax & 0xF)


@call("CLTS")
def clts(p: Base, f: Frame) -> None:
    p.control.set_ts(False)


@call("STTS")
def stts(p: Base, f: Frame) -> None:
    p.control.set_ts(True)


@call("SetCR3")
def set_cr3(p: Base, f: Frame) -> None:
    p.control.set_cr3(f.eax)


@call("SetCR4")
def set_cr4(p: Base, f: Frame) -> None:
    if not p.control.set_cr4(f.eax):
        p.fault(13)


@call("SetDR")
def set_dr(p: Base, f: Frame) -> None:
    p.control.set_dr(f.eax, f.edx)


@call("GetDR")
def get_dr(p: Base, f: Frame) -> None:
    f.result(p.control.get_dr(f.eax))


@call("RDMSR")
def rdmsr(p: Base, f: Frame) -> None:
    value = p.control.read_msr(f.ecx)
    if value is None:
        p.fault(13)
    else:
        f.result64(value)


@call("WRMSR")
def wrmsr(p: Base, f: Frame) -> None:
    if not p.control.write_msr(f.ecx, f.eax | f.edx << 32):
        p.fault(13)


@call("RDPMC")
def rdpmc(p: Base, f: Frame) -> None:
    if f.ecx > 1:
        p.fault(13)
    else:
        f.result64(0)


@call("SetIOPLMask")
def set_iopl_mask(p: Base, f: Frame) -> None:
    p.iopl = f.eax & 0x3000


@call("GetIOPLMask")
def get_iopl_mask(p: Base, f: Frame) -> None:
    f.result(p.iopl)


# --- descriptor tables ------------------------------------------------------------------


@call("SetGDT", "SetIDT")
def set_table(p: Base, f: Frame) -> None:
    limit, base = struct.unpack("<HI", p.guest.read(f.eax, 6, p.op))
    p.load_table("gdt" if p.op == "SetGDT" else "idt", base, limit)


@call("SetLDT")
def set_ldt(p: Base, f: Frame) -> None:
    p.tables.load_ldt(f.eax & 0xFFFF)


@call("SetTR")
def set_tr(p: Base, f: Frame) -> None:
    p.tables.load_task(f.eax & 0xFFFF)


@call("WriteGDTEntry", "WriteLDTEntry", "WriteIDTEntry")
def write_entry(p: Base, f: Frame) -> None:
    p.guest.write(f.eax + 8 * f.edx & 0xFFFF_FFFF, struct.pack("<II", f.ecx, f.argument(0)), p.op)
    p.tables.written(f.eax, f.edx)


@call("UpdateGDT", "UpdateIDT", "UpdateLDT")
def update_table(p: Base, f: Frame) -> None:
    if p.op == "UpdateLDT":
        p.tables.load_ldt(p.tables.ldt[0])
    else:
        name = "gdt" if p.op == "UpdateGDT" else "idt"
        p.load_table(name, *p.state.get_table(name))


@call("UpdateKernelStack")
def update_kernel_stack(p: Base, f: Frame) -> None:
    # 3.0 gives the stack's selector; before, EAX is the TSS, and the kernel's data segment is meant.
    ss = f.eax & 0xFFFF if p.abi.generation == 3 else p.machine.cpu.get("ss")
    p.tables.set_stack(ss, f.edx)


# --- page tables ------------------------------------------------------------------------


@call("SetPxE", "SetPxE0", "SetPte")
def set_pxe(p: Base, f: Frame) -> None:
    # The later form has value, pointer, flags; the earlier one pointer, value.
    value, pointer = (f.eax, f.edx) if len(p.abi.calls[p.op].args) == 3 else (f.edx, f.eax)
    p.guest.write32(pointer, value, p.op)


@call("SetPxELong", "SetPxELong0", "SetPteLong")
def set_pxe_long(p: Base, f: Frame) -> None:
    p.guest.write(f.ecx, struct.pack("<II", f.eax, f.edx), p.op)


@call("UpdatePxE", "UpdatePxELong")
def update_pxe(p: Base, f: Frame) -> None:
    # The write itself was judged when it happened; the pointer must still be one.
    p.guest.read(f.eax, 8 if p.op.endswith("Long") else 4, p.op)


@call("SwapPxE", "SwapPte")
def swap_pxe(p: Base, f: Frame) -> None:
    old = p.guest.read32(f.eax, p.op)
    p.guest.write32(f.eax, f.edx, p.op)
    f.result(old)


@call("SwapPxELongAtomic", "SwapPteLong")
def swap_pxe_long(p: Base, f: Frame) -> None:
    old = p.guest.read(f.ecx, 8, p.op)
    p.guest.write(f.ecx, struct.pack("<II", f.eax, f.edx), p.op)
    f.result64(int.from_bytes(old, "little"))


@call("DeactivatePxELongAtomic")
def deactivate_pxe_long(p: Base, f: Frame) -> None:
    old = p.guest.read(f.eax, 8, p.op)
    p.guest.write(f.eax, bytes(8), p.op)
    f.result64(int.from_bytes(old, "little"))


@call(
    "TestAndSetPxEBit", "TestAndSetPxELongBit", "TestAndSetPteBit", "TestAndSetPteLongBit",
    "TestAndClearPxEBit", "TestAndClearPxELongBit", "TestAndClearPteBit", "TestAndClearPteLongBit",
)  # fmt: skip
def test_and_change_bit(p: Base, f: Frame) -> None:
    # BTS with a register reaches beyond the word (SDM 2, BTS): bit offsets are signed.
    offset = f.edx - (1 << 32) if f.edx >> 31 else f.edx
    at = f.eax + 4 * (offset >> 5) & 0xFFFF_FFFF
    mask = 1 << (offset & 31)
    old = p.guest.read32(at, p.op)
    p.guest.write32(at, old | mask if "Set" in p.op else old & ~mask, p.op)
    f.result(int(bool(old & mask)))


@call("AllocatePage")
def allocate_page(p: Base, f: Frame) -> None:
    p.paging.allocate(f.eax, bool(f.edx & 1))


@call("ReleasePage")
def release_page(p: Base, f: Frame) -> None:
    p.paging.release(f.eax)


@call("InvalPage")
def inval_page(p: Base, f: Frame) -> None:
    p.paging.invalidate(f.eax)


@call("FlushTLB", "FlushTLBAll")
def flush_tlb(p: Base, f: Frame) -> None:
    p.paging.flush()


@call("PhysToMachine", "MachineToPhys")
def same_frame(p: Base, f: Frame) -> None:
    f.result(f.eax)


@call("SetLazyMode")
def set_lazy_mode(p: Base, f: Frame) -> None:
    p.lazy_mode = f.eax


# --- interrupts, halting, ends ----------------------------------------------------------


@call("Halt", "SafeHalt")
def halt(p: Base, f: Frame) -> None:
    if p.op == "Halt" and p.abi.generation == 6 and not p.virtual_if:
        p.machine.stop("halt")
    else:
        p.interrupts.halt()


@call("IRET")
def iret(p: Base, f: Frame) -> None:
    eip, cs, flags = f.words_from_return(3)
    if flags & 0x20000:
        stack = f.words_from_return(9)[3:]
    elif cs & 3 == 3:
        stack = f.words_from_return(5)[3:]
    else:
        stack = ()
    _go_on_with(p, f, f.at + RETURN + 12)
    fault = p.interrupts.resume(eip, cs, flags, stack)
    if fault and cs & 3 == 3:
        p.interrupts.fault_of_return(*fault, (eip, cs, flags, *stack))
    elif fault:
        p.fault(*fault)


@call("IRET16")
def iret16(p: Base, f: Frame) -> None:
    eip, cs, flags, esp, ss = struct.unpack("<5H", p.guest.read(f.at + RETURN, 10, "IRET frame"))
    _go_on_with(p, f, f.at + RETURN + 6)
    fault = p.interrupts.resume(eip, cs, flags, (esp, ss))
    if fault:
        p.fault(*fault)


@call("SysExit")
def sysexit(p: Base, f: Frame) -> None:
    user = (p.control.sysenter["sysenter_cs"] & 0xFFFC) + 16 | 3
    _go_on_with(p, f, f.at + RETURN)
    flags = p.machine.cpu.eflags & ~0x200 | (0x200 if p.virtual_if else 0)
    if p.interrupts.resume(f.edx, user, flags, (f.ecx, user + 8)):
        p.fault(13)


@call("SysRet")
def sysret(p: Base, f: Frame) -> None:
    p.fault(6)  # this processor has no SYSRET


def _go_on_with(p: Base, f: Frame, esp: int) -> None:
    """Load the registers of the frame: the stub will not come back to pop them."""
    values = (f.eax, f.ecx, f.edx, f.ebx, esp, f.ebp, f.esi, f.edi)
    for name, value in zip(("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"), values, strict=True):
        p.machine.cpu.set(name, value)


@call("Reboot")
def reboot(p: Base, f: Frame) -> None:
    p.machine.stop("reset")


@call("Shutdown")
def shutdown(p: Base, f: Frame) -> None:
    p.machine.stop("poweroff")


# --- APIC, processors, time -------------------------------------------------------------


@call("APICRead")
def apic_read(p: Base, f: Frame) -> None:
    f.result(p.machine.bus.memory_read(p.apic_register(f.eax), 4))


@call("APICWrite")
def apic_write(p: Base, f: Frame) -> None:
    p.machine.bus.memory_write(p.apic_register(f.eax), 4, f.edx)


@call("SetInitialAPState")
def set_initial_ap_state(p: Base, f: Frame) -> None:
    p.processors[f.edx] = p.guest.read(f.eax, AP_STATE_BYTES, p.op)


@call("GetCycleCounter")
def get_cycle_counter(p: Base, f: Frame) -> None:
    f.result64(p.alarms.counter(f.eax))


@call("SetAlarm")
def set_alarm(p: Base, f: Frame) -> None:
    p.alarms.set(f.eax, f.edx | f.ecx << 32, f.argument(0) | f.argument(1) << 32)


@call("CancelAlarm")
def cancel_alarm(p: Base, f: Frame) -> None:
    f.result(int(p.alarms.cancel(f.eax)))


@call("GetWallclockTime")
def get_wallclock_time(p: Base, f: Frame) -> None:
    f.result64(p.alarms.wallclock())


def perform(p: Base, f: Frame) -> None:
    """Do the call whose number is in the frame; raises :class:`Violation` for one that there is not."""
    name = p.abi.numbers.get(f.number, "")
    performer = CALLS.get(name)
    if performer is None:
        raise Violation("bad-call", f"no call has number {f.number:#x} in {p.abi.name}", f.at)
    p.op = name
    p.calls[name] += 1
    performer(p, f)
