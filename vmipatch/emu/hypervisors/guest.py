"""Guest memory as the host may touch it for the guest: every pointer is checked.

May import violation and paging's interface.  A pointer of the guest must lie below the hole and be mapped;
what is written goes past the page tables' guard like any write of the guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base


class DeviceMemory:
    """Physical memory as a device's own transfers reach it: the guest's, past the page tables' guard."""

    def __init__(self, owner: Base) -> None:
        self._owner = owner
        self._memory = owner.machine.memory

    def read(self, physical: int, length: int) -> bytes:
        """Bytes; 0xFF where the guest has no memory."""
        if not self._owner.active:
            return self._memory.read(physical, length)
        end = self._owner.machine.options.ram_bytes
        known = max(0, min(length, end - physical))
        return self._memory.read(physical, known) + b"\xff" * (length - known)

    def write(self, physical: int, data: bytes) -> None:
        """Store; nothing happens where the guest has no memory."""
        if not self._owner.active:
            self._memory.write(physical, data)
            return
        done = 0
        while done < len(data):
            size = min(len(data) - done, 4096 - (physical + done) % 4096)
            self._owner.paging.store_physical(physical + done, data[done : done + size])
            done += size


class GuestMemory:
    """Linear guest memory below the hole."""

    def __init__(self, owner: Base) -> None:
        self._owner = owner
        self._cpu = owner.machine.cpu

    def reaches(self, linear: int, length: int) -> bool:
        """Whether the bytes lie below the hole and are mapped."""
        if linear + length > self._owner.hole:
            return False
        ends = range(linear, linear + length, 4096)
        return all(self._cpu.translate(at) >= 0 for at in (*ends, linear + max(length, 1) - 1))

    def read(self, linear: int, length: int, what: str = "pointer") -> bytes:
        """Bytes at a linear address; raises :class:`Violation` ``bad-pointer``."""
        found = self._cpu.read_linear(linear, length) if linear + length <= self._owner.hole else None
        if found is None:
            raise Violation("bad-pointer", f"{what}: {length} bytes that are not all the guest's", linear)
        return found

    def read32(self, linear: int, what: str = "pointer") -> int:
        """A word at a linear address."""
        return int.from_bytes(self.read(linear, 4, what), "little")

    def write(self, linear: int, data: bytes, what: str = "pointer") -> None:
        """Store at a linear address; raises :class:`Violation` ``bad-pointer`` or what the page tables' guard says."""
        if linear + len(data) > self._owner.hole:
            raise Violation("bad-pointer", f"{what}: {len(data)} bytes that are not all the guest's", linear)
        done = 0
        while done < len(data):
            at = linear + done
            size = min(len(data) - done, 4096 - at % 4096)
            place = self._cpu.translate(at)
            if place < 0:
                raise Violation("bad-pointer", f"{what}: not mapped", at)
            self._owner.paging.store(place, data[done : done + size])
            done += size

    def write32(self, linear: int, value: int, what: str = "pointer") -> None:
        """Store a word."""
        self.write(linear, (value & 0xFFFF_FFFF).to_bytes(4, "little"), what)
