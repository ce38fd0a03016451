"""The memory of a machine, out of a raw dump or an ELF core: bytes by physical or virtual address.

Read piecemeal, never mapped whole: a dump may be larger than this machine.
Imports errors and explain.core.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from os import PathLike, fspath
from typing import NamedTuple

from vmipatch.errors import ImageError, UsageError
from vmipatch.explain import core

CHUNK = 1 << 22
PAGE = 4096
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
        head = os.pread(descriptor, 4, 0)
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
        elif head == core.MAGIC:
            found = core.parse(self._file, self.size, self.path)
            self.cr3, self.info, self.missing = found.cr3, found.info, found.missing
            self.virtual = sorted(Region(x.virtual, x.size, x.offset) for x in found.loads if x.virtual is not None)
            self.physical = sorted(Region(x.physical, x.size, x.offset) for x in found.loads if x.physical is not None)
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
        result = b""
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
        return result

    def at(self, offset: int, length: int) -> bytes:
        """Bytes at an offset in the file; fewer at its end."""
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
        offset = 0
        while offset < self.size and limit:
            piece = self.at(offset, CHUNK + overlap)
            hit = piece.find(pattern)
            while hit >= 0 and limit:
                if not (offset + hit) % step:
                    yield offset + hit
                    limit -= 1
                hit = piece.find(pattern, hit + 1)
            offset += CHUNK

    def find_words(self, values: set[int], size: int, limit: int = 64) -> dict[int, list[int]]:
        """Offsets in the file of aligned words of ``size`` bytes, at most ``limit`` for each value; in one pass."""
        found: dict[int, list[int]] = {value: [] for value in values}
        patterns = {value: value.to_bytes(size, "little") for value in values}
        for offset in range(0, self.size, CHUNK):
            piece = self.at(offset, CHUNK)
            shift = -self._phase(offset) % size
            here: set[int] = values
            if len(values) > _FEW:
                body = memoryview(piece)[shift : shift + (len(piece) - shift) // size * size]
                here = values.intersection(body.cast("I" if size == 4 else "Q"))
            for value in here:
                hit = piece.find(patterns[value])
                while hit >= 0 and len(found[value]) < limit:
                    if (hit - shift) % size == 0:
                        found[value].append(offset + hit)
                    hit = piece.find(patterns[value], hit + 1)
        return found

    def _phase(self, offset: int) -> int:
        """What an offset is past an aligned address: a core's segments need not begin aligned in its file."""
        for regions in (self.physical, self.virtual):
            address = self.addresses_of(regions, offset)
            if address is not None:
                return address % 8
        return next((-r.offset % 8 for r in self.physical or self.virtual), 0)

    def addresses_of(self, regions: list[Region], offset: int) -> int | None:
        """The address, in one of the two lists, of the byte at an offset in the file."""
        for region in regions:
            if region.offset <= offset < region.offset + region.size:
                return region.start + offset - region.offset
        return None
