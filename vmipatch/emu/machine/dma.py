"""Two 8237A DMA controllers and their page registers.

May import ``bus`` and ``device`` of this package.  Facts: Intel 8237A data
sheet (order number 231466), page registers as in IBM's AT.  No device of this
machine asks for DMA, so nothing is ever transferred: the registers read back
as the chip's do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device


class Controller(Device):
    """One 8237A: four channels, register offsets 0-15."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "base", "current", "flip_flop", "command", "mask", "request", "modes", "status",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Master clear; base and current registers are kept by the chip, here zero at power-on."""
        self.base = [0] * 8
        self.current = [0] * 8
        self.modes = [0] * 4
        self.master_clear()

    def master_clear(self) -> None:
        """Command, status, request and flip-flop cleared; all channels masked."""
        self.flip_flop = False
        self.command = self.request = self.status = 0
        self.mask = 0x0F

    def read(self, offset: int) -> int:
        """A register; those that are write-only read as zero."""
        if offset < 8:
            shift = 8 if self.flip_flop else 0
            self.flip_flop = not self.flip_flop
            return self.current[offset] >> shift & 0xFF
        if offset == 8:
            value = self.status | self.request << 4
            self.status = 0  # the terminal-count bits clear when read
            return value
        return self.mask | 0xF0 if offset == 15 else 0

    def write(self, offset: int, value: int) -> None:
        """A register or one of the software commands."""
        if offset < 8:
            shift = 8 if self.flip_flop else 0
            self.flip_flop = not self.flip_flop
            self.base[offset] = self.base[offset] & ~(0xFF << shift) | value << shift
            self.current[offset] = self.base[offset]
        elif offset == 8:
            self.command = value
        elif offset in (9, 10):
            bit = 1 << (value & 3)
            name = "request" if offset == 9 else "mask"
            old = getattr(self, name)
            setattr(self, name, old | bit if value & 4 else old & ~bit)
        elif offset == 11:
            self.modes[value & 3] = value & 0xFC
        elif offset == 12:
            self.flip_flop = False
        elif offset == 13:
            self.master_clear()
        elif offset == 14:
            self.mask = 0
        else:
            self.mask = value & 15


class Dma(Device):
    """Controllers at 0x00-0x0F and 0xC0-0xDF (even), pages at 0x81-0x8F."""

    FIELDS: ClassVar[tuple[str, ...]] = ("pages",)

    def __init__(self) -> None:
        self.low = Controller()
        self.high = Controller()
        self.pages = bytearray(16)

    def attach(self, bus: Bus) -> None:
        """Claim the ports; 0x80 belongs to the POST code."""
        bus.claim_ports(0x00, 0x0F, self.port_read, self.port_write)
        bus.claim_ports(0x81, 0x8F, self.port_read, self.port_write)
        bus.claim_ports(0xC0, 0xDF, self.port_read, self.port_write)

    def reset(self) -> None:
        """Both controllers cleared."""
        self.low.reset()
        self.high.reset()
        self.pages = bytearray(16)

    def save(self) -> Any:
        """Controllers and pages."""
        return self.low.save(), self.high.save(), bytes(self.pages)

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        low, high, pages = state
        self.low.restore(low)
        self.high.restore(high)
        self.pages = bytearray(pages)

    def port_read(self, port: int, size: int) -> int:
        """A register."""
        if port < 0x10:
            return self.low.read(port)
        if port < 0x90:
            return self.pages[port - 0x80]
        return 0xFF if port & 1 else self.high.read((port - 0xC0) >> 1)

    def port_write(self, port: int, size: int, value: int) -> None:
        """A register."""
        if port < 0x10:
            self.low.write(port, value)
        elif port < 0x90:
            self.pages[port - 0x80] = value
        elif not port & 1:
            self.high.write((port - 0xC0) >> 1, value)
