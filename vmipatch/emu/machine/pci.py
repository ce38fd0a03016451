"""PCI configuration mechanism 1, and the base of a PCI function.

May import ``bus`` and ``device`` of this package.  Facts: PCI Local Bus
Specification 2.2, chapters 3.2.2.3 (mechanism 1) and 6 (configuration space).
"""

from __future__ import annotations

from typing import Any, ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device

COMMAND_IO, COMMAND_MEMORY = 1, 2


class Function(Device):
    """One function: 256 bytes of configuration space and which bits software may write."""

    FIELDS: ClassVar[tuple[str, ...]] = ("config",)

    def __init__(
        self, vendor: int, device: int, class_code: int, *, revision: int = 0, multifunction: bool = False
    ) -> None:
        self.initial = bytearray(256)
        self.writable = bytearray(256)
        self.initial[0:4] = (device << 16 | vendor).to_bytes(4, "little")
        self.initial[8] = revision
        self.initial[9:12] = class_code.to_bytes(3, "little")
        self.initial[14] = 0x80 if multifunction else 0
        self.writable[4:6] = b"\x47\x05"  # I/O, memory, master, parity, SERR#, fast back-to-back... of the command
        self.writable[0x0C] = self.writable[0x0D] = self.writable[0x3C] = 0xFF
        self.config = bytearray(self.initial)

    def reset(self) -> None:
        """RST#: every register back to its default."""
        self.config = bytearray(self.initial)
        self.changed(0, 256)

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned; decoding follows only where it differs."""
        same = state[0]["config"] == self.config
        super().restore(state)
        if not same:
            self.changed(0, 256)

    def read(self, offset: int, size: int) -> int:
        """A configuration read within one doubleword."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A configuration write within one doubleword."""
        for index in range(offset, offset + size):
            mask = self.writable[index]
            byte = value >> (8 * (index - offset)) & 0xFF
            self.config[index] = self.config[index] & ~mask | byte & mask
        self.changed(offset, size)

    def changed(self, offset: int, size: int) -> None:
        """Called after a write of these bytes, a reset or a restore."""


class Pci(Device):
    """Ports 0xCF8 and 0xCFC-0xCFF, and the functions on bus 0."""

    FIELDS: ClassVar[tuple[str, ...]] = ("address",)

    def __init__(self) -> None:
        self.functions: dict[int, Function] = {}
        self.address = 0

    def attach(self, bus: Bus) -> None:
        """Claim the ports; 0xCF8 is a register only to a doubleword access."""
        bus.claim_ports(0xCF8, 0xCF8, self._read_address, self._write_address, width=4)
        bus.claim_ports(0xCFC, 0xCFF, self._read_data, self._write_data, width=4)

    def plug(self, slot: int, number: int, function: Function) -> None:
        """Put a function at bus 0, device ``slot``."""
        self.functions[slot << 3 | number] = function

    def reset(self) -> None:
        """RST# on the bus."""
        self.address = 0
        for function in self.functions.values():
            function.reset()

    def save(self) -> Any:
        """The address latch and every function."""
        return self.address, tuple([function.save() for function in self.functions.values()])

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        address, saved = state
        self.address = address
        for function, fields in zip(self.functions.values(), saved, strict=True):
            function.restore(fields)

    def _read_address(self, port: int, size: int) -> int:
        return self.address if size == 4 else 0xFFFF_FFFF

    def _write_address(self, port: int, size: int, value: int) -> None:
        if size == 4:
            self.address = value & 0x80FF_FFFC

    def _target(self) -> Function | None:
        if not self.address & 0x8000_0000 or self.address >> 16 & 0xFF:
            return None
        return self.functions.get(self.address >> 8 & 0xFF)

    def _read_data(self, port: int, size: int) -> int:
        function = self._target()
        if function is None:
            return 0xFFFF_FFFF
        offset = self.address & 0xFC | port & 3
        return function.read(offset, min(size, 4 - (port & 3)))

    def _write_data(self, port: int, size: int, value: int) -> None:
        function = self._target()
        if function is not None:
            offset = self.address & 0xFC | port & 3
            function.write(offset, min(size, 4 - (port & 3)), value)
