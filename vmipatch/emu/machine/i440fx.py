"""The 82441FX host bridge: PAM registers, which decide what 0xC0000-0xFFFFF is, and SMRAM.

May import ``bus``, ``contract`` and ``pci`` of this package.  Facts: Intel
82441FX (PMC) data sheet, order number 290549: registers 59h-5Fh (PAM) and 72h
(SMRAM); subsystem identification as QEMU's ``pc`` machine gives it, by which
SeaBIOS knows where it is.
"""

from __future__ import annotations

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.contract import PhysicalMemory
from vmipatch.emu.machine.pci import Function

AREA = 0xC0000
AREA_LENGTH = 0x40000
PAM0 = 0x59
SMRAM = 0x72
READ, WRITE = 1, 2


def segments() -> list[tuple[int, int, int, int]]:
    """(start, length, register, shift) of the thirteen PAM segments."""
    found = [(0xF0000, 0x10000, PAM0, 4)]
    for index in range(12):
        found.append((AREA + 0x4000 * index, 0x4000, PAM0 + 1 + index // 2, 4 * (index % 2)))
    return found


class HostBridge(Function):
    """Function 0 of device 0.  ``dram`` is the backing offset of physical 0."""

    def __init__(self, memory: PhysicalMemory, dram: int) -> None:
        super().__init__(0x8086, 0x1237, 0x060000, revision=2)
        self._memory = memory
        self._dram = dram
        self._roms: dict[int, int] = {}  # physical page -> backing of what answers on PCI there
        self._shown: dict[int, tuple[int, int | None]] = {}
        self.initial[0x2C:0x30] = b"\xf4\x1a\x00\x11"
        self.initial[SMRAM] = 0x02
        for register in range(PAM0, PAM0 + 7):
            self.writable[register] = 0x33
        self.writable[PAM0] = 0x30
        self.writable[SMRAM] = 0x78
        self.config = bytearray(self.initial)

    def attach(self, bus: Bus) -> None:
        """Answer for what is neither readable nor writable as memory there."""
        bus.claim_memory(AREA, AREA_LENGTH, self._hole_read, self._hole_write)

    def place_rom(self, physical: int, length: int, backing: int) -> None:
        """A ROM on the bus behind the bridge: seen where PAM sends reads to PCI."""
        for offset in range(0, length, 0x1000):
            self._roms[physical + offset] = backing + offset
        self._apply()

    def attributes(self, physical: int) -> int:
        """READ and WRITE bits of the segment that holds an address in the area."""
        if physical >= 0xF0000:
            return self.config[PAM0] >> 4 & 3
        index = (physical - AREA) >> 14
        return self.config[PAM0 + 1 + index // 2] >> (4 * (index & 1)) & 3

    def set_attributes(self, start: int, end: int, attributes: int) -> None:
        """What a BIOS does through configuration space; whole segments."""
        for first, length, register, shift in segments():
            if first < end and first + length > start:
                self.config[register] = self.config[register] & ~(3 << shift) | attributes << shift
        self._apply()

    def changed(self, offset: int, size: int) -> None:
        """PAM was written: map anew."""
        if offset <= PAM0 + 6 and offset + size > PAM0:
            self._apply()

    def _apply(self) -> None:
        for start, length, _, _ in segments():
            attribute = self.attributes(start)
            for page in range(start, start + length, 0x1000):
                rom = self._roms.get(page)
                if self._shown.get(page) == (attribute, rom):
                    continue
                self._shown[page] = (attribute, rom)
                if attribute & READ:
                    self._memory.map(page, 0x1000, self._dram + page, writable=bool(attribute & WRITE))
                elif rom is not None:
                    self._memory.map(page, 0x1000, rom, writable=False)
                else:
                    self._memory.unmap(page, 0x1000)

    def _hole_read(self, physical: int, size: int) -> int:
        return 0xFFFF_FFFF

    def _hole_write(self, physical: int, size: int, value: int) -> None:
        """Reads from PCI, writes to DRAM: the attribute under which a BIOS copies itself."""
        if self.attributes(physical) == WRITE:
            self._memory.write_backing(self._dram + physical, value.to_bytes(size, "little"))
