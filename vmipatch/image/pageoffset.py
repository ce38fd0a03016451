"""Where an image maps physical memory: PAGE_OFFSET and, on x86-64, the mapping of the kernel's text.

Sources: arch/x86/Kconfig (VMSPLIT), Documentation/arch/x86/x86_64/mm.rst and
arch/x86/include/asm/page_64_types.h of the kernels named.  Imports image.model.
"""

from __future__ import annotations

from collections.abc import Iterable
from mmap import mmap

from vmipatch.image.model import Section, Segment
from vmipatch.image.search import find_all

# PAGE_OFFSET of CONFIG_VMSPLIT_3G, _3G_OPT, _2G, _2G_OPT and _1G.
_SPLITS = (0xC0000000, 0xB0000000, 0x80000000, 0x78000000, 0x40000000)
# __PAGE_OFFSET: 4.20 and later with four levels of page tables; with five; 2.6.27 to 4.19; before.
_DIRECT_MAPS = (0xFFFF888000000000, 0xFF11000000000000, 0xFFFF880000000000, 0xFFFF810000000000)
START_KERNEL_MAP = 0xFFFFFFFF80000000


def text_map(bits: int, segments: tuple[Segment, ...]) -> int | None:
    """What the kernel's own virtual addresses are above the physical ones, from how its segments load."""
    mask = (1 << bits) - 1
    for segment in segments:
        if segment.exec and segment.address != segment.physical:
            distance = (segment.address - segment.physical) & mask
            if not distance & 0xFFF:
                return distance
    return None


def split_of(address: int) -> int:
    """The PAGE_OFFSET below a 32-bit kernel address: the highest that a kernel can be configured for."""
    return next((split for split in _SPLITS if address >= split), 0)


def is_direct_map(value: int) -> bool:
    """Whether a value can be ``page_offset_base``: canonical, in the kernel's half, 1 GiB aligned."""
    return value >= 0xFF00000000000000 and not value & 0x3FFFFFFF


def direct_map(data: bytes | mmap, sections: Iterable[Section]) -> int | None:
    """The base of the direct mapping that the code of a 64-bit kernel loads as a constant most often."""
    counts = dict.fromkeys(_DIRECT_MAPS, 0)
    for section in sections:
        if section.exec and section.file_size:
            for value in _DIRECT_MAPS:
                # REX.W B8+r imm64: the only instruction with an immediate of 64 bits.
                pattern = value.to_bytes(8, "little")
                for hit in find_all(data, pattern, section.offset, section.offset + section.size, limit=1000):
                    opcode = data[max(hit - 2, 0) : hit]
                    counts[value] += len(opcode) == 2 and opcode[0] in b"\x48\x49" and 0xB8 <= opcode[1] <= 0xBF
    best = max(counts, key=lambda value: counts[value])
    return best if counts[best] else None


def direct_map_of(version: tuple[int, ...]) -> int:
    """What __PAGE_OFFSET a 64-bit kernel of a version has with four levels of page tables."""
    if version >= (4, 20):
        return _DIRECT_MAPS[0]
    return _DIRECT_MAPS[2] if version >= (2, 6, 27) else _DIRECT_MAPS[3]
