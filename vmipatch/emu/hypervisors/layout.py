"""Where the memory lies that only the hypervisor owns.

Guest-physical: from ``HOST`` on, 8 MiB that no device of the machine has.  No page table of the guest may
name a frame there.  Linear: in the hole, which begins one page above the state page at ``virtual_top``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

PAGE = 4096
HOST = 0xF800_0000
HOST_BYTES = 0x80_0000
HOST_MASK = 0xFF80_0000  # an address is the hypervisor's if these bits of it are HOST
PAGES = 640

# Pages behind virtual_top: the state page itself, then the hole.
STATE, IDT, TSS, GDT, LDT = 0, 1, 2, 0x10, 0x20
TABLE_PAGES = 16  # a GDT or an LDT has 64 KiB at most
BEHIND = (LDT + TABLE_PAGES - 1) * PAGE  # bytes of the hole that are mapped; above them nothing is
TSS_LIMIT = 0x67


class HostMemory:
    """The machine-owned pages, handed out one by one; addresses are guest-physical."""

    def __init__(self, machine: Machine) -> None:
        self._memory = machine.memory
        self._backing = machine.memory.allocate(PAGES * PAGE)
        machine.memory.map(HOST, PAGES * PAGE, self._backing)
        self.free = list(range(PAGES - 1, -1, -1))

    def guard(self, physical: int) -> None:
        """From now on a write of the guest's to any page but this one leaves the engine, should it ever reach one."""
        for number in range(PAGES):
            if HOST + number * PAGE != physical:
                self._memory.hook_page((self._backing >> 12) + number, True)

    def page(self) -> int:
        """A zeroed page; the caller sees to it that there is one left."""
        physical = HOST + self.free.pop() * PAGE
        self.write(physical, bytes(PAGE))
        return physical

    def give_back(self, physical: int) -> None:
        """A page of :meth:`page` is free again."""
        self.free.append((physical - HOST) // PAGE)

    def write(self, physical: int, data: bytes) -> None:
        """Store; the page's decoded code and the dirty log are seen to."""
        self._memory.write_backing(physical - HOST + self._backing, data)

    def read(self, physical: int, length: int) -> bytes:
        """Bytes of machine-owned memory."""
        return self._memory.read_backing(physical - HOST + self._backing, length)


def is_host(physical: int) -> bool:
    """Whether a physical address is the hypervisor's."""
    return physical & 0xFFFF_FFFF_FF80_0000 == HOST
