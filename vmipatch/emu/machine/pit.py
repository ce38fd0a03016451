"""The 8254 timer, and the gate of its channel 2 in port 0x61.

May import ``bus``, ``clock`` and ``device`` of this package.  Facts: Intel
82C54 data sheet (order number 231244); input clock 1,193,182 Hz.  Counters are
not stepped: what a counter holds and what its OUT pin shows is computed from
virtual time when somebody looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock, ticks_at, time_of_tick
from vmipatch.emu.machine.device import Device

HERTZ = 1_193_182
PERIODIC = (2, 3)
TRIGGERED = (1, 5)  # a rising gate starts them, not the write of a count


class Channel(Device):
    """One counter of the 8254; all times in ticks of the input clock."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "mode", "bcd", "access", "count", "pending", "start", "stopped_at", "gate", "low_byte",
        "read_high", "latched", "latched_status", "loaded", "pending_ticks",
    )  # fmt: skip

    def __init__(self, gate: bool) -> None:
        self.gate = self._gate_at_reset = gate
        self.reset()

    def reset(self) -> None:
        """Undefined by the data sheet; here mode 3 with a full count, not started."""
        self.mode, self.bcd, self.access = 3, False, 3
        self.count = 0x10000
        self.pending: int | None = None  # a count that waits for the end of the cycle,
        self.pending_ticks = 0  # which ends this long after `start`
        self.start: int | None = None  # tick at which `count` was loaded
        self.stopped_at: int | None = None  # ticks done when the gate went low (modes 0 and 4)
        self.gate = self._gate_at_reset
        self.low_byte: int | None = None  # first byte of a two-byte write
        self.read_high = False
        self.latched: tuple[int, ...] = ()
        self.latched_status: int | None = None
        self.loaded = False  # a count was written since the control word

    @property
    def full(self) -> int:
        """What a written count of 0 stands for."""
        return 10_000 if self.bcd else 0x10000

    # --- time ---------------------------------------------------------------

    def _settle(self, now: int) -> None:
        """Take over a pending count whose cycle has come."""
        if self.pending is None or self.start is None:
            return
        end = self.start + self.pending_ticks
        if now >= end:
            self.start, self.count, self.pending = end, self.pending, None

    def elapsed(self, now: int) -> int | None:
        """Ticks since the count was loaded; None while nothing counts."""
        self._settle(now)
        if self.start is None or now < self.start:
            return None
        if self.stopped_at is not None:
            return self.stopped_at
        return now - self.start

    def output(self, now: int) -> bool:
        """The OUT pin."""
        done = self.elapsed(now)
        mode = self.mode
        if mode == 0:
            return done is not None and done >= self.count
        if mode in PERIODIC and not self.gate:
            return True
        if done is None:
            return True
        if mode == 1:
            return done >= self.count
        if mode == 2:
            return done % self.count != self.count - 1
        if mode == 3:
            return done % self.count < (self.count + 1) // 2
        return done != self.count

    def next_change(self, now: int) -> int | None:
        """The next tick at which OUT changes if nobody interferes; None if never."""
        done = self.elapsed(now)
        if self.start is not None and now < self.start:
            return self.start if self.mode == 1 else self._first_change()
        if done is None or self.stopped_at is not None or self.start is None:
            return None
        if self.mode in PERIODIC:
            if not self.gate:
                return None
            at = done % self.count
            cycle = now - at
            middle = self.count - 1 if self.mode == 2 else (self.count + 1) // 2
            change = cycle + (middle if at < middle else self.count)
            if self.pending is not None:
                change = min(change, self.start + self.pending_ticks)
            return change
        if done < self.count:
            return self.start + self.count
        if self.mode in (4, 5) and done == self.count:
            return now + 1
        return None

    def _first_change(self) -> int | None:
        assert self.start is not None
        if self.stopped_at is not None or (self.mode in PERIODIC and not self.gate):
            return None
        if self.mode == 2:
            return self.start + self.count - 1
        if self.mode == 3:
            return self.start + (self.count + 1) // 2
        return self.start + self.count

    def value(self, now: int) -> int:
        """The counting element, as the 16 bits that a read gives (BCD digits in BCD mode)."""
        done = self.elapsed(now)
        if done is None:
            left = self.count
        elif self.mode == 3:
            half = (self.count + 1) // 2
            at = done % self.count
            left = (self.count & ~1) - 2 * (at if at < half else at - half)
        elif self.mode == 2:
            left = self.count - done % self.count
        else:
            left = (self.count - done) % self.full
        left %= self.full
        return _to_bcd(left) if self.bcd else left

    # --- what the processor does ---------------------------------------------

    def control(self, value: int, now: int) -> None:
        """A control word other than a latch command."""
        self.access = value >> 4 & 3
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode >= 6 else mode
        self.bcd = bool(value & 1)
        self.start = self.stopped_at = self.pending = self.low_byte = None
        self.latched, self.latched_status = (), None
        self.read_high = self.loaded = False

    def write(self, value: int, now: int) -> None:
        """One byte of a count."""
        if self.access == 1:
            self._load(value, now)
        elif self.access == 2:
            self._load(value << 8, now)
        elif self.low_byte is None:
            self.low_byte = value
            if self.mode == 0:
                # "Writing the first byte disables counting; OUT is set low immediately."
                self.start = None
        else:
            low, self.low_byte = self.low_byte, None
            self._load(low | value << 8, now)

    def _load(self, raw: int, now: int) -> None:
        count = (_from_bcd(raw) if self.bcd else raw) or self.full
        if self.mode in PERIODIC and count == 1:
            count = 2  # "a count of 1 is illegal" in these modes
        self.loaded = True
        running = self.start is not None and now >= self.start
        if self.mode in PERIODIC and running and self.gate:
            self._settle(now)
            assert self.start is not None
            self._pending_after(now)
            self.pending = count
            return
        self.pending = None
        if self.mode in TRIGGERED:
            if running:
                # Modes 1 and 5: the current one-shot is not affected until it is triggered again.
                self.pending = count
                self.pending_ticks = 1 << 60
                return
            self.count = count
            return
        self.count = count
        self.start = now + 1
        self.stopped_at = None if self.gate else 0

    def _pending_after(self, now: int) -> None:
        assert self.start is not None
        done = now - self.start
        at = done % self.count
        cycle = done - at
        if self.mode == 3 and at < (self.count + 1) // 2:
            self.pending_ticks = cycle + (self.count + 1) // 2
        else:
            self.pending_ticks = cycle + self.count

    def set_gate(self, gate: bool, now: int) -> None:
        """Drive the GATE pin (data sheet, "Gate pin operations summary")."""
        if gate == self.gate:
            return
        done = self.elapsed(now)
        self.gate = gate
        if self.mode in (0, 4):
            if gate and self.stopped_at is not None:
                self.start, self.stopped_at = now - self.stopped_at, None
            elif not gate and done is not None:
                self.stopped_at = done
            elif not gate and self.start is not None:
                self.stopped_at = 0
        elif gate and self.loaded:
            if self.pending is not None:
                self.count, self.pending = self.pending, None
            self.start = now + 1

    def latch(self, now: int) -> None:
        """Counter latch; ignored while an earlier latch is unread."""
        if not self.latched:
            value = self.value(now)
            both = (value & 0xFF, value >> 8)
            self.latched = both if self.access == 3 else both[self.access - 1 : self.access]

    def latch_status(self, now: int) -> None:
        """Read-back of the status byte; ignored while an earlier one is unread."""
        if self.latched_status is None:
            counting = self.elapsed(now) is not None and self.pending is None
            self.latched_status = (
                self.output(now) << 7 | (not counting) << 6 | self.access << 4 | self.mode << 1 | int(self.bcd)
            )

    def read(self, now: int) -> int:
        """One byte: latched status first, then the latched count, else the live count."""
        if self.latched_status is not None:
            value, self.latched_status = self.latched_status, None
            return value
        if self.latched:
            value, self.latched = self.latched[0], self.latched[1:]
            return value
        live = self.value(now)
        if self.access == 1:
            return live & 0xFF
        if self.access == 2:
            return live >> 8
        self.read_high = not self.read_high
        return live & 0xFF if self.read_high else live >> 8


