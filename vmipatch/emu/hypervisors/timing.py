"""Time as VMI gives it: cycle counters, alarms and the wall clock, all of the machine's virtual time.

Imports nothing of this package.  A cycle is an instruction's time, so that RDTSC and the "real" counter agree;
no time is ever stolen here.  Facts: VMI 3.0, timer group (alarm flags: mainline Linux 2.6.32, asm/vmi_time.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmipatch.emu.machine.clock import NEVER

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

NS = 1_000_000_000
REAL, AVAILABLE, STOLEN = 0, 1, 2
COUNTER_MASK, PERIODIC, WIRED_LVTT = 0xFF, 0x100, 0x10000
KINDS = (REAL, AVAILABLE)


class Alarms:
    """One alarm for each counter that advances; ``wired`` to IRQ 0 or to the local APIC's timer vector."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._clock = machine.clock
        self._timers = {
            REAL: machine.clock.timer("vmi alarm, real", lambda: self._ring(REAL)),
            AVAILABLE: machine.clock.timer("vmi alarm, available", lambda: self._ring(AVAILABLE)),
        }
        self._set = dict.fromkeys(KINDS, (0, 0, 0))  # expiry, period, flags

    @property
    def frequency(self) -> int:
        """Cycles a second."""
        return NS // self._clock.ns_per_instruction

    def counter(self, kind: int) -> int:
        """GetCycleCounter: the processor's time stamp; nothing is stolen."""
        if kind & COUNTER_MASK == STOLEN:
            return 0
        return self._machine.cpu.time_stamp()

    def wallclock(self) -> int:
        """GetWallclockTime: nanoseconds since 1970."""
        return int(self._machine.options.date.timestamp()) * NS + self._clock.now

    def set(self, flags: int, expiry: int, period: int) -> None:
        """SetAlarm: at ``expiry`` cycles of the counter, then every ``period`` cycles if it is periodic."""
        kind = flags & COUNTER_MASK
        if kind in self._timers:
            self._set[kind] = (expiry, period if flags & PERIODIC else 0, flags)
            self._arm(kind)

    def cancel(self, flags: int) -> bool:
        """CancelAlarm: whether there was one."""
        kind = flags & COUNTER_MASK
        timer = self._timers.get(kind)
        if timer is None:
            return False
        was = timer.deadline != NEVER
        timer.disarm()
        return was

    def armed(self, flags: int) -> tuple[int, int] | None:
        """Expiry and period, in cycles, of the alarm on that counter; None if there is none."""
        kind = flags & COUNTER_MASK
        timer = self._timers.get(kind)
        return None if timer is None or timer.deadline == NEVER else self._set[kind][:2]

    def _arm(self, kind: int) -> None:
        ahead = max(0, self._set[kind][0] - self.counter(kind))
        self._timers[kind].arm(self._clock.now + ahead * self._clock.ns_per_instruction)

    def _ring(self, kind: int) -> None:
        expiry, period, flags = self._set[kind]
        if period:
            missed = max(0, self.counter(kind) - expiry) // period
            self._set[kind] = (expiry + (missed + 1) * period, period, flags)
            self._arm(kind)
        board = self._machine.board
        if flags & WIRED_LVTT:
            board.apic.raise_timer()
        else:
            # An edge; the line stays high, for the 8259A forgets a request whose line falls before it is taken.
            board.set_irq(0, False)
            board.set_irq(0, True)

    def save(self) -> Any:
        """The alarms; their deadlines are the clock's."""
        return dict(self._set)

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned."""
        self._set = dict(saved)
