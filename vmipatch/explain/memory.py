"""The memory of a machine, out of a raw dump, an ELF core or a compressed kdump: bytes by physical or virtual address.

Read piecemeal, never mapped whole: a dump may be larger than this machine.
Imports errors and the formats: explain.core, explain.diskdump.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from os import PathLike, fspath
from typing import NamedTuple

from vmipatch.errors import ImageError, UsageError
from vmipatch.explain import core, diskdump

CHUNK = 1 << 22
PAGE = 4096
_MOST_VIRTUAL = 1 << 34
_PAST = 1 << 65
_FEW = 10
"""Values that are searched for one by one; more of them are looked up word by word."""


class Region(NamedTuple):
    """``size`` bytes from ``start`` (virtual or physical), at ``offset`` in the file."""

    start: int
    size: int
    offset: int


class Memory:
    """The bytes of a dump.

    ``raw`` is True for a raw dump, whose base may be of either kind: the regions
    are then in both lists.  ``cr3`` and ``info`` are what a core's notes say;
    ``missing`` is how many bytes its headers name past the end of the file.
    """

    def __init__(self, path: str | PathLike[str], base: int | None = None) -> None:
        self.path = fspath(path)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(f"cannot read the memory: {error.strerror}", file=self.path) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ImageError("not a regular file", file=self.path)
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        # The size of /proc/kcore is what it could have.
        self.size = status.st_size
        if not self.size:
            raise ImageError("the dump is empty", file=self.path, offset=0)
        head = os.pread(descriptor, 16, 0)
        self._pages: diskdump.Pages | None = None
        self.cr3: tuple[int, ...] = ()
        self.info: dict[str, str] = {}
        self.missing = 0
        self.raw = base is not None
        if base is not None:
            if base < 0 or base + self.size > 1 << 64:
                raise UsageError(f"{self.size} bytes do not fit at address {base:#x}", file=self.path)
            if base % PAGE:
                said = f"{base:#x} lies {base % PAGE:#x} bytes past a page boundary"
                raise UsageError(f"not page-aligned: memory is dumped in whole pages, and {said}", file=self.path)
            whole = Region(base, self.size, 0)
            self.virtual, self.physical = [whole], [whole]
        elif head.startswith(core.MAGIC):
            found = core.parse(self._file, self.size, self.path)
            self.cr3, self.info, self.missing = found.cr3, found.info, found.missing
            virtual = [Region(x.virtual, x.size, x.offset) for x in found.loads if x.virtual is not None]
            physical = [Region(x.physical, x.size, x.offset) for x in found.loads if x.physical is not None]
            self.virtual, self.physical = _apart(virtual), _apart(physical)
        elif head.startswith((diskdump.MAGIC, diskdump.FLATTENED)):
            read, size = self._in_file, self.size
            if head.startswith(diskdump.FLATTENED):
                flat = diskdump.Flattened(read, size, self.path)
                read, size = flat.read, flat.size
            header = diskdump.parse(read, size, self.path)
            self.cr3, self.info, self.missing = header.cr3, header.info, header.missing
            self._pages = diskdump.Pages(read, header, self.path)
            self.size = header.pages * PAGE
            self.virtual, self.physical = [], []
            at = 0
            for frame, count in header.frames:
                self.physical.append(Region(frame * PAGE, count * PAGE, at))
                at += count * PAGE
        else:
            raise UsageError("raw memory needs the address that it begins at: give --base", file=self.path)
        self._starts = {id(r): [x.start for x in r] for r in (self.virtual, self.physical)}

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read_virtual(self, address: int, length: int) -> bytes | None:
        """Bytes at a virtual address that the dump itself names; None unless it has them all."""
        return self._read(self.virtual, address, length)

    def read_physical(self, address: int, length: int) -> bytes | None:
        """Bytes at a physical address; None unless the dump has them all."""
        return self._read(self.physical, address, length)

    def has(self, regions: list[Region], address: int, length: int) -> int:
        """How many of ``length`` bytes at an address the dump has before the first that it lacks."""
        found = 0
        while found < length:
            part = self._region(regions, address + found)
            if part is None:
                break
            found += part.start + part.size - address - found
        return min(found, length)

    def _region(self, regions: list[Region], address: int) -> Region | None:
        i = bisect_right(self._starts[id(regions)], address) - 1
        if i < 0 or address >= regions[i].start + regions[i].size:
            return None
        return regions[i]

    def _read(self, regions: list[Region], address: int, length: int) -> bytes | None:
        result = bytearray()
        while len(result) < length:
            at = address + len(result)
            region = self._region(regions, at)
            if region is None:
                return None
            size = min(length - len(result), region.start + region.size - at)
            piece = self.at(region.offset + at - region.start, size)
            if len(piece) < size:
                return None
            result += piece
        return bytes(result)

    def at(self, offset: int, length: int) -> bytes:
        """Bytes at an offset in the file (of a compressed one: in its pages); fewer at the end."""
        return self._in_file(offset, length) if self._pages is None else self._pages.read(offset, length)

    def _in_file(self, offset: int, length: int) -> bytes:
        pieces = []
        while length > 0:
            piece = os.pread(self._file.fileno(), length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def find(self, pattern: bytes, limit: int, *, step: int = 1) -> Iterator[int]:
        """Offsets in the file of a pattern, ascending, at most ``limit``, at multiples of ``step``."""
        overlap = len(pattern) - 1
        for start, stop, _ in self._spans:
            for offset in range(start, stop, CHUNK):
                piece = self.at(offset, min(CHUNK + overlap, stop - offset))
                hit = piece.find(pattern)
                while hit >= 0 and limit:
                    if not (offset + hit) % step:
                        yield offset + hit
                        limit -= 1
                    hit = piece.find(pattern, hit + 1)
                if not limit or not piece:
                    break

    def find_words(self, values: set[int], size: int, limit: int = 64) -> dict[int, list[int]]:
        """Offsets in the file of words of ``size`` bytes at aligned addresses, at most ``limit`` for each value."""
        found: dict[int, list[int]] = {value: [] for value in values}
        patterns = {value: value.to_bytes(size, "little") for value in values}
        for start, stop, address in self._spans:
            for offset in range(start + -address % size, stop, CHUNK):
                piece = self.at(offset, min(CHUNK, stop - offset))
                here: set[int] = values
                if len(values) > _FEW:
                    body = memoryview(piece)[: len(piece) // size * size]
                    here = values.intersection(body.cast("I" if size == 4 else "Q"))
                for value in here:
                    hit = piece.find(patterns[value])
                    while hit >= 0 and len(found[value]) < limit:
                        if hit % size == 0:
                            found[value].append(offset + hit)
                        hit = piece.find(patterns[value], hit + 1)
                if not piece:
                    break
        return found

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """What is searched: start and end in the file, and the address there; what adjoins is one.

        Not the largest of the segments without a physical address: /proc/kcore names all the space that modules and
        vmalloc may use.
        """
        few = [r for r in self.virtual if r.size <= _MOST_VIRTUAL]
        spans: list[tuple[int, int, int]] = []
        for offset, size, address in _disjoint([*self.physical, *few]):
            if spans and spans[-1][1] == offset and spans[-1][2] + offset - spans[-1][0] == address:
                spans[-1] = (spans[-1][0], offset + size, spans[-1][2])
            else:
                spans.append((offset, offset + size, address))
        return spans

    def all_addresses(self, regions: list[Region], offset: int) -> Iterator[int]:
        """Every address, in one of the two lists, of the byte at an offset: virtual memory may have several."""
        return (r.start + offset - r.offset for r in regions if r.offset <= offset < r.offset + r.size)

    def addresses_of(self, regions: list[Region], offset: int) -> int | None:
        """The address, in one of the two lists, of the byte at an offset; the first where it has several."""
        order = self._by_offset[id(regions)]
        i = bisect_right(order, (offset, _PAST, 0)) - 1
        if i < 0:
            return None
        start, size, address = order[i]
        return address + offset - start if offset < start + size else None

    @cached_property
    def _by_offset(self) -> dict[int, list[tuple[int, int, int]]]:
        return {id(x): _disjoint(x) for x in (self.virtual, self.physical)}


def _apart(regions: list[Region]) -> list[Region]:
    """Regions by address without what another has already: a page that is mapped twice is in a core twice."""
    result: list[Region] = []
    end = 0
    for start, _, size, offset in sorted((r.start, -r.size, r.size, r.offset) for r in regions):
        if start + size > end:
            known = max(0, end - start)
            result.append(Region(start + known, size - known, offset + known))
            end = start + size
    return result


def _disjoint(regions: list[Region]) -> list[tuple[int, int, int]]:
    """The parts of a file that regions name, each once: offset, size and address, by offset."""
    parts: list[tuple[int, int, int]] = []
    end = 0
    for offset, _, size, address in sorted((r.offset, -r.size, r.size, r.start) for r in regions):
        if offset + size > end:
            known = max(0, end - offset)
            parts.append((offset + known, size - known, address + known))
            end = offset + size
    return parts
