"""A PCI card that carries nothing but an expansion ROM: the VMI device 15AD:0801.

May import ``contract`` and ``pci`` of this package.  Facts: PCI Local Bus
Specification 2.2, section 6.2.5.2 (expansion ROM base register) and 6.3 (the
image's PCIR structure); vendor and device number of the VMI ROM as in Linux
2.6's ``arch/x86/kernel/vmi_32.c``.
"""

from __future__ import annotations

from vmipatch.emu.machine.contract import PhysicalMemory
from vmipatch.emu.machine.pci import COMMAND_MEMORY, Function

VMI_VENDOR, VMI_DEVICE = 0x15AD, 0x0801
ROM_BAR = 0x30


def identity(rom: bytes) -> tuple[int, int, int]:
    """Vendor, device and class code for the card.

    A BIOS runs a ROM only if its PCIR structure names the card, so a ROM that
    has one gets a card of that name; a ROM without one gets the VMI device's.
    """
    pointer = int.from_bytes(rom[0x18:0x1A], "little")
    pcir = rom[pointer : pointer + 0x10]
    if rom[:2] == b"\x55\xaa" and len(pcir) == 0x10 and pcir[:4] == b"PCIR":
        return (
            int.from_bytes(pcir[4:6], "little"),
            int.from_bytes(pcir[6:8], "little"),
            int.from_bytes(pcir[13:16], "little"),
        )
    return VMI_VENDOR, VMI_DEVICE, 0x050000


class RomCard(Function):
    """A function with an expansion ROM base register and nothing else."""

    def __init__(self, memory: PhysicalMemory, rom: bytes) -> None:
        super().__init__(*identity(rom))
        self._memory = memory
        self.size = max(0x1000, 1 << (max(len(rom), 1) - 1).bit_length())
        self.backing = memory.allocate(self.size)
        self._shown: int | None = None
        memory.write_backing(self.backing, rom + b"\xff" * (self.size - len(rom)))
        mask = 0xFFFF_FFFF & ~(self.size - 1) | 1
        self.writable[ROM_BAR : ROM_BAR + 4] = mask.to_bytes(4, "little")

    def changed(self, offset: int, size: int) -> None:
        """Follow the base register, its enable bit and the command register."""
        bar = int.from_bytes(self.config[ROM_BAR : ROM_BAR + 4], "little")
        base: int | None = None
        if bar & 1 and self.config[4] & COMMAND_MEMORY and bar >> 12:
            base = bar & ~(self.size - 1)
        if base == self._shown:
            return
        if self._shown is not None:
            self._memory.unmap(self._shown, self.size)
        self._shown = base
        if base is not None:
            self._memory.map(base, self.size, self.backing, writable=False)
