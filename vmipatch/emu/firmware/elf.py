"""The program headers of an ELF32 file, for loading: no sections, no symbols.

May import ``vmipatch.errors``.  Facts: System V ABI, chapter 5 (program
header), and the note layout of the same chapter.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmipatch.errors import EmulatorError

PT_LOAD, PT_NOTE = 1, 4
EM_386 = 3
MAX_HEADERS = 512


@dataclass(frozen=True)
class Segment:
    """One loadable segment: file bytes and where they go (virtual and physical address)."""

    virtual: int
    physical: int
    data: bytes
    memory_size: int


@dataclass(frozen=True)
class Executable:
    """What a loader needs of an ELF32 executable; ``entry`` as in the file."""

    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[tuple[str, int, bytes], ...]

    def physical_entry(self) -> int:
        """The entry point as a physical address.

        Linux gives a physical one already; others give a virtual one, which
        the segment that holds it translates.
        """
        for segment in self.segments:
            if 0 <= self.entry - segment.physical < segment.memory_size:
                return self.entry
        for segment in self.segments:
            if 0 <= self.entry - segment.virtual < segment.memory_size:
                return self.entry - segment.virtual + segment.physical
        return self.entry


def parse(data: bytes, file: str) -> Executable:
    """Read an ELF32 i386 executable; raises :class:`EmulatorError` for anything else."""
    if data[:4] != b"\x7fELF":
        raise EmulatorError("not an ELF file", file=file)
    if data[4:6] != b"\x01\x01" or len(data) < 52:
        raise EmulatorError("not a 32-bit little-endian ELF file; the machine is an i386", file=file)
    (kind, machine, _, entry, phoff, _, _, _, phentsize, phnum) = struct.unpack_from("<HHIIIIIHHH", data, 16)
    if kind != 2 or machine != EM_386:
        raise EmulatorError("not an i386 executable", file=file)
    if phentsize != 32 or not 0 < phnum <= MAX_HEADERS or phoff + 32 * phnum > len(data):
        raise EmulatorError("the program headers are damaged", file=file, offset=phoff)
    segments: list[Segment] = []
    notes: list[tuple[str, int, bytes]] = []
    for index in range(phnum):
        at = phoff + 32 * index
        ptype, offset, virtual, physical, filesz, memsz, _, _ = struct.unpack_from("<8I", data, at)
        if ptype not in (PT_LOAD, PT_NOTE):
            continue
        if offset + filesz > len(data):
            raise EmulatorError("a segment lies past the end of the file", file=file, offset=at)
        if ptype == PT_NOTE:
            notes += _notes(data[offset : offset + filesz])
        elif memsz:
            if filesz > memsz:
                raise EmulatorError("a segment is larger in the file than in memory", file=file, offset=at)
            segments.append(Segment(virtual, physical, bytes(data[offset : offset + filesz]), memsz))
    if not segments:
        raise EmulatorError("nothing to load", file=file)
    return Executable(entry, tuple(segments), tuple(notes))


def _notes(data: bytes) -> list[tuple[str, int, bytes]]:
    found = []
    at = 0
    while at + 12 <= len(data):
        namesz, descsz, kind = struct.unpack_from("<III", data, at)
        name_at, desc_at = at + 12, at + 12 + (namesz + 3 & ~3)
        if desc_at + descsz > len(data):
            break
        name = data[name_at : name_at + namesz].rstrip(b"\0").decode("ascii", "replace")
        found.append((name, kind, data[desc_at : desc_at + descsz]))
        at = desc_at + (descsz + 3 & ~3)
    return found
