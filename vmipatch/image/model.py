"""The parts of a kernel image: sections, segments and the map between addresses and file offsets.

Imports nothing of the package but the errors.  Addresses are virtual unless a
name says physical; offsets are bytes into :attr:`Image.data`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vmipatch.errors import AddressError

# ELF gABI, chapter 4 "Sections" (sh_type, sh_flags) and chapter 5 "Program Header" (p_type, p_flags).
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL = 1, 2, 3, 4, 8, 9
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Section:
    """One section header; ``offset`` and ``size`` are bytes.  A NOBITS section has no bytes in the file.

    ``is_data`` marks a section that holds no instructions although its flags say so (:func:`without_data`).
    """

    name: str
    address: int
    offset: int
    size: int
    flags: int
    type: int
    link: int = 0
    info: int = 0
    align: int = 1
    entry_size: int = 0
    index: int = 0
    is_data: bool = False

    @property
    def end(self) -> int:
        """The address just after the section."""
        return self.address + self.size

    @property
    def alloc(self) -> bool:
        """Part of the running kernel's memory."""
        return bool(self.flags & SHF_ALLOC)

    @property
    def write(self) -> bool:
        """Writable by its flags."""
        return bool(self.flags & SHF_WRITE)

    @property
    def exec(self) -> bool:
        """Holds instructions: executable by its flags, and not data by where it lies."""
        return bool(self.flags & SHF_EXECINSTR) and not self.is_data

    @property
    def may_hold_code(self) -> bool:
        """Executable by its flags, data or not: ``.data`` of 7.x holds the code that kexec copies away."""
        return bool(self.flags & SHF_EXECINSTR)

    @property
    def file_size(self) -> int:
        """Bytes that the section has in the file: 0 for NOBITS."""
        return 0 if self.type == SHT_NOBITS else self.size

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass(frozen=True, slots=True)
class Segment:
    """One PT_LOAD header: ``file_size`` bytes at ``offset`` go to ``address`` (virtual), ``physical``."""

    address: int
    physical: int
    offset: int
    file_size: int
    memory_size: int
    flags: int

    @property
    def end(self) -> int:
        """The virtual address just after the segment in memory."""
        return self.address + self.memory_size

    @property
    def exec(self) -> bool:
        """Executable by its flags."""
        return bool(self.flags & PF_X)


def without_data(sections: Iterable[Section], segments: Iterable[Segment]) -> tuple[Section, ...]:
    """The sections, those marked as data that only their own header calls executable.

    From Linux 6.18 on the linker gives ``.data`` the flag, seen with it in 6.18, 7.2 and 7.3; the segment that it is
    loaded by stays without, as its pages do.  ``.init.text`` lies in such a segment too, but nobody writes to it.
    """
    plain = [(s.address, s.end) for s in segments if not s.exec]
    return tuple(
        replace(s, is_data=True)
        if s.write and s.exec and any(start <= s.address and s.end <= end for start, end in plain)
        else s
        for s in sections
    )


class AddressMap:
    """Ranges of one address space laid over another: ``(start, other, length)`` each.

    Used both ways (virtual to offset, offset to virtual, virtual to physical).
    Where ranges overlap, the one that starts last answers.
    """

    __slots__ = ("_ranges", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        self._ranges = sorted(r for r in ranges if r[2] > 0)
        self._starts = [r[0] for r in self._ranges]

    def find(self, position: int, length: int = 1) -> int | None:
        """Where ``length`` bytes from ``position`` lie on the other side, if one range holds them all."""
        i = bisect_right(self._starts, position) - 1
        if i < 0:
            return None
        start, other, size = self._ranges[i]
        if position - start + length > size:
            return None
        return other + position - start

    def around(self, position: int) -> tuple[int, int, int] | None:
        """Of the range that answers for a position: first and end of what it answers for alone, and what to add."""
        i = bisect_right(self._starts, position) - 1
        if i < 0:
            return None
        start, other, size = self._ranges[i]
        stop = min([start + size, *self._starts[i + 1 : i + 2]])
        return (start, stop, other - start) if position < stop else None


class SectionMap:
    """Which section is in memory at an address."""

    __slots__ = ("_placed", "_starts")

    def __init__(self, sections: Iterable[Section]) -> None:
        self._placed = sorted((s for s in sections if s.alloc and s.size), key=lambda s: s.address)
        self._starts = [s.address for s in self._placed]

    def at(self, address: int) -> Section | None:
        """The section, or None; where sections overlap, the one that starts last is asked."""
        i = bisect_right(self._starts, address) - 1
        return self._placed[i] if i >= 0 and address in self._placed[i] else None


def no_bytes(address: int, length: int, *, file: str) -> AddressError:
    """The error for an address without bytes in the file."""
    what = "no byte" if length == 1 else f"not all of {length} bytes"
    return AddressError(f"{what} of the image at this address", file=file, address=address)
