"""The relocation table that a relocatable kernel's payload carries behind its ELF file.

Format: ``emit_relocs`` of arch/x86/tools/relocs.c, read backwards by
``handle_relocations`` of arch/x86/boot/compressed/misc.c.  32-bit words, the
low half of a virtual address each (sign-extended on x86-64); a list is ended
in front by a zero word.  32-bit kernels have one list.  64-bit ones have the
list of 64-bit fields, the list of inverse 32-bit fields (per-cpu; gone with
6.15) and the list of 32-bit fields.  Imports errors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relocations:
    """Virtual addresses of the fields that change when the kernel is loaded elsewhere by ``slide`` bytes.

    ``absolute32`` 32-bit fields, to which the slide is added; ``absolute64``
    the same with 64 bits; ``inverse32`` 32-bit fields, from which it is taken.
    """

    absolute32: tuple[int, ...]
    absolute64: tuple[int, ...] = ()
    inverse32: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.absolute32) + len(self.absolute64) + len(self.inverse32)


def parse(tail: bytes, bits: int) -> Relocations | None:
    """The table that ``tail`` consists of, or None if it is none."""
    if len(tail) < 8 or len(tail) % 4:
        return None
    words = struct.unpack(f"<{len(tail) // 4}i", tail)
    if words[0]:
        return None
    lists: list[tuple[int, ...]] = []
    start = 1
    whole = 1 << bits
    while True:
        try:
            stop = words.index(0, start)
        except ValueError:
            stop = len(words)
        # Nearly all are negative, and that is quicker than to mask each.
        lists.append(tuple([word + whole if word < 0 else word for word in words[start:stop]]))
        if stop == len(words):
            break
        if len(lists) == 3:
            return None
        start = stop + 1
    if bits == 32:
        return Relocations(lists[0]) if len(lists) == 1 else None
    if len(lists) == 3:
        return Relocations(lists[2], lists[0], lists[1])
    return Relocations(lists[1], lists[0]) if len(lists) == 2 else None