class Pit(Device):
    """Ports 0x40-0x43; channel 0 drives IRQ 0, channel 2 the speaker."""

    def __init__(self, clock: Clock, irq: Callable[[bool], None]) -> None:
        self._clock = clock
        self._irq = irq
        self._timer = clock.timer("pit", self._update)
        self.channels = (Channel(gate=True), Channel(gate=True), Channel(gate=False))

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        bus.claim_ports(0x40, 0x43, self.port_read, self.port_write)

    def reset(self) -> None:
        """All channels stopped."""
        for channel in self.channels:
            channel.reset()
        self._update()

    def save(self) -> Any:
        """State of the three channels."""
        return tuple([channel.save() for channel in self.channels])

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        for channel, fields in zip(self.channels, state, strict=True):
            channel.restore(fields)

    @property
    def ticks(self) -> int:
        """The input clock's count now."""
        return ticks_at(self._clock.now, HERTZ)

    def _update(self) -> None:
        now = self.ticks
        channel = self.channels[0]
        self._irq(channel.output(now))
        change = channel.next_change(now)
        if change is None:
            self._timer.disarm()
        else:
            self._timer.arm(time_of_tick(max(change, now + 1), HERTZ))

    def port_read(self, port: int, size: int) -> int:
        """A counter; the control register cannot be read."""
        if port == 0x43:
            return 0xFF
        return self.channels[port - 0x40].read(self.ticks)

    def port_write(self, port: int, size: int, value: int) -> None:
        """A counter, a control word, a latch or a read-back command."""
        now = self.ticks
        if port != 0x43:
            index = port - 0x40
            self.channels[index].write(value, now)
        elif value >> 6 == 3:
            for index, channel in enumerate(self.channels):
                if value & 2 << index:
                    if not value & 0x20:
                        channel.latch(now)
                    if not value & 0x10:
                        channel.latch_status(now)
            return
        else:
            index = value >> 6
            if not value & 0x30:
                self.channels[index].latch(now)
                return
            self.channels[index].control(value, now)
        if index == 0:
            self._update()

    def set_gate2(self, gate: bool) -> None:
        """Port 0x61 bit 0."""
        self.channels[2].set_gate(gate, self.ticks)

    def output2(self) -> bool:
        """Port 0x61 bit 5."""
        return self.channels[2].output(self.ticks)


def _to_bcd(value: int) -> int:
    return value % 10 | value // 10 % 10 << 4 | value // 100 % 10 << 8 | value // 1000 % 10 << 12


def _from_bcd(value: int) -> int:
    digits = [value >> shift & 15 for shift in (0, 4, 8, 12)]
    return (digits[0] + 10 * digits[1] + 100 * digits[2] + 1000 * digits[3]) % 10_000
