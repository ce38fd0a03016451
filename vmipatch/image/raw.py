"""Raw memory: bytes that stand at one virtual address, with nothing that describes them.

Imports errors, image.model and image.pageoffset.
"""

from __future__ import annotations

from vmipatch.errors import UsageError
from vmipatch.image.model import PF_R, PF_W, PF_X, Segment
from vmipatch.image.pageoffset import START_KERNEL_MAP, split_of


def segment(base: int, size: int, *, file: str) -> tuple[int, Segment]:
    """The bits (64 for a base of 4 GiB and more) and the one segment of ``size`` bytes at ``base``.

    Raises :class:`UsageError` if the memory would reach past the end of the address space.
    """
    bits = 32 if base < 1 << 32 else 64
    if base < 0 or base + size > 1 << bits:
        raise UsageError(f"{size} bytes do not fit at address {base:#x}", file=file)
    below = split_of(base) if bits == 32 else START_KERNEL_MAP if base >= START_KERNEL_MAP else 0
    return bits, Segment(base, base - below, 0, size, size, PF_R | PF_W | PF_X)
