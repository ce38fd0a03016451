"""Page tables: from the virtual addresses of a running kernel to physical ones.

Intel SDM vol. 3, "Paging": 32-bit, PAE, four and five levels.  Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes | None]
"""Bytes at a physical address, None where there are none."""

_PRESENT, _LARGE = 1, 0x80
_ADDRESS = 0x000FFFFFFFFFF000


class Mode(NamedTuple):
    """One form of paging: bytes of an entry, and the shifts of each level from the root on."""

    name: str
    entry: int
    shifts: tuple[int, ...]
    root_entries: int


MODES = {
    32: (Mode("32-bit", 4, (22, 12), 1024), Mode("PAE", 8, (30, 21, 12), 4)),
    64: (Mode("4 levels", 8, (39, 30, 21, 12), 512), Mode("5 levels", 8, (48, 39, 30, 21, 12), 512)),
}


def walk(read: Read, root: int, mode: Mode, address: int) -> int | None:
    """The physical address of a virtual one under the tables at physical ``root``; None where nothing is mapped."""
    table = root
    for level, shift in enumerate(mode.shifts):
        count = mode.root_entries if level == 0 else 4096 // mode.entry
        raw = read(table + (address >> shift & (count - 1)) * mode.entry, mode.entry)
        if raw is None:
            return None
        entry = int.from_bytes(raw, "little")
        if not entry & _PRESENT:
            return None
        base = entry & (_ADDRESS if mode.entry == 8 else 0xFFFFF000)
        last = level == len(mode.shifts) - 1
        # In the top level of PAE and in the upper ones of long mode the bit is reserved.
        large = entry & _LARGE and shift in (21, 22, 30) and not (mode.name == "PAE" and level == 0)
        if last or large:
            mask = (1 << shift) - 1
            return (base & ~mask) | (address & mask)
        table = base
    return None
