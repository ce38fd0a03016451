"""Segments of 4 GiB that do not begin at 0: they reach round the end of the address space, which a cut limit forbids.

May import decode, descriptors and hole.  Such a segment has a lower part, from its base up to the hole, and an
upper one, whose offsets wrap round to linear addresses below the base: that is where thread-local storage is (ELF
Handling For Thread-Local Storage, variant II).  No one limit allows both and not the hole between them, so the
register is given one part at a time, the upper as an expand-down segment (SDM 3A, 3.4.5.1), and the other one when
the guest faults for it.  Xen does the same for its guests ("4gb segment" fix-up, arch/x86/x86_32/seg_fixup.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmipatch.emu.hypervisors import decode, hole
from vmipatch.emu.hypervisors.descriptors import BIG, CODE, EXPAND_DOWN, PRESENT, SEGMENT, base_of, limit_of

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

LARGEST = 0xFFFF_FFFF


def other_part(owner: Base) -> bool:
    """A limit stopped the instruction at CS:EIP: True if the part of the segment that it wants is there now."""
    cpu = owner.machine.cpu
    for register, offset, size, _ in hole.accesses(cpu, decode.fetch(cpu)):
        selector, base = cpu.get(register), cpu.get(f"{register}_base")
        low, high = owner.tables.own_descriptor(selector)
        data = high & (PRESENT | SEGMENT | CODE | EXPAND_DOWN | BIG) == PRESENT | SEGMENT | BIG
        if not data or base == 0 or base_of(low, high) != base or limit_of(low, high) != LARGEST:
            continue
        if base >= owner.hole:  # it is whole but for the hole, which an expand-down one would have in it
            continue
        is_upper = bool(cpu.get(f"{register}_access") << 8 & EXPAND_DOWN)
        if offset > LARGEST - base and not is_upper and offset + size - 1 <= LARGEST:
            access = high >> 8 & 0xF0FF | EXPAND_DOWN >> 8
            cpu.set_segment(register, selector, base, LARGEST - base, access)
            return True
        if is_upper and base + offset + size <= owner.hole:
            cpu.set(register, selector)
            return True
    return False
