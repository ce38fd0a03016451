"""lguest: hypercalls by ``int 0x1f``, lguest_data at the head of the state page.

May import base, descriptors, layout, timing and violation.  Numbers are those of
``specs/hypervisors/lguest.toml``; what each does is as Linux 2.6.32 has it (drivers/lguest: hypercalls.c,
interrupts_and_traps.c, segments.c, page_tables.c).  lguest has no error numbers: a grossly wrong call kills the
guest, here a :class:`Violation`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from vmipatch.emu.hypervisors.base import Base
from vmipatch.emu.hypervisors.descriptors import PRESENT
from vmipatch.emu.hypervisors.layout import PAGE, is_host
from vmipatch.emu.hypervisors.timing import REAL
from vmipatch.emu.hypervisors.violation import Violation

TRAP_ENTRY = 0x1F
NEVER_THE_GUESTS = frozenset((2, 8, 15, TRAP_ENTRY))  # vectors whose entries lguest silently keeps for itself
GDT_ENTRIES = 8192  # lguest itself has Linux's 32
IDT_ENTRIES = 256
TLS_FIRST, TLS_ENTRIES = 6, 3  # GDT_ENTRY_TLS_MIN, GDT_ENTRY_TLS_ENTRIES of Linux on i386
STACK_PAGES = 2
RING_SIZE, DONE = 64, 0xFF
CALL = struct.Struct("<5I")  # struct hcall_args
SYSTEM_CALLS = 0x80


class Arguments(NamedTuple):
    """The registers that a hypercall's arguments are in."""

    ebx: int
    ecx: int
    edx: int
    esi: int


