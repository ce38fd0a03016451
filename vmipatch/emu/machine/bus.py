"""The bus: which device answers at a port or at a physical address.

Imports nothing of the package.  The processor calls it in the middle of an
instruction.  Where no device answers, a read gives all ones and a write goes
nowhere: an undriven ISA data bus floats high, and a PCI master abort returns
all ones (PCI Local Bus 2.2, section 3.7.1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

PortRead = Callable[[int, int], int]
PortWrite = Callable[[int, int, int], None]
_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class Observer(Protocol):
    """Sees every access after it happened (tracing)."""

    def port(self, port: int, size: int, value: int, write: bool) -> None: ...

    def mmio(self, physical: int, size: int, value: int, write: bool) -> None: ...

    def interrupt(self, vector: int) -> None: ...


class _Region:
    __slots__ = ("end", "read", "start", "write")

    def __init__(self, start: int, end: int, read: PortRead, write: PortWrite) -> None:
        self.start, self.end, self.read, self.write = start, end, read, write


class Bus:
    """Port and memory-mapped dispatch of one machine."""

    def __init__(self) -> None:
        self._ports: dict[int, tuple[PortRead, PortWrite, int]] = {}
        self._starts: list[int] = []
        self._regions: list[_Region] = []
        self.interrupt_controller: Callable[[], int] = lambda: 0xFF
        self.apic_base_listener: Callable[[int], None] | None = None
        self.observer: Observer | None = None
        self.port_accesses = 0
        self.mmio_accesses = 0
        self.interrupts = 0
        self.unclaimed_ports: dict[int, int] = {}
        self.unclaimed_memory = 0

    def claim_ports(self, first: int, last: int, read: PortRead, write: PortWrite, *, width: int = 1) -> None:
        """Give ports ``first``..``last`` to a device.

        A wider access than ``width`` bytes is split into accesses of half the
        size at successive ports, as the ISA bridge does for an 8-bit device.
        A later claim replaces an earlier one.
        """
        for port in range(first, last + 1):
            self._ports[port] = (read, write, width)

    def release_ports(self, first: int, last: int) -> None:
        """Take ports away from whatever device has them."""
        for port in range(first, last + 1):
            self._ports.pop(port, None)

    def claim_memory(self, start: int, length: int, read: PortRead, write: PortWrite) -> None:
        """Give the physical range to a device; ranges must not overlap."""
        index = bisect_right(self._starts, start)
        before = self._regions[index - 1] if index else None
        after = self._regions[index] if index < len(self._regions) else None
        end = start + length
        if (before is not None and before.end > start) or (after is not None and after.start < end):
            raise ValueError(f"memory-mapped range {start:#x}..{end - 1:#x} overlaps another")
        self._starts.insert(index, start)
        self._regions.insert(index, _Region(start, end, read, write))

    def release_memory(self, start: int) -> None:
        """Take away the range that was claimed at ``start``."""
        index = self._starts.index(start)
        del self._starts[index], self._regions[index]

    def port_read(self, port: int, size: int) -> int:
        """IN: ``size`` is 1, 2 or 4 bytes."""
        self.port_accesses += 1
        entry = self._ports.get(port)
        if entry is not None and size <= entry[2]:
            value = entry[0](port, size) & _ONES[size]
        else:
            value = self._port_read(port, size)
        if self.observer is not None:
            self.observer.port(port, size, value, False)
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT: ``size`` is 1, 2 or 4 bytes."""
        self.port_accesses += 1
        if self.observer is not None:
            self.observer.port(port, size, value, True)
        entry = self._ports.get(port)
        if entry is not None and size <= entry[2]:
            entry[1](port, size, value)
        else:
            self._port_write(port, size, value)

    def _port_read(self, port: int, size: int) -> int:
        entry = self._ports.get(port)
        if entry is not None and size <= entry[2]:
            return entry[0](port, size) & _ONES[size]
        if size > 1:
            half = size >> 1
            low = self._port_read(port, half)
            return low | self._port_read((port + half) & 0xFFFF, half) << (8 * half)
        self.unclaimed_ports[port] = self.unclaimed_ports.get(port, 0) + 1
        return 0xFF

    def _port_write(self, port: int, size: int, value: int) -> None:
        entry = self._ports.get(port)
        if entry is not None and size <= entry[2]:
            entry[1](port, size, value)
        elif size > 1:
            half = size >> 1
            self._port_write(port, half, value & ((1 << (8 * half)) - 1))
            self._port_write((port + half) & 0xFFFF, half, value >> (8 * half))
        else:
            self.unclaimed_ports[port] = self.unclaimed_ports.get(port, 0) + 1

    def memory_read(self, physical: int, size: int) -> int:
        """A load that no RAM or ROM page answers."""
        self.mmio_accesses += 1
        region = self._region(physical)
        if region is None:
            self.unclaimed_memory += 1
            value = (1 << (8 * size)) - 1
        else:
            value = region.read(physical, size) & ((1 << (8 * size)) - 1)
        if self.observer is not None:
            self.observer.mmio(physical, size, value, False)
        return value

    def memory_write(self, physical: int, size: int, value: int) -> None:
        """A store that no writable page answers."""
        self.mmio_accesses += 1
        if self.observer is not None:
            self.observer.mmio(physical, size, value, True)
        region = self._region(physical)
        if region is None:
            self.unclaimed_memory += 1
        else:
            region.write(physical, size, value)

    def acknowledge(self) -> int:
        """The processor's interrupt acknowledge cycle; returns the vector."""
        self.interrupts += 1
        vector = self.interrupt_controller()
        if self.observer is not None:
            self.observer.interrupt(vector)
        return vector

    def write_apic_base(self, value: int) -> None:
        """WRMSR of IA32_APIC_BASE: its bit 11 switches the local APIC on or off."""
        if self.apic_base_listener is not None:
            self.apic_base_listener(value)

    def _region(self, physical: int) -> _Region | None:
        index = bisect_right(self._starts, physical) - 1
        if index >= 0:
            region = self._regions[index]
            if physical < region.end:
                return region
        return None
