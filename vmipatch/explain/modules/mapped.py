"""All executable memory of a running kernel, by its page tables.

Intel SDM vol. 3, "Paging": a page can be executed unless an entry on the way to it says XD.  Tables are
a guest's word: one that leads back to itself, or to a million pages, is bounded.
Imports its sisters in ``explain/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmipatch.explain.paging import Mode, Read

_PRESENT, _LARGE, _NO_EXECUTE = 1, 0x80, 1 << 63
_ADDRESS = 0x000FFFFFFFFFF000
_MOST_TABLES = 1 << 17
MOST_RUNS = 1 << 16


class Run(NamedTuple):
    """``size`` bytes from virtual ``address`` that can be executed."""

    address: int
    size: int


class Executable(NamedTuple):
    """``runs`` in ascending order; ``whole`` is False where some tables are not in the dump or there was no end."""

    runs: list[Run]
    whole: bool


def executable(read: Read, root: int, mode: Mode, low: int) -> Executable:
    """Every executable run at and above the virtual address ``low`` (where the kernel's half begins)."""
    walk = _Walk(read, mode)
    found = walk.table(root, 0)
    width = mode.shifts[0] + (mode.root_entries - 1).bit_length()
    high = (1 << 64) - (1 << width) if mode.entry == 8 and width in (48, 57) else 0
    runs: list[Run] = []
    for start, size in found:
        address = start | high if high and start >> (width - 1) else start
        if address + size <= low:
            continue
        cut = max(0, low - address)
        address, size = address + cut, size - cut
        if runs and runs[-1].address + runs[-1].size == address:
            runs[-1] = Run(runs[-1].address, runs[-1].size + size)
        else:
            runs.append(Run(address, size))
    return Executable(runs, walk.whole)


class _Walk:
    def __init__(self, read: Read, mode: Mode) -> None:
        self._read = read
        self._mode = mode
        self._known: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        self.whole = True

    def table(self, physical: int, level: int) -> tuple[tuple[int, int], ...]:
        """What is executable below a table: offsets from the start of what it maps, and sizes; each table once."""
        key = physical, level
        if key in self._known:
            return self._known[key]
        if len(self._known) >= _MOST_TABLES:
            self.whole = False
            return ()
        # A table that leads to itself has nothing in it the second time.
        self._known[key] = ()
        self._known[key] = self._entries(physical, level)
        return self._known[key]

    def _entries(self, physical: int, level: int) -> tuple[tuple[int, int], ...]:
        mode = self._mode
        shift = mode.shifts[level]
        last = level == len(mode.shifts) - 1
        count = mode.root_entries if level == 0 else 4096 // mode.entry
        data = self._read(physical, count * mode.entry)
        if data is None:
            self.whole = False
            return ()
        result: list[tuple[int, int]] = []
        add = _adder(result)
        for i, entry in enumerate(memoryview(data).cast("Q" if mode.entry == 8 else "I")):
            # In the top level of PAE the bit is reserved.
            if not entry & _PRESENT or (entry & _NO_EXECUTE and not (mode.name == "PAE" and level == 0)):
                continue
            large = entry & _LARGE and shift in (21, 22, 30) and not (mode.name == "PAE" and level == 0)
            if last or large:
                add(i << shift, 1 << shift)
                continue
            base = entry & (_ADDRESS if mode.entry == 8 else 0xFFFFF000)
            for start, size in self.table(base, level + 1):
                add((i << shift) + start, size)
            if len(result) > MOST_RUNS:
                self.whole = False
                break
        return tuple(result)


def _adder(result: list[tuple[int, int]]) -> Callable[[int, int], None]:
    """Appends a run, to the one before it where they touch."""

    def add(start: int, size: int) -> None:
        if result and result[-1][0] + result[-1][1] == start:
            result[-1] = result[-1][0], result[-1][1] + size
        else:
            result.append((start, size))

    return add