class Personality(Base):
    """The guest executes INT 0x1F at ring 1."""

    name = "lguest"
    own_vectors = frozenset((TRAP_ENTRY,))
    watched_tables = frozenset()  # the guest always says what it wrote
    told_of_tables = False

    def __init__(self) -> None:
        super().__init__()
        self._next = 0
        handlers: dict[str, Callable[[Arguments], None]] = {
            "FLUSH_ASYNC": self._flush_async,
            "SHUTDOWN": self._shutdown,
            "NEW_PGTABLE": self._new_pgtable,
            "FLUSH_TLB": self._flush_tlb,
            "LOAD_IDT_ENTRY": self._load_idt_entry,
            "SET_STACK": self._set_stack,
            "TS": self._ts,
            "SET_CLOCKEVENT": self._set_clockevent,
            "HALT": self._halt,
            "SET_PMD": self._set_directory,
            "SET_PTE": self._set_pte,
            "SET_PGD": self._set_directory,
            "LOAD_TLS": self._load_tls,
            "LOAD_GDT_ENTRY": self._load_gdt_entry,
            "SEND_INTERRUPTS": self._send_interrupts,
        }
        numbers = self.spec.constants
        self._handlers = {numbers[name]: (name, handler) for name, handler in handlers.items()}

    # --- lguest_data --------------------------------------------------------------------

    def _capture(self) -> None:
        super()._capture()
        self._next = 0
        state = self.state
        state.put("hcall_status", -1)  # nothing in the ring
        state.put("reserve_mem", (1 << 32) - self.hole)
        state.put("tsc_khz", self.alarms.frequency // 1000)
        state.put("syscall_vec", SYSTEM_CALLS)
        self._stamp()

    def _stamp(self) -> None:
        """lguest_data.time is written whenever the host has something to do for the guest."""
        now = self.alarms.wallclock()
        self.state.put("time", now // 1_000_000_000 & 0xFFFF_FFFF | now % 1_000_000_000 << 32)

    def set_pending(self, waits: bool) -> None:
        """irq_pending is 0 or the interrupt flag's bit."""
        if bool(self.state.get("pending")) != waits:
            self.state.put("pending", 0x200 if waits else 0)

    # --- exits ------------------------------------------------------------------------

    def hypercall(self, vector: int) -> None:
        """INT 0x1F: the number in EAX, which stays as it is."""
        cpu = self.machine.cpu
        number = cpu.get("eax")
        self._stamp()
        self._ring()
        if number == self.spec.constants["GATE"]:
            self.hypercalls["gate"] += 1
            self.gate(cpu.get("ebx"))
        else:
            self._perform(number, Arguments(*(cpu.get(register) for register in Arguments._fields)))

    def _perform(self, number: int, args: Arguments) -> None:
        name, handler = self._handlers.get(number, ("", None))
        if handler is None:
            raise Violation("bad-call", f"no hypercall has number {number:#x}", self.machine.cpu.get("eip"))
        self.hypercalls[name] += 1
        handler(args)

    def _ring(self) -> None:
        """Calls that the guest left in the ring come first, in its order."""
        for _ in range(RING_SIZE):
            status = self.state.get("hcall_status").to_bytes(RING_SIZE, "little")
            if status[self._next] == DONE:
                return
            calls = self.state.get("hcalls").to_bytes(RING_SIZE * CALL.size, "little")
            number, *args = CALL.unpack_from(calls, self._next * CALL.size)
            marked = bytearray(status)
            marked[self._next] = DONE
            self.state.put("hcall_status", int.from_bytes(marked, "little"))
            self._next = (self._next + 1) % RING_SIZE
            self._perform(number, Arguments(*args))

    def _flush_async(self, args: Arguments) -> None:
        """The ring has been seen to."""
        self.calls["FlushDeferredCalls"] += 1

    def _send_interrupts(self, args: Arguments) -> None:
        """What is pending comes on the way out."""

    # --- page tables ------------------------------------------------------------------

    def _new_pgtable(self, args: Arguments) -> None:
        self.calls["SetCR3"] += 1
        self.control.set_cr3(args.ebx)

    def _flush_tlb(self, args: Arguments) -> None:
        self.calls["FlushTLB"] += 1
        self.paging.flush()

    def _set_pte(self, args: Arguments) -> None:
        """The guest has written a page-table entry (EDX, ESI its high word) of an address; 0: forget the address."""
        self.calls["SetPxELong" if self.paging.pae else "SetPxE"] += 1
        high = args.esi & 0x7FFF_FFFF if self.paging.pae and args.edx & 1 else 0
        if args.edx & 1 and not high and is_host(args.edx & 0xFFFF_F000):
            raise Violation("forged-page-table", "a page table entry names a page of the hypervisor", args.ecx)
        self.paging.invalidate(args.ecx)

    def _set_directory(self, args: Arguments) -> None:
        """The guest has written a directory's entry; the write itself was judged when it happened."""
        self.calls["SetPxELong" if self.paging.pae else "SetPxE"] += 1
        self._need_frame(args.ebx >> 12)
        self.paging.flush()

    def _need_frame(self, frame: int) -> None:
        if frame >= self.machine.options.ram_bytes // PAGE:
            raise Violation("forged-page-table", "a page table that is not in the guest's memory", frame << 12)

    # --- descriptors ------------------------------------------------------------------

    def _load_gdt_entry(self, args: Arguments) -> None:
        number, low, high = args.ebx, args.ecx, args.edx
        if number >= GDT_ENTRIES:
            raise Violation("bad-call", f"too many GDT entries: {number}")
        self.calls["WriteGDTEntry"] += 1
        base, limit = self.state.get_table("gdt")
        if (base, limit) != self.tables.gdt:
            self.tables.load_gdt(base, limit)
        self.tables.put_gdt(number, (low, high))
        self.tables.refresh_segments()

    def _load_tls(self, args: Arguments) -> None:
        """Three entries at once, at a linear address."""
        entries = self.guest.read(args.ebx, 8 * TLS_ENTRIES, "LOAD_TLS")
        self.calls["WriteGDTEntry"] += TLS_ENTRIES
        self.tables.put_gdt(TLS_FIRST, struct.unpack(f"<{2 * TLS_ENTRIES}I", entries))
        self.tables.refresh_segments()

    def _load_idt_entry(self, args: Arguments) -> None:
        number, low, high = args.ebx, args.ecx, args.edx
        self.tables.idt = self.state.get_table("idt")
        if number in NEVER_THE_GUESTS:
            return
        if number >= IDT_ENTRIES:
            raise Violation("bad-call", f"setting IDT entry {number}")
        if high & PRESENT and high >> 8 & 0xF not in (0xE, 0xF):
            raise Violation("bad-descriptor", f"IDT entry {number} is of type {high >> 8 & 0xF:#x}")
        self.calls["WriteIDTEntry"] += 1
        self.tables.put_gate(number, low, high)

    def _set_stack(self, args: Arguments) -> None:
        ss, esp, pages = args.ebx & 0xFFFF, args.ecx, args.edx
        if ss & 3 != 1:
            raise Violation("bad-call", f"the kernel's stack segment {ss:#x} is not of ring 1")
        if pages > STACK_PAGES:
            raise Violation("bad-call", f"a kernel stack of {pages} pages")
        if esp > self.hole:
            raise Violation("bad-pointer", "the kernel's stack", esp)
        self.calls["UpdateKernelStack"] += 1
        self.tables.set_stack(ss, esp)

    # --- the rest ---------------------------------------------------------------------

    def _ts(self, args: Arguments) -> None:
        self.calls["SetCR0" if args.ebx else "CLTS"] += 1
        self.control.set_ts(bool(args.ebx))

    def _set_clockevent(self, args: Arguments) -> None:
        """One timer interrupt, on IRQ 0, in that many nanoseconds; 0: none."""
        if args.ebx == 0:
            self.calls["CancelAlarm"] += 1
            self.alarms.cancel(REAL)
        else:
            self.calls["SetAlarm"] += 1
            ahead = args.ebx // self.machine.clock.ns_per_instruction
            self.alarms.set(REAL, self.alarms.counter(REAL) + ahead, 0)

    def _halt(self, args: Arguments) -> None:
        self.calls["Halt"] += 1
        self.interrupts.halt()

    def _shutdown(self, args: Arguments) -> None:
        reboot = args.ecx == self.spec.constants["RESTART"]
        self.calls["Reboot" if reboot else "Shutdown"] += 1
        self.machine.stop("reset" if reboot else "poweroff")

    # --- snapshots ----------------------------------------------------------------------

    def save(self) -> tuple[object, int]:
        """The base's state, and how far the ring has been read."""
        return super().save(), self._next

    def restore(self, saved: tuple[object, int] | None) -> None:
        """Bring back what :meth:`save` returned."""
        base, self._next = (None, 0) if saved is None else saved
        super().restore(base)
