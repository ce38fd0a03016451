"""The relocation table that a relocatable kernel's payload carries behind its ELF file, or its bare memory.

Format: ``emit_relocs`` of arch/x86/tools/relocs.c, read backwards by
``handle_relocations`` of arch/x86/boot/compressed/misc.c.  32-bit words, the
low half of a virtual address each (sign-extended on x86-64); a list is ended
in front by a zero word.  32-bit kernels have one list.  64-bit ones have the
list of 64-bit fields, the list of inverse 32-bit fields (per-cpu; gone with
6.15) and the list of 32-bit fields.  Imports image.pageoffset.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass

from vmipatch.image.pageoffset import split_of


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


LEAST = 16
"""Fields that a table must name to be seen behind bare memory; real ones name tens of thousands."""


def start(data: bytes, base: int) -> int:
    """Where the table begins behind a 32-bit kernel's bare memory, which lies at a virtual address; the end if nowhere.

    Before 2.6.26 no ELF header tells where the memory ends (arch/i386/boot/compressed/Makefile and relocs.c of 2.6.21:
    a zero word, then the fields' addresses in ascending order).  What the table names must lie in front of it, and
    most of it must hold addresses of the kernel, virtual ones or physical.
    """
    words = array("I", data[len(data) % 4 :])
    if sys.byteorder == "big":
        words.byteswap()
    number, last = len(words) - 1, base + len(data)
    stop = max(number - _MOST, 0)
    while number >= stop and base <= words[number] < last:
        last = words[number]
        number -= 1
    found, begin = words[number + 1 :], len(data) % 4 + 4 * number
    if number < 0 or words[number] or len(found) < LEAST or found[-1] + 4 > base + begin:
        return len(data)
    held = [int.from_bytes(data[at - base : at - base + 4], "little") for at in found]
    below = base - split_of(base)
    moving = sum(base <= value < base + _LARGEST or below <= value < below + _LARGEST for value in held)
    return begin if moving * 2 > len(held) else len(data)


_MOST = 1 << 21
# With everything built in, and behind the file's bytes what is zero at boot.
_LARGEST = 1 << 26


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
