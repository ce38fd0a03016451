"""Linear addresses as a debugger needs them: translated through the guest's page tables, without traces.

May import ``vmipatch.errors`` and the machine.  Accessed and dirty bits stay
as they are, and no fault is raised.  Facts: Intel SDM volume 3, chapter
"Paging" (32-bit and PAE).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

PAGING, PSE, PAE = 1 << 31, 1 << 4, 1 << 5
PRESENT, LARGE = 1, 1 << 7


def translate(machine: Machine, linear: int) -> int | None:
    """The physical address behind a linear one; None where no page is present."""
    cpu, memory = machine.cpu, machine.memory
    linear &= 0xFFFF_FFFF
    if not cpu.get("cr0") & PAGING:
        return linear
    cr3, cr4 = cpu.get("cr3"), cpu.get("cr4")

    def entry(physical: int, size: int) -> int:
        return int.from_bytes(memory.read(physical, size), "little")

    if cr4 & PAE:
        pdpte = entry((cr3 & ~0x1F) + 8 * (linear >> 30), 8)
        if not pdpte & PRESENT:
            return None
        pde = entry((pdpte & 0xF_FFFF_F000) + 8 * (linear >> 21 & 0x1FF), 8)
        if not pde & PRESENT:
            return None
        if pde & LARGE:
            return (pde & 0xF_FFE0_0000) + (linear & 0x1F_FFFF)
        pte = entry((pde & 0xF_FFFF_F000) + 8 * (linear >> 12 & 0x1FF), 8)
        return (pte & 0xF_FFFF_F000) + (linear & 0xFFF) if pte & PRESENT else None
    pde = entry((cr3 & ~0xFFF) + 4 * (linear >> 22), 4)
    if not pde & PRESENT:
        return None
    if pde & LARGE and cr4 & PSE:
        return (pde & 0xFFC0_0000) + (linear & 0x3F_FFFF)
    pte = entry((pde & 0xFFFF_F000) + 4 * (linear >> 12 & 0x3FF), 4)
    return (pte & 0xFFFF_F000) + (linear & 0xFFF) if pte & PRESENT else None


def read(machine: Machine, linear: int, length: int) -> bytes:
    """Bytes at a linear address; fewer where a page is not present."""
    parts = []
    while length > 0:
        size = min(length, 0x1000 - (linear & 0xFFF))
        physical = translate(machine, linear)
        if physical is None or physical >> 32:
            break
        parts.append(machine.memory.read(physical, size))
        linear, length = (linear + size) & 0xFFFF_FFFF, length - size
    return b"".join(parts)


def write(machine: Machine, linear: int, data: bytes) -> None:
    """Store at a linear address, read-only pages included; raises :class:`EmulatorError` if not mapped."""
    while data:
        size = min(len(data), 0x1000 - (linear & 0xFFF))
        physical = translate(machine, linear)
        if physical is None or physical >> 32:
            raise EmulatorError("no page is present there", address=linear)
        machine.memory.write(physical, data[:size])
        linear, data = (linear + size) & 0xFFFF_FFFF, data[size:]
