"""The 82093AA I/O APIC, at 0xFEC00000.

May import ``apic``, ``bus`` and ``device`` of this package.  Facts: Intel
82093AA data sheet (order number 290566).
"""

from __future__ import annotations

from typing import ClassVar

from vmipatch.emu.machine.apic import LocalApic
from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device

BASE = 0xFEC0_0000
PINS = 24
VERSION = (PINS - 1) << 16 | 0x11
MASKED, LEVEL, REMOTE_IRR, ACTIVE_LOW, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 13, 1 << 11
READ_ONLY = REMOTE_IRR | 1 << 12


class IoApic(Device):
    """24 inputs and their redirection table (64-bit entries).

    Lines are given as "asserted" whatever the polarity bit says: sources of
    this machine assert, and software that programs the polarity right sees
    what the board's wiring makes of it.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("ident", "select", "table", "lines")

    def __init__(self) -> None:
        self.local: LocalApic | None = None
        self.reset()

    def attach(self, bus: Bus, local: LocalApic) -> None:
        """Claim the register page; messages go to ``local``."""
        self.local = local
        bus.claim_memory(BASE, 0x1000, self.read, self.write)

    def reset(self) -> None:
        """Every entry masked."""
        self.ident = 0
        self.select = 0
        self.table = [MASKED] * PINS
        self.lines = 0

    def set_line(self, pin: int, asserted: bool) -> None:
        """Drive an input."""
        bit = 1 << pin
        rising = asserted and not self.lines & bit
        self.lines = self.lines | bit if asserted else self.lines & ~bit
        entry = self.table[pin]
        if entry & MASKED:
            return  # an edge on a masked pin is ignored, not held
        if entry & LEVEL:
            self._level(pin)
        elif rising:
            self._send(entry)

    def _level(self, pin: int) -> None:
        entry = self.table[pin]
        if self.lines >> pin & 1 and not entry & (MASKED | REMOTE_IRR):
            self.table[pin] |= REMOTE_IRR
            self._send(entry)

    def _send(self, entry: int) -> None:
        local = self.local
        if local is not None and local.matches(entry >> 56, bool(entry & LOGICAL)):
            local.deliver(entry >> 8 & 7, entry & 0xFF, bool(entry & LEVEL))

    def end_of_interrupt(self, vector: int) -> None:
        """The EOI message of a local APIC for a level-triggered vector."""
        for pin, entry in enumerate(self.table):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self.table[pin] &= ~REMOTE_IRR
                self._level(pin)

    def read(self, physical: int, size: int) -> int:
        """IOREGSEL and IOWIN."""
        offset = physical - BASE
        if offset == 0:
            return self.select
        if offset != 0x10:
            return 0
        if self.select in (0, 2):
            return self.ident << 24
        if self.select == 1:
            return VERSION
        index = self.select - 0x10
        if 0 <= index < 2 * PINS:
            return self.table[index >> 1] >> (32 * (index & 1)) & 0xFFFF_FFFF
        return 0

    def write(self, physical: int, size: int, value: int) -> None:
        """IOREGSEL and IOWIN."""
        offset = physical - BASE
        if offset == 0:
            self.select = value & 0xFF
        elif offset == 0x10:
            self._write_window(value)

    def _write_window(self, value: int) -> None:
        if self.select == 0:
            self.ident = value >> 24 & 15
            return
        index = self.select - 0x10
        if not 0 <= index < 2 * PINS:
            return
        pin = index >> 1
        entry = self.table[pin]
        if index & 1:
            self.table[pin] = entry & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
            return
        low = value & 0x1_AFFF | entry & READ_ONLY
        if not low & LEVEL:
            low &= ~REMOTE_IRR
        self.table[pin] = entry & ~0xFFFF_FFFF | low
        if low & LEVEL:
            self._level(pin)
