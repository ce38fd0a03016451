"""The MC146818 real-time clock and the CMOS memory behind ports 0x70 and 0x71.

May import ``bus``, ``clock`` and ``device`` of this package.  Facts: Motorola
MC146818 data sheet (registers A to D, update cycle, interrupts); memory-size
bytes as in IBM's AT BIOS listing and in what SeaBIOS reads (0x15-0x18, 0x30,
0x31, 0x34, 0x35, 0x5B-0x5D, 0x5F).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import NS_PER_SECOND, Clock, ticks_at, time_of_tick
from vmipatch.emu.machine.device import Device

DEFAULT_DATE = datetime(2020, 1, 1, tzinfo=UTC)
UPDATE_WARNING_NS = 244_000  # UIP is set this long before an update
CENTURY = 0x32
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, HOURS24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


class Rtc(Device):
    """Clock, alarm, periodic and update interrupts (IRQ 8), and 128 bytes of memory."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "index", "cmos", "base", "base_ns", "frozen", "flags", "seen_ns",
    )  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        irq: Callable[[bool], None],
        ram_bytes: int,
        date: datetime = DEFAULT_DATE,
    ) -> None:
        self._clock = clock
        self._irq = irq
        self._timer = clock.timer("rtc", self._update)
        self.cmos = bytearray(128)
        self.cmos[REG_A], self.cmos[REG_B], self.cmos[REG_D] = 0x26, HOURS24, 0x80
        self.base = date.replace(tzinfo=UTC)
        self.base_ns = 0
        self.frozen = False
        self.flags = 0
        self.seen_ns = 0
        self.index = 0
        self._set_memory(ram_bytes)

    def _set_memory(self, ram_bytes: int) -> None:
        cmos = self.cmos
        cmos[0x14] = 0x06  # equipment: coprocessor and a pointing device
        cmos[0x15:0x17] = (640).to_bytes(2, "little")
        extended = min(max(0, (ram_bytes >> 10) - 1024), 0xFFFF)
        cmos[0x17:0x19] = cmos[0x30:0x32] = extended.to_bytes(2, "little")
        above = min(max(0, (ram_bytes - (16 << 20)) >> 16), 0xFFFF)
        cmos[0x34:0x36] = above.to_bytes(2, "little")
        cmos[CENTURY] = _bcd(self.base.year // 100)

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        bus.claim_ports(0x70, 0x71, self.port_read, self.port_write)

    def reset(self) -> None:
        """The RESET pin: interrupt enables, flags and square wave off; time goes on."""
        self.cmos[REG_B] &= 0xFF & ~(PIE | AIE | UIE | 0x08)
        self.flags = 0
        self.index = 0
        self._update()

    # --- time ---------------------------------------------------------------

    def now(self) -> datetime:
        """The date that the registers show."""
        if self.frozen:
            return self.base
        return self.base + timedelta(seconds=(self._clock.now - self.base_ns) // NS_PER_SECOND)

    def _divider_runs(self) -> bool:
        return self.cmos[REG_A] >> 4 & 7 == 2

    def updating(self) -> bool:
        """UIP: an update is in progress or comes within 244 microseconds."""
        if self.frozen or not self._divider_runs():
            return False
        return NS_PER_SECOND - (self._clock.now - self.base_ns) % NS_PER_SECOND <= UPDATE_WARNING_NS

    def _period_hertz(self) -> int:
        rate = self.cmos[REG_A] & 15
        if rate == 0 or not self._divider_runs():
            return 0
        if rate < 3:
            rate += 7  # with a 32,768 Hz crystal rates 1 and 2 are those of 8 and 9
        return 32768 >> (rate - 1)

    def _collect(self) -> None:
        """Set the flags of everything that happened since they were last collected."""
        now, seen = self._clock.now, self.seen_ns
        self.seen_ns = now
        hertz = self._period_hertz()
        if hertz and ticks_at(now, hertz) > ticks_at(seen, hertz):
            self.flags |= PF
        if self.frozen or not self._divider_runs():
            return
        second = (now - self.base_ns) // NS_PER_SECOND
        before = max(0, (seen - self.base_ns) // NS_PER_SECOND)
        if second > before:
            self.flags |= UF
            alarm = self._next_alarm(self.base + timedelta(seconds=before))
            if alarm is not None and alarm <= self.base + timedelta(seconds=second):
                self.flags |= AF

    def _next_alarm(self, after: datetime) -> datetime | None:
        """The first second after ``after`` at which the alarm bytes match."""
        wanted = [self.cmos[index] for index in (1, 3, 5)]
        seconds, minutes = (None if raw >= 0xC0 else self._decode(raw) for raw in wanted[:2])
        hours = None if wanted[2] >= 0xC0 else self._decode_hour(wanted[2])
        if (seconds or 0) > 59 or (minutes or 0) > 59 or (hours or 0) > 23:
            return None
        moment = after + timedelta(seconds=1)
        if seconds is not None:
            moment += timedelta(seconds=(seconds - moment.second) % 60)
        if minutes is not None and moment.minute != minutes:
            moment = moment.replace(second=seconds or 0)
            moment += timedelta(minutes=(minutes - moment.minute) % 60)
        if hours is not None and moment.hour != hours:
            moment = moment.replace(second=seconds or 0, minute=minutes or 0)
            moment += timedelta(hours=(hours - moment.hour) % 24)
        return moment

    def _update(self) -> None:
        self._collect()
        enabled = self.cmos[REG_B] & self.flags & (PF | AF | UF)
        self._irq(bool(enabled))
        deadline = None
        now = self._clock.now
        hertz = self._period_hertz()
        if self.cmos[REG_B] & PIE and hertz:
            deadline = time_of_tick(ticks_at(now, hertz) + 1, hertz)
        if self.cmos[REG_B] & (AIE | UIE) and not self.frozen and self._divider_runs():
            second = (now - self.base_ns) // NS_PER_SECOND + 1
            if not self.cmos[REG_B] & UIE:
                current = self.now()
                alarm = self._next_alarm(current)
                second += -1 + (86400 if alarm is None else int((alarm - current).total_seconds()))
            at = self.base_ns + second * NS_PER_SECOND
            deadline = at if deadline is None else min(deadline, at)
        if deadline is None:
            self._timer.disarm()
        else:
            self._timer.arm(deadline)

    # --- registers ----------------------------------------------------------

    def _encode(self, value: int) -> int:
        return value if self.cmos[REG_B] & BINARY else _bcd(value)

    def _decode(self, raw: int) -> int:
        return raw if self.cmos[REG_B] & BINARY else (raw >> 4) * 10 + (raw & 15)

    def _encode_hour(self, hour: int) -> int:
        if self.cmos[REG_B] & HOURS24:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, raw: int) -> int:
        if self.cmos[REG_B] & HOURS24:
            return self._decode(raw)
        return self._decode(raw & 0x7F) % 12 + (12 if raw & 0x80 else 0)

    def _read_time(self, index: int) -> int:
        date = self.now()
        if index == 0:
            return self._encode(date.second)
        if index == 2:
            return self._encode(date.minute)
        if index == 4:
            return self._encode_hour(date.hour)
        if index == 6:
            return self._encode(date.isoweekday() % 7 + 1)  # Sunday is 1
        if index == 7:
            return self._encode(date.day)
        if index == 8:
            return self._encode(date.month)
        return self._encode(date.year % 100)

    def _write_time(self, index: int, raw: int) -> None:
        date = self.now()
        value = self._decode(raw)
        try:
            if index == 0:
                date = date.replace(second=value)
            elif index == 2:
                date = date.replace(minute=value)
            elif index == 4:
                date = date.replace(hour=self._decode_hour(raw))
            elif index == 7:
                date = date.replace(day=value)
            elif index == 8:
                date = date.replace(month=value)
            elif index == 9:
                date = date.replace(year=date.year // 100 * 100 + value)
            elif index == CENTURY:
                date = date.replace(year=(raw >> 4) * 1000 + (raw & 15) * 100 + date.year % 100)
        except ValueError:
            return  # not a date: the chip would count on from it; we keep the old one
        if date.year < 9000:  # room to count on within what a date can hold
            self._rebase(date)

    def _rebase(self, date: datetime) -> None:
        if not self.frozen:
            # Keep the phase of the second: writing the time does not restart the divider.
            self.base_ns += (self._clock.now - self.base_ns) // NS_PER_SECOND * NS_PER_SECOND
        self.base = date

    def port_read(self, port: int, size: int) -> int:
        """0x70 cannot be read on a PC; 0x71 gives the selected byte."""
        if port == 0x70:
            return 0xFF
        index = self.index
        if index in (0, 2, 4, 6, 7, 8, 9):
            return self._read_time(index)
        if index == CENTURY:
            return _bcd(self.now().year // 100)
        if index == REG_A:
            return self.cmos[REG_A] & 0x7F | (0x80 if self.updating() else 0)
        if index == REG_C:
            self._collect()
            value = self.flags | (IRQF if self.flags & self.cmos[REG_B] & (PF | AF | UF) else 0)
            self.flags = 0
            self._update()
            return value
        if index == REG_D:
            return 0x80  # VRT: the battery is good
        return self.cmos[index]

    def port_write(self, port: int, size: int, value: int) -> None:
        """0x70 selects (its bit 7 masks the NMI pin, which nothing here drives); 0x71 stores."""
        if port == 0x70:
            self.index = value & 0x7F
            return
        index = self.index
        if index in (0, 2, 4, 6, 7, 8, 9, CENTURY):
            self._write_time(index, value)
        elif index == REG_A:
            self._collect()
            self.cmos[REG_A] = value & 0x7F
        elif index == REG_B:
            self._write_b(value)
        elif index not in (REG_C, REG_D):
            self.cmos[index] = value
        self._update()

    def _write_b(self, value: int) -> None:
        self._collect()
        if value & SET:
            value &= ~UIE  # "SET ... clears UIE"
            if not self.frozen:
                self._rebase(self.now())
                self.frozen = True
        elif self.frozen:
            self.frozen = False
            elapsed = self._clock.now - self.base_ns
            self.base_ns += elapsed // NS_PER_SECOND * NS_PER_SECOND
        self.cmos[REG_B] = value


def _bcd(value: int) -> int:
    return value // 10 % 10 << 4 | value % 10
