"""Virtual interrupts: the flag in the state page, what waits for it, and delivery to the guest's handlers.

May import descriptors and violation.  The board's interrupt line reaches the processor only while the virtual
flag is on; else ``pending`` in the state page says that something waits.  So an interrupt is acknowledged when
the guest can take it, as on the bare machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmipatch.emu.hypervisors.descriptors import PRESENT, SEGMENT
from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

SOFT, HARD, EXCEPTION = 1, 2, 3
IF, IOPL, NT, VM, TF, RF = 0x200, 0x3000, 0x4000, 0x20000, 0x100, 0x10000
NP, SS, GP = 11, 12, 13
ERROR_CODES = frozenset((8, 10, 11, 12, 13, 14, 17))


class Interrupts:
    """What the hypervisor does about interrupts and exceptions of one virtual processor."""

    def __init__(self, owner: Base) -> None:
        self._owner = owner
        self._machine, self._cpu = owner.machine, owner.machine.cpu
        self.line = False
        self.observer: Callable[[int, int, int], bool] | None = None
        """Asked before a delivery (vector, kind, error), and with vector -1 before a halt: True takes it away."""

    def board_line(self, level: bool) -> bool:
        """The board drives its line: what the processor's pin shall be."""
        self.line = level
        if not self._owner.active:
            return level
        on = self._owner.virtual_if
        self._owner.set_pending(level and not on)
        return level and on

    def update(self) -> None:
        """The virtual flag may have changed: pin and ``pending`` follow."""
        on = self._owner.virtual_if
        self._owner.set_pending(self.line and not on)
        self._cpu.interrupt_line = self.line and on

    def deliver(self, vector: int, kind: int, error: int = 0) -> None:
        """Enter the guest's handler at CS:EIP as it is now; an interrupt gate turns the virtual flag off."""
        cpu, owner = self._cpu, self._owner
        if self.observer is not None and self.observer(vector, kind, error):
            return
        _, high = owner.tables.gates[vector]
        flags = cpu.eflags
        seen = flags & ~(IF | IOPL) | (IF if owner.virtual_if else 0) | owner.iopl
        if flags & VM:
            self._deliver_v86(vector, seen, kind, error)
        else:
            cpu.set("eflags", seen)
            reason = cpu.inject(vector, kind, error)
            if reason == self._machine.exit.PAGE_WRITE:
                # The kernel's stack shares a page with a table; what is pushed is judged like any write to it.
                reason = owner.paging.page_write(lambda: cpu.inject(vector, kind, error))
            cpu.set("eflags", cpu.eflags & ~IOPL | IF)
            if reason == self._machine.exit.SHUTDOWN:
                self._machine.stop("triple fault")
                return
        if not high & 0x100:
            owner.virtual_if = False

    def _deliver_v86(self, vector: int, seen: int, kind: int, error: int) -> None:
        """From virtual-8086 mode to ring 1, which no processor does by itself (SDM 3A, 20.3.1, for ring 0)."""
        cpu = self._cpu
        words = [cpu.get(name) for name in ("gs", "fs", "ds", "es", "ss", "esp")]
        words += [seen, cpu.get("cs"), cpu.get("eip")]
        if kind == EXCEPTION and vector in ERROR_CODES:
            words.append(error)
        self._enter(vector, words, seen)
        for name in ("es", "ds", "fs", "gs"):
            cpu.set_segment(name, 0, 0, 0, 0)

    def _enter(self, vector: int, words: list[int], flags: int) -> None:
        """To the handler from outside ring 1, with these words on the kernel's stack, the last on top."""
        cpu, owner = self._cpu, self._owner
        low, high = owner.tables.gates[vector]
        if not high & PRESENT:
            raise Violation("bad-descriptor", f"vector {vector:#x} has no handler")
        ss, esp = owner.tables.stack
        esp -= 4 * len(words)
        owner.guest.write(esp, struct.pack(f"<{len(words)}I", *reversed(words)), "kernel stack")
        cpu.set("eflags", flags & ~(VM | IOPL | NT | TF | RF) | IF)
        cpu.set("cs", low >> 16 & 0xFFFC | 1)
        cpu.set("ss", ss)
        cpu.set("esp", esp)
        cpu.set("eip", low & 0xFFFF | high & 0xFFFF_0000)

    def fault_of_return(self, vector: int, error: int, frame: tuple[int, ...]) -> None:
        """An IRET to ring 3 that the ROM or the host does, and that faults on its frame (EIP, CS, EFLAGS, ESP, SS).

        It comes as from the code that the frame names: a kernel can repair its own IRET, which it knows by address
        (Linux: iret_exc by way of __ex_table), but not one that it jumped to.
        """
        owner = self._owner
        if self.observer is not None and self.observer(vector, EXCEPTION, error):
            return
        eip, cs, flags, esp, ss = frame
        _, high = owner.tables.gates[vector]
        self._enter(vector, [ss, esp, flags, cs, eip, error], flags)
        owner.virtual_if = bool(flags & IF and high & 0x100)

    def resume(self, eip: int, cs: int, flags: int, stack: tuple[int, ...]) -> tuple[int, int] | None:
        """IRET done by the host: to ring 1, ring 3 (``stack``: ESP, SS) or virtual-8086 mode (and ES DS FS GS).

        Vector and error code, with nothing changed, if the frame is one that IRET faults on; raises Violation for
        ring 0.
        """
        cpu, owner = self._cpu, self._owner
        if flags & VM:
            esp, ss, es, ds, fs, gs = stack
            cpu.set("eflags", flags & 0x47FD5 & ~(IOPL | RF) | VM | IF | 2)
            for name, value in (("cs", cs), ("ss", ss), ("es", es), ("ds", ds), ("fs", fs), ("gs", gs)):
                cpu.set(name, value & 0xFFFF)
            cpu.set("cpl", 3)
            cpu.set("esp", esp)
            cpu.set("eip", eip & 0xFFFF)
            owner.virtual_if = bool(flags & IF)
            return None
        if cs & 3 == 0:
            raise Violation("ring-0", "IRET to ring 0", eip)
        fault = self._segment_fault(cs, stack)
        if fault is not None:
            return fault
        cpu.set("eflags", flags & 0x254FD5 & ~IOPL | IF | 2)
        cpu.set("cs", cs & 0xFFFF)
        cpu.set("eip", eip)
        if cs & 3 == 3:
            cpu.set("ss", stack[1] & 0xFFFF)
            cpu.set("esp", stack[0])
            for name in ("es", "ds", "fs", "gs"):
                # What ring 3 may not have is taken away (SDM 2, IRET).
                if cpu.get(name) & 0xFFFC and cpu.get(f"{name}_access") >> 5 & 3 < 3:
                    cpu.set_segment(name, 0, 0, 0, 0)
        owner.virtual_if = bool(flags & IF)
        return None

    def _segment_fault(self, cs: int, stack: tuple[int, ...]) -> tuple[int, int] | None:
        """What IRET does about the selectors (SDM 2, IRET): vector and error code, or nothing."""
        find = self._owner.tables.descriptor
        _, high = find(cs)
        privilege = high >> 13 & 3
        is_code = high & (SEGMENT | 0x800) == SEGMENT | 0x800
        fits = privilege == cs & 3 or (privilege < cs & 3 and high & 0x400)
        if not is_code or not fits or cs & 3 < self._cpu.get("cpl"):
            return GP, cs & 0xFFFC
        if not high & PRESENT:
            return NP, cs & 0xFFFC
        if cs & 3 == 3:
            ss = stack[1]
            _, high = find(ss)
            if high & (SEGMENT | 0xA00) != SEGMENT | 0x200 or ss & 3 != 3 or high >> 13 & 3 != 3:
                return GP, ss & 0xFFFC
            if not high & PRESENT:
                return SS, ss & 0xFFFC
        return None

    def halt(self) -> None:
        """Virtual interrupts on, and wait for one, in one step."""
        self._owner.virtual_if = True
        self.update()
        if self.observer is not None and self.observer(-1, 0, 0):
            return
        self._machine.sleep()
