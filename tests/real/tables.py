"""The three table families of mainline kernels, decoded without the project's parsers.

Entry layouts, from the kernel's headers: struct paravirt_patch_site (arch/x86/include/asm/paravirt_types.h),
struct alt_instr and the .smp_locks section (arch/x86/include/asm/alternative.h), each for the series named.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .vmlinux import Vmlinux

# alt_instr by its size: instruction and replacement relative to their fields, the CPU feature word, the flags of
# 6.3 and later, the two lengths. (5.10 began with a padding length, 13 bytes in all; its stable series dropped it.)
ALTERNATIVES = {12: ("<iiHBB", 3), 14: ("<iiHHBB", 4)}
ALTERNATIVE_SIZE = {
    "686": 12,
    "686-pae": 12,
    "amd64": 12,
    "5.10-686": 12,
    "5.10-686-pae": 12,
    "5.10-amd64": 12,
    "6.12-amd64": 14,
    "6.18-alpine": 14,
    "7.2-amd64": 14,
    "7.3-amd64": 14,
}
FAMILIES = ("parainstructions", "altinstructions", "smp_locks")


@dataclass(frozen=True)
class Entry:
    """A site as its table names it: virtual address, length in bytes, paravirt type where there is one."""

    address: int
    length: int
    type: int | None = None


def entries(kernel: Vmlinux, family: str, name: str) -> list[Entry]:
    """The entries of one family in table order; none when the kernel has no such section.

    `name` is the kernel's in kernels.KERNELS.
    """
    section = kernel.sections.get(f".{family}")
    if section is None:
        return []
    data = kernel.bytes_of(section.name)
    if family == "parainstructions":
        # A pointer, a type and a length; aligned to the pointer, except that the last entry may lack its tail.
        size, form = (8, "<IBB") if kernel.bits == 32 else (16, "<QBB")
        starts = range(0, len(data) - struct.calcsize(form) + 1, size)
        found = (struct.unpack_from(form, data, start) for start in starts)
        return [Entry(address, length, kind) for address, kind, length in found]
    mask = (1 << kernel.bits) - 1
    if family == "altinstructions":
        size = ALTERNATIVE_SIZE[name]
        form, length = ALTERNATIVES[size]
        assert len(data) % size == 0, f"{section} is no whole number of {size}-byte entries"
        return [
            Entry((section.address + size * index + fields[0]) & mask, fields[length])
            for index, fields in enumerate(struct.iter_unpack(form, data))
        ]
    offsets = struct.unpack(f"<{len(data) // 4}i", data)
    # The section is padded with zeros to a page.
    return [Entry((section.address + 4 * i + offset) & mask, 1) for i, offset in enumerate(offsets) if offset]
