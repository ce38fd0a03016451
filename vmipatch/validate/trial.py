"""One run of one subject from one state, in either form, and what came of it.

May import stand, states and subject.  A run ends behind the site (or where the call returns to), at the
destination of an IRET or SYSEXIT, at a fault that the guest would have to take, at a halt, or when the machine is
switched off.  An interrupt is noted as taken, as if its handler had come back at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmipatch.emu.hypervisors.base import native_view
from vmipatch.emu.machine.machine import Machine
from vmipatch.emu.machine.snapshot import Snapshot
from vmipatch.validate.stand import Stand
from vmipatch.validate.states import IF, IOPL, State
from vmipatch.validate.subject import Subject

LIMIT = 20_000
"""Instructions; the longest stub loads a whole IDT entry by entry."""
PAGE = 4096
HARD, EXCEPTION = 2, 3
SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs")
Written = dict[int, bytes]
"""Backing pages of the guest's memory that a run changed, as it left them."""


@dataclass
class Result:
    """How a run ended: ``end`` is ``done``, ``fault``, ``halt``, ``reset``, ``off``, ``lost`` or
    ``stopped`` (the hypervisor did), ``detail`` the vector and error code or the reason."""

    end: str
    detail: str
    registers: tuple[int, ...]
    eip: int
    flags: int
    selectors: tuple[int, ...]
    view: dict[str, int]
    written: Written
    probes: tuple[bytes | None, ...]
    debug_console: bytes
    traps: dict[str, int]
    instructions: int
    interrupts: tuple[int, ...] = ()
    effect: str = ""


