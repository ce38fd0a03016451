"""The machine: a processor on a board, its run loop, its ends and its snapshots.

May import the rest of this package, ``vmipatch.errors`` and, when a machine is
built, :mod:`vmipatch.emu.cpu`.  The loop runs the processor up to the next
timer's instruction, so a device's interrupt comes at an exact instruction in
every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vmipatch.emu.machine.board import Board, BoardOptions, check_options
from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import NEVER, NS_PER_SECOND
from vmipatch.emu.machine.snapshot import PAGE, SavedMemory, Snapshot
from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.cpu import Cpu, Memory

FAILURES = frozenset(("triple fault", "halt", "asleep", "violation"))
ASLEEP_NS = 600 * NS_PER_SECOND
SCREEN_NS = 20_000_000  # virtual time between two looks at the screen for the end text
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Outcome:
    """Why a run ended.

    ``reason``: ``poweroff``, ``reset``, ``debug exit``, ``until``, ``limit``,
    ``triple fault``, ``halt`` (interrupts off), ``asleep`` (interrupts on, but
    nothing woke the processor for ten minutes of virtual time), ``stopped`` (by
    the caller), ``violation`` (by the guest's hypervisor) or the name of an exit that a hook asked for.
    """

    reason: str
    instructions: int
    virtual_ns: int
    exit_code: int | None = None


class Personality(Protocol):
    """What a machine and its users ask of a hypervisor's host side."""

    violation: Any

    def counts(self) -> dict[str, dict[str, int]]:
        """What happened between guest and host, for a summary."""

    def save(self) -> Any:
        """Its state, as an opaque object."""

    def restore(self, saved: Any) -> None:
        """Bring back what ``save`` returned; None stands for "never started"."""


class Machine:
    """One machine.  ``hooks`` maps an exit reason to host code.

    A hook is called with the machine after the processor left for that reason,
    and returns whether the run goes on.  ``on_instruction`` hooks (tracing) are
    called before every instruction and make the run slow.
    """

    def __init__(self, options: BoardOptions | None = None) -> None:
        """Raises :class:`EmulatorError` for a board that cannot be built."""
        self.options = options or BoardOptions()
        check_options(self.options)
        from vmipatch.emu.cpu import Cpu, Exit, Memory

        self.bus = Bus()
        self.memory: Memory = Memory(self.options.ram_bytes)
        self.cpu: Cpu = Cpu(self.memory, self.bus)
        self.exit = Exit
        self._names = {value: name.lower() for name, value in vars(Exit).items() if name.isupper()}
        self.exits: Counter[str] = Counter()
        self.vmi_calls: Counter[str] = Counter()
        self.hooks: dict[int, Callable[[Machine], bool]] = {}
        self.on_instruction: Callable[[Machine], None] | None = None
        self.personality: Personality | None = None
        """The hypervisor under this machine's guest; its state belongs to every snapshot."""
        self._deferred: list[Callable[[Machine], None]] = []
        self._reason: str | None = None
        self._needle = b""
        self._tails: dict[str, bytearray] = {}
        self._base: Snapshot | None = None
        self.board = Board(self.options, self.cpu, self.memory, self.bus, self.stop)
        self.board.consoles.listeners.append(self._watch)
        self.clock = self.board.clock
        self.cpu.reset()

    # --- running ------------------------------------------------------------------

    def stop(self, reason: str = "stopped") -> None:
        """End the run at the next instruction boundary; the first reason counts."""
        if self._reason is None:
            self._reason = reason
        self.cpu.request_exit()

    def defer(self, action: Callable[[Machine], None]) -> None:
        """Do something at the next instruction boundary: for devices in the middle of an instruction."""
        self._deferred.append(action)
        self.cpu.request_exit()

    def sleep_until(self, at: int) -> None:
        """Let virtual time pass up to ``at`` ns without executing anything; timers fire on the way."""
        clock = self.clock
        while clock.next_deadline <= at:
            clock.skip_to(clock.next_deadline)
            clock.run_due()
        clock.skip_to(at)
        self.cpu.tsc_offset = clock.skipped // clock.ns_per_instruction

    def run(self, limit: int | None = None, until: str | None = None) -> Outcome:
        """Run to an end; deferred actions and timers come before the next instruction.

        ``limit`` is a count of instructions since power-on; ``until`` a text on
        the serial or debug console or on the screen.
        """
        cpu, clock, limit_reached = self.cpu, self.clock, self.exit.LIMIT
        stop_at = UNLIMITED if limit is None else limit
        self._needle = until.encode("utf-8") if until else b""
        self._tails.clear()
        self._reason = None
        look = clock.now + SCREEN_NS if until and self.board.vga else NEVER
        while self._reason is None:
            clock.run_due()
            while self._deferred:
                self._deferred.pop(0)(self)
            if self._reason is not None:
                break
            if cpu.instructions >= stop_at:
                self._reason = "limit"
                break
            if clock.now >= look:
                look = clock.now + SCREEN_NS
                if self._on_screen(until or ""):
                    self._reason = "until"
                    break
            due = clock.next_deadline
            soon = min(due, look)
            target = min(stop_at, clock.instruction_at(soon)) if soon < NEVER else stop_at
            if self.on_instruction is not None:
                self.on_instruction(self)
                target = cpu.instructions + 1
            clock.horizon = due
            left = cpu.run(target)
            clock.horizon = -1
            if left != limit_reached:
                self.left(left)
        return self.outcome()

    @property
    def ended(self) -> str | None:
        """Why the run is over, for whoever drives the processor himself; None while it may go on."""
        return self._reason

    def outcome(self) -> Outcome:
        """How the last run ended."""
        return Outcome(self._reason or "stopped", self.cpu.instructions, self.clock.now, self.board.exit_code)

    def left(self, reason: int) -> None:
        """What follows when the processor left with this exit reason; a hook may hand on one that it met."""
        exit_ = self.exit
        name = self._names.get(reason, str(reason))
        if reason != exit_.REQUESTED:  # that one is the host's own doing
            self.exits[name] += 1
        hook = self.hooks.get(reason)
        if hook is not None:
            if not hook(self) and self._reason is None:
                self._reason = name
        elif reason == exit_.HALT:
            self.sleep()
        elif reason == exit_.SHUTDOWN:
            self._reason = self._reason or "triple fault"
        elif reason != exit_.REQUESTED:
            self._reason = self._reason or name

    def sleep(self) -> None:
        """HLT: jump from timer to timer until an interrupt line rises."""
        cpu, clock = self.cpu, self.clock
        if not cpu.eflags & 0x200:
            self._reason = self._reason or "halt"
            return
        begun = clock.now
        while not cpu.interrupt_line and self._reason is None:
            due = clock.next_deadline
            if due >= NEVER or due - begun > ASLEEP_NS:
                self._reason = "asleep"
                return
            clock.skip_to(due)
            clock.run_due()
        cpu.tsc_offset = clock.skipped // clock.ns_per_instruction

    def _watch(self, console: str, byte: int) -> None:
        needle = self._needle
        if not needle:
            return
        tail = self._tails.setdefault(console, bytearray())
        tail.append(byte)
        if byte == needle[-1] and tail.endswith(needle):
            self.stop("until")
        if len(tail) > 4096 + len(needle):
            del tail[:4096]

    def _on_screen(self, text: str) -> bool:
        vga = self.board.vga
        return vga is not None and any(text in line for line in vga.text())

    # --- snapshots ------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The whole machine as it is now (between two instructions).

        What was not written since the last snapshot, or restore, is shared with it; since power-on all memory is zeros.
        """
        memory = self.memory
        written = {page: memory.read_backing(page * PAGE, PAGE) for page in memory.dirty_pages()}
        before = SavedMemory(0, {}) if self._base is None else self._base.memory
        snapshot = Snapshot(
            memory=before.with_pages(memory.used, written),
            processor=self.cpu.save(),
            board=self.board.save(),
            personality=None if self.personality is None else self.personality.save(),
            instructions=self.cpu.instructions,
            serial_length=len(self.board.consoles.serial),
            debug_length=len(self.board.consoles.debug),
        )
        memory.clear_dirty()
        self._base = snapshot
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go back; only pages that may differ are copied: those written since, and those unlike the last base's.

        Raises :class:`EmulatorError` for a snapshot of a machine of another size.
        """
        if len(snapshot.memory) != self.memory.used:
            raise EmulatorError("this snapshot is of a machine with other memory")
        memory, saved = self.memory, snapshot.memory
        pages = memory.dirty_pages()
        if self._base is not snapshot:
            other = SavedMemory(0, {}) if self._base is None else self._base.memory
            pages = list({*pages, *saved.unlike(other)})
        memory.restore_pages(saved, pages)
        memory.clear_dirty()
        self._base = snapshot
        self.board.restore(snapshot.board)
        self.cpu.restore(snapshot.processor)
        if self.personality is not None:
            self.personality.restore(snapshot.personality)
        self.board.refresh_interrupt()
        del self.board.consoles.serial[snapshot.serial_length :]
        del self.board.consoles.debug[snapshot.debug_length :]
        self._reason = None
        self.board.exit_code = None
