"""The small ports of a PC: 0x61, 0x80, 0x92, 0xE9, 0xF4, 0x402 and 0xED.

May import ``bus``, ``clock``, ``device`` and ``pit`` of this package.  Facts:
82371SB (PIIX3) data sheet for 0x61 and 0x92; 0xE9 is Bochs's, 0x402 SeaBIOS's
debug console and 0xF4 QEMU's ``isa-debug-exit``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock
from vmipatch.emu.machine.device import Device
from vmipatch.emu.machine.pit import Pit

REFRESH_NS = 15_085  # port 0x61 bit 4 changes with every memory refresh request


class SystemPorts(Device):
    """System control ports A and B, and the POST code port."""

    FIELDS: ClassVar[tuple[str, ...]] = ("speaker", "post_code", "port_a", "a20", "delay")

    def __init__(self, clock: Clock, pit: Pit, reset_line: Callable[[], None], set_a20: Callable[[bool], None]) -> None:
        self._clock = clock
        self._pit = pit
        self._reset_line = reset_line
        self._set_a20 = set_a20
        self.holds_a20: Callable[[], bool] = lambda: False
        """Whether a hypervisor keeps the line as it is: its memory must not change places."""
        self.a20 = True
        self.reset()

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        for port in (0x61, 0x80, 0x92, 0xED):
            bus.claim_ports(port, port, self.port_read, self.port_write)

    def reset(self) -> None:
        """Speaker off; A20 enabled through port 0x92, as the PIIX3 machine comes up."""
        self.speaker = 0
        self.post_code = 0
        self.delay = 0
        self.port_a = 0x02
        self.drive_a20(True)

    def drive_a20(self, enabled: bool) -> None:
        """The A20 gate, from here or from the keyboard controller: the last one wins."""
        self.a20 = enabled
        if enabled or not self.holds_a20():
            self._set_a20(enabled)

    def is_a20(self) -> bool:
        """Whether address line 20 is passed."""
        return self.a20

    def port_read(self, port: int, size: int) -> int:
        """Ports A and B, the last POST code."""
        if port == 0x61:
            refresh = self._clock.now // REFRESH_NS & 1
            return self.speaker | refresh << 4 | self._pit.output2() << 5
        if port == 0x92:
            return self.port_a & ~0x02 | (0x02 if self.a20 else 0)
        return self.post_code if port == 0x80 else self.delay

    def port_write(self, port: int, size: int, value: int) -> None:
        """Ports A and B, a POST code; 0xED only takes time."""
        if port == 0x61:
            self.speaker = value & 0x0F
            self._pit.set_gate2(bool(value & 1))
        elif port == 0x92:
            fast_reset = value & 1 and not self.port_a & 1
            self.port_a = value
            self.drive_a20(bool(value & 2))
            if fast_reset:
                self._reset_line()
        elif port == 0x80:
            self.post_code = value
        else:
            self.delay = value


class DebugPorts(Device):
    """Consoles at 0xE9 and 0x402, and the exit port 0xF4."""

    def __init__(self, on_output: Callable[[int], None], on_exit: Callable[[int], None]) -> None:
        self._on_output = on_output
        self._on_exit = on_exit

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        for port in (0xE9, 0x402):
            bus.claim_ports(port, port, self.port_read, self.port_write)
        bus.claim_ports(0xF4, 0xF7, self.port_read, self.port_write, width=4)

    def reset(self) -> None:
        """Nothing to reset."""

    def port_read(self, port: int, size: int) -> int:
        """0xE9 reads as itself: that is how a guest knows that it is there."""
        return 0xE9 if port in (0xE9, 0x402) else 0

    def port_write(self, port: int, size: int, value: int) -> None:
        """A character, or the end: exit status ``value * 2 + 1``."""
        if port in (0xE9, 0x402):
            self._on_output(value)
        else:
            self._on_exit((value << 1 | 1) & 0xFF)
