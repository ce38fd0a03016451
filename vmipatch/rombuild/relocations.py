"""What a ROM's GetRelocationInfo answers, as the patcher reads it.  Imports only the errors.

The patcher gets a :class:`Relocations` from :func:`vmipatch.rombuild.inspect.relocations` (ROMs of ours) or,
for any other ROM, from a caller that ran the ROM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from vmipatch.errors import RomError

SCAN_START = 0xC0000  # physical: where guests look for a VMI ROM (Linux 2.6.32, vmi_32.c)
SCAN_END = 0xE0000
SCAN_STEP = 2048


class RelocationType(IntEnum):
    """The types of section 4.2 of the ABI notes; NOP only since December 2006."""

    NONE = 0
    CALL_REL = 1
    JUMP_REL = 2
    NOP = 3


@dataclass(frozen=True)
class Relocation:
    """The answer for one call: how to get to its stub, and the stub's offset in the ROM image, in bytes.

    The stub's linear address is physical base of the image + PAGE_OFFSET + offset. NONE has offset 0.
    """

    type: RelocationType
    offset: int


ABSENT = Relocation(RelocationType.NONE, 0)


@dataclass(frozen=True)
class Relocations:
    """All answers of one image. ``generation`` is 3, 13 or 6; ``image_offset`` is where in the ROM file."""

    abi: str
    generation: int
    hypervisor: str
    calls: Mapping[int, Relocation]
    slot_size: int | None = None  # bytes, for ABIs whose call n is the slot at n·slot_size
    virtual_top: int = 0
    image_offset: int = 0
    image_size: int = 0

    def of(self, call_number: int) -> Relocation:
        """The answer for a call; a number that the ABI does not have is answered NONE, as the ROM does."""
        return self.calls.get(call_number, ABSENT)


def check_base(base: int, size: int, *, alignment: int = SCAN_STEP, file: str | None = None) -> None:
    """Raise :class:`RomError` unless a guest's scan finds a ROM of ``size`` bytes at physical ``base``."""
    if base % alignment:
        raise RomError(f"ROM base {base:#x} is not a multiple of {alignment}: no guest would find it", file=file)
    if not SCAN_START <= base < SCAN_END or base + size > SCAN_END:
        raise RomError(
            f"a ROM of {size} bytes at {base:#x} lies outside {SCAN_START:#x} to {SCAN_END - 1:#x}", file=file
        )
