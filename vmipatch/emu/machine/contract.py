"""What the machine asks of a processor and of guest memory, as typed protocols.

Imports nothing of the package.  :mod:`vmipatch.emu.cpu` provides both; tests
put small fakes in their place, so that a device can be tested without an
engine.
"""

from __future__ import annotations

from typing import Any, Protocol


class BusMemory(Protocol):
    """Guest-physical memory as a device reaches it by itself."""

    def read(self, physical: int, length: int, /) -> bytes:
        """Bytes, without side effects."""

    def write(self, physical: int, data: bytes, /) -> None:
        """Store."""


class PhysicalMemory(Protocol):
    """Guest-physical memory: one backing buffer, and a page map over it."""

    def allocate(self, length: int, /) -> int:
        """New backing of ``length`` bytes; returns its page-aligned backing offset."""

    def map(self, physical: int, length: int, backing: int, /, *, readable: bool = True, writable: bool = True) -> None:
        """Show backing bytes at a physical address; both multiples of 4096."""

    def unmap(self, physical: int, length: int, /) -> None:
        """Send accesses to these pages to the bus."""

    def read(self, physical: int, length: int, /) -> bytes:
        """Bytes as the processor would see them, without side effects."""

    def write_backing(self, offset: int, data: bytes, /) -> None:
        """Store at a backing offset, whatever shows it."""

    def write(self, physical: int, data: bytes, /) -> None:
        """Store through the map, read-only pages included."""


class Processor(Protocol):
    """One processor; the machine drives it by :meth:`run` and reads ``instructions``."""

    instructions: int
    interrupt_line: bool
    tsc_offset: int

    def run(self, until: int, /) -> int:
        """Execute until ``instructions >= until`` or something needs the host."""

    def request_exit(self) -> None:
        """Make :meth:`run` return at the next instruction boundary."""

    def reset(self) -> None:
        """The state after the RESET pin."""

    def nmi(self) -> None:
        """Latch a non-maskable interrupt."""

    def set_a20(self, enabled: bool, /) -> None:
        """Drive the A20M# pin: when not enabled, address bit 20 reads as 0."""

    def save(self) -> Any:
        """The whole processor state, an opaque object."""

    def restore(self, state: Any, /) -> None:
        """Bring back what :meth:`save` returned."""