class Trial:
    """Runs subjects on one stand."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.machine: Machine = stand.machine
        self.cpu = self.machine.cpu
        hypervisor: Any = stand.machine.personality
        self.personality = hypervisor
        self.paravirtual = stand.setup.hypervisor != "native"
        self._event: tuple[str, str] | None = None
        self._taken: list[int] = []
        self._patched = False
        self._ram = self.machine.options.ram_bytes
        if self.paravirtual:
            interrupts: Any = self.personality.interrupts
            interrupts.observer = self._observe

    def _observe(self, vector: int, kind: int, error: int) -> bool:
        """The hypervisor is about to give the guest something: that ends the run."""
        if self._event is None:
            if kind == HARD:
                self._taken.append(vector)
            elif vector >= 0:
                self._event = ("fault", f"vector {vector:#x}, error {error:#x}")
            elif not self.personality.interrupts.line:
                self._event = ("halt", "interrupts on")
        return True

    def native(self, subject: Subject, state: State, base: Snapshot) -> Result:
        """The native bytes at CPL 0; the machine must have been at this base's native form."""
        self._patched = False
        return self._run(subject, state, base, False)

    def lowered(self, subject: Subject, state: State, base: Snapshot) -> Result:
        """The patched bytes at CPL 1 under the hypervisor (at CPL 0 where there is none)."""
        self._patched = True
        return self._run(subject, state, base, self.paravirtual)

    # --- one run ------------------------------------------------------------------------

    def _run(self, subject: Subject, state: State, base: Snapshot, lowered: bool) -> Result:
        machine, cpu = self.machine, self.cpu
        machine.restore(base)
        self._event = None
        self._taken = []
        machine.board.consoles.debug.clear()
        ends = self._arrange(subject, state, lowered)
        begun = cpu.instructions
        traps = dict(self.personality.traps) if lowered else {}
        for address in ends:
            cpu.add_breakpoint(address)
        try:
            end, detail = self._go(lowered, begun + LIMIT, ends)
        finally:
            for address in ends:
                cpu.remove_breakpoint(address)
        return self._result(state, base, lowered, end, detail, traps, cpu.instructions - begun)

    def _arrange(self, subject: Subject, state: State, lowered: bool) -> list[int]:
        machine, cpu, personality = self.machine, self.cpu, self.personality
        if state.cr0 is not None:
            if lowered:
                personality.control.set_cr0(state.cr0)
            else:
                cpu.set("cr0", state.cr0)
        if state.sysenter_cs is not None:
            if lowered:
                personality.control.sysenter["sysenter_cs"] = state.sysenter_cs
            else:
                cpu.set("sysenter_cs", state.sysenter_cs)
        for name, selector in state.segments.items():
            cpu.set(name, selector)
        for number, value in enumerate(state.debug):
            cpu.set(f"dr{number}", value)
        for linear in state.warm:
            cpu.peek(linear)
        for linear, data in state.writes:
            self._store(linear, data)
        if state.before is not None and (lowered or (self._patched and state.of_machine)):
            state.before(personality)
        bus = machine.bus
        if state.pending:
            # IRQ 0 asks, and nothing is in service.
            for _ in range(8):
                bus.port_write(0x20, 1, 0x20)
            bus.port_write(0x21, 1, bus.port_read(0x21, 1) & 0xFE)
            machine.board.set_irq(0, False)
            machine.board.set_irq(0, True)
        stack = list(state.stack)
        if lowered:
            for index in state.kernel_words:
                stack[index] |= 1
        esp = state.registers["esp"]
        ends = [state.destination] if state.destination is not None else []
        if subject.is_call:
            start = subject.address if self._patched else subject.reference
            if not subject.call.jump or subject.generation != 3:
                stack.insert(0, self.stand.back)
                esp -= 4
            if not ends:
                ends = [self.stand.back]
        else:
            start = subject.address
            self._store(start, subject.patched if self._patched else subject.native)
            if not ends:
                ends = [subject.address + subject.length]
        self._store(esp, b"".join(word.to_bytes(4, "little") for word in stack))
        for name, value in state.registers.items():
            cpu.set(name, value)
        cpu.set("esp", esp)
        cpu.set("eip", start)
        interrupts = bool(state.flags & IF)
        if lowered:
            cpu.set("eflags", state.flags & ~IOPL | IF)
            personality.virtual_if = interrupts
            personality.interrupts.update()
        else:
            cpu.set("eflags", state.flags & ~IOPL)
            machine.board.refresh_interrupt()
        return ends

    def _store(self, linear: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            at = linear + done
            size = min(len(data) - done, PAGE - at % PAGE)
            place = self.cpu.translate(at)
            if place >= 0:
                self.machine.memory.write_backing(place, data[done : done + size])
            done += size

    def _go(self, lowered: bool, limit: int, ends: list[int]) -> tuple[str, str]:
        machine, cpu, exits = self.machine, self.cpu, self.machine.exit
        while True:
            left = cpu.run(limit)
            if left == exits.BREAKPOINT:
                return "done", ""
            if left == exits.LIMIT:
                return "lost", f"{LIMIT} instructions and no end, at {cpu.linear_eip:#x}"
            if not lowered:
                if left == exits.VECTOR:
                    kind = cpu.exit_kind
                    if kind == HARD:
                        self._taken.append(cpu.exit_vector)
                        continue
                    return "fault", f"vector {cpu.exit_vector:#x}, error {cpu.exit_error:#x}"
                if left == exits.HALT:
                    return "halt", "interrupts on" if cpu.eflags & IF else "interrupts off"
            machine.left(left)
            if self._event is not None:
                return self._event
            ended = machine.ended
            if ended is not None:
                return {"reset": "reset", "poweroff": "off"}.get(ended, "stopped"), self._why(ended)

    def _why(self, ended: str) -> str:
        violation = getattr(self.personality, "violation", None)
        return str(violation) if ended == "violation" and violation is not None else ended

    def _result(
        self, state: State, base: Snapshot, lowered: bool, end: str, detail: str, traps: dict[str, int], count: int
    ) -> Result:
        cpu, machine = self.cpu, self.machine
        effect = ""
        judged = lowered or (self._patched and state.of_machine)
        if judged and state.check is not None and end == "done":
            effect = state.check(self.personality)
        probes = tuple(cpu.read_linear(linear, 8) for linear in state.probes)
        now = dict(self.personality.traps) if lowered else {}
        return Result(
            end=end,
            detail=detail,
            registers=cpu.general(),
            eip=cpu.linear_eip,
            flags=cpu.eflags,
            selectors=cpu.selectors(SELECTORS),
            view=self.personality.view() if lowered else native_view(cpu),
            written=self._written(base),
            probes=probes,
            debug_console=bytes(machine.board.consoles.debug),
            traps={name: n - traps.get(name, 0) for name, n in now.items() if n != traps.get(name, 0)},
            instructions=count,
            interrupts=tuple(self._taken),
            effect=effect,
        )

    def _written(self, base: Snapshot) -> Written:
        memory, before = self.machine.memory, base.memory
        last = self._ram // PAGE
        changed = {}
        for page in memory.dirty_pages():
            if page < last:
                now = memory.read_backing(page * PAGE, PAGE)
                if now != before.page(page):
                    changed[page] = now
        return changed
