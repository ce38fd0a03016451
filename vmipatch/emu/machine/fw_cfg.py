"""QEMU's firmware configuration device: how SeaBIOS learns what machine it is on.

May import ``bus``, ``contract`` and ``device`` of this package.  Facts: QEMU's
``docs/specs/fw_cfg.rst`` (selector 0x510, data 0x511, DMA 0x514, directory key
0x19, file keys from 0x20).
"""

from __future__ import annotations

from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.contract import BusMemory, PhysicalMemory
from vmipatch.emu.machine.device import Device

SIGNATURE, IDENT, RAM_SIZE, NOGRAPHIC, CPUS, BOOT_MENU, MAX_CPUS = 0x00, 0x01, 0x03, 0x04, 0x05, 0x0E, 0x0F
DIRECTORY, FIRST_FILE = 0x19, 0x20
KEY_MASK = 0xBFFF  # bit 14 is the write channel, bit 15 an architecture's own items
DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 1, 2, 4, 8, 16
MAX_TRANSFER = 1 << 24


class FirmwareConfig(Device):
    """Items by key; ``add_file`` numbers files in the order of their names."""

    FIELDS: ClassVar[tuple[str, ...]] = ("key", "offset", "dma_high")

    def __init__(self, memory: PhysicalMemory, ram_bytes: int) -> None:
        self.memory: BusMemory = memory
        """What its direct memory access reaches; a hypervisor puts its own view in front."""
        self._files: dict[str, bytes] = {}
        self.items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            IDENT: (3).to_bytes(4, "little"),  # traditional interface and DMA
            RAM_SIZE: ram_bytes.to_bytes(8, "little"),
            NOGRAPHIC: bytes(2),
            CPUS: (1).to_bytes(2, "little"),
            MAX_CPUS: (1).to_bytes(2, "little"),
        }
        # Packed as the processor sees it: start, length, type 1 for RAM.
        self.add_file("etc/e820", bytes(8) + ram_bytes.to_bytes(8, "little") + b"\1\0\0\0")
        self.reset()

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        bus.claim_ports(0x510, 0x510, self.port_read, self.port_write, width=2)
        bus.claim_ports(0x511, 0x511, self.port_read, self.port_write)
        bus.claim_ports(0x514, 0x51B, self.dma_read, self.dma_write, width=4)

    def reset(self) -> None:
        """The signature is selected."""
        self.key = 0
        self.offset = 0
        self.dma_high = 0

    def add_file(self, name: str, data: bytes) -> None:
        """A named file (at most 55 bytes of ASCII)."""
        self._files[name] = data
        self._directory()

    def _directory(self) -> None:
        entries = [len(self._files).to_bytes(4, "big")]
        for index, (name, data) in enumerate(sorted(self._files.items())):
            key = FIRST_FILE + index
            self.items[key] = data
            entries.append(
                len(data).to_bytes(4, "big")
                + key.to_bytes(2, "big")
                + bytes(2)
                + name.encode("ascii")[:55].ljust(56, b"\0")
            )
        self.items[DIRECTORY] = b"".join(entries)

    def _take(self, length: int) -> bytes:
        data = self.items.get(self.key, b"")[self.offset : self.offset + length]
        self.offset += length
        return data + bytes(length - len(data))

    def port_read(self, port: int, size: int) -> int:
        """The next byte of the selected item; zeros past its end."""
        return self._take(1)[0] if port == 0x511 else 0

    def port_write(self, port: int, size: int, value: int) -> None:
        """Select an item."""
        if port == 0x510:
            self.key, self.offset = value & KEY_MASK, 0

    def dma_read(self, port: int, size: int) -> int:
        """The interface's own signature, big-endian."""
        signature = b"QEMU CFG"
        offset = port - 0x514
        return int.from_bytes(signature[offset : offset + size], "little")

    def dma_write(self, port: int, size: int, value: int) -> None:
        """The big-endian address of a request; its low half starts it."""
        if size != 4:
            return
        swapped = int.from_bytes(value.to_bytes(4, "little"), "big")
        if port == 0x514:
            self.dma_high = swapped
        elif port == 0x518:
            high, self.dma_high = self.dma_high, 0
            if not high:
                self._dma(swapped)

    def _dma(self, request: int) -> None:
        fields = self.memory.read(request, 16)
        control = int.from_bytes(fields[0:4], "big")
        length = int.from_bytes(fields[4:8], "big")
        address = int.from_bytes(fields[8:16], "big")
        if control & DMA_SELECT:
            self.key, self.offset = control >> 16 & KEY_MASK, 0
        result = 0
        if control & DMA_READ:
            if length > MAX_TRANSFER or address + length > 1 << 32:
                result = DMA_ERROR
            else:
                self.memory.write(address, self._take(length))
        elif control & DMA_SKIP:
            self.offset += length
        elif control & DMA_WRITE:
            result = DMA_ERROR
        self.memory.write(request, result.to_bytes(4, "big"))
