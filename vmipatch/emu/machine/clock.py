"""Virtual time: nanoseconds counted in retired instructions, and the timers on it.

Imports nothing of the package.  Time is ``instructions * ns_per_instruction``
plus what was skipped while the processor slept, so two runs of one guest see
the same time at the same instruction.  Times are integers in nanoseconds since
power-on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

NS_PER_SECOND = 1_000_000_000
NEVER = 1 << 62


class InstructionCounter(Protocol):
    """Whatever retires instructions: the processor."""

    @property
    def instructions(self) -> int: ...


class Timer:
    """One event source of a device: at most one deadline at a time."""

    __slots__ = ("_clock", "callback", "deadline", "name")

    def __init__(self, clock: Clock, name: str, callback: Callable[[], None]) -> None:
        self._clock = clock
        self.name = name
        self.callback = callback
        self.deadline = NEVER

    def arm(self, at: int) -> None:
        """Call back at ``at`` ns (at once, at the next boundary, if that is past)."""
        self.deadline = at
        self._clock._changed(at)

    def disarm(self) -> None:
        """Forget the deadline."""
        if self.deadline != NEVER:
            self.deadline = NEVER
            self._clock._changed(NEVER)


class Clock:
    """Virtual time of a machine.

    Devices take one :class:`Timer` each when they are built; there are about a
    dozen, so the next deadline is a plain minimum over them.  Timers with the
    same deadline fire in the order in which they were made.
    """

    def __init__(self, counter: InstructionCounter, ns_per_instruction: int = 10) -> None:
        self.counter = counter
        self.ns_per_instruction = ns_per_instruction
        self.skipped = 0
        self.timers: list[Timer] = []
        self.next_deadline = NEVER
        self.horizon = -1
        """The deadline up to which the processor is running now; -1 while it is not."""
        self.on_sooner: Callable[[], None] | None = None
        """Called when a deadline moved before the horizon."""

    @property
    def now(self) -> int:
        """Nanoseconds since power-on."""
        return self.counter.instructions * self.ns_per_instruction + self.skipped

    def timer(self, name: str, callback: Callable[[], None]) -> Timer:
        """A new timer, not armed."""
        timer = Timer(self, name, callback)
        self.timers.append(timer)
        return timer

    def instruction_at(self, at: int) -> int:
        """The instruction count at which time ``at`` is reached if nothing is skipped."""
        return -((self.skipped - at) // self.ns_per_instruction)

    def skip_to(self, at: int) -> int:
        """Jump forward to time ``at``; returns the nanoseconds skipped (0 if it is past)."""
        step = max(0, at - self.now)
        self.skipped += step
        return step

    def run_due(self) -> int:
        """Call back every timer whose deadline is reached; returns how many."""
        fired = 0
        now = self.now
        while self.next_deadline <= now:
            timer = min(self.timers, key=_deadline)
            timer.deadline = NEVER
            self._recompute()
            timer.callback()
            fired += 1
        return fired

    def save(self) -> tuple[int, int, tuple[int, ...]]:
        """Time and deadlines."""
        return self.ns_per_instruction, self.skipped, tuple([timer.deadline for timer in self.timers])

    def restore(self, state: tuple[int, int, tuple[int, ...]]) -> None:
        """Bring back what :meth:`save` returned; the timers must be the same ones."""
        self.ns_per_instruction, self.skipped, deadlines = state
        for timer, deadline in zip(self.timers, deadlines, strict=True):
            timer.deadline = deadline
        self._recompute()

    def _recompute(self) -> None:
        self.next_deadline = min([timer.deadline for timer in self.timers], default=NEVER)

    def _changed(self, deadline: int) -> None:
        self._recompute()
        if deadline < self.horizon and self.on_sooner is not None:
            self.horizon = deadline
            self.on_sooner()


def _deadline(timer: Timer) -> int:
    return timer.deadline


def ticks_at(now: int, hertz: int) -> int:
    """How many whole ticks of a clock of ``hertz`` have passed at ``now`` ns."""
    return now * hertz // NS_PER_SECOND


def time_of_tick(tick: int, hertz: int) -> int:
    """The first nanosecond at which :func:`ticks_at` gives ``tick``."""
    return -(-tick * NS_PER_SECOND // hertz)
