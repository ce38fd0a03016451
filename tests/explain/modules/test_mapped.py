"""Executable memory by page tables that were laid down by hand."""

from __future__ import annotations

import struct

from vmipatch.explain.modules.mapped import Run, executable
from vmipatch.explain.paging import MODES

FOUR, FIVE = MODES[64]
PLAIN, PAE = MODES[32]
NX = 1 << 63
P, LARGE = 1, 0x80


class Tables:
    """Physical memory with page tables in it."""

    def __init__(self, entry: int = 8) -> None:
        self.pages: dict[int, bytearray] = {}
        self._entry = entry
        self.reads = 0

    def set(self, table: int, index: int, entry: int) -> None:
        page = self.pages.setdefault(table, bytearray(4096))
        struct.pack_into("<Q" if self._entry == 8 else "<I", page, index * self._entry, entry)

    def read(self, address: int, length: int) -> bytes | None:
        self.reads += 1
        page = self.pages.get(address & ~0xFFF)
        return None if page is None else bytes(page[address & 0xFFF : (address & 0xFFF) + length])


def test_small_large_and_forbidden_pages() -> None:
    t = Tables()
    t.set(0x1000, 511, 0x2000 | P)
    t.set(0x1000, 3, 0x2000 | P)  # a process's half: not asked for
    t.set(0x2000, 510, 0x3000 | P)
    t.set(0x2000, 511, 0x9000 | P | NX)  # all below is data
    t.set(0x3000, 8, 0x1000000 | P | LARGE)
    t.set(0x3000, 9, 0x1200000 | P | LARGE | NX)
    t.set(0x3000, 10, 0x4000 | P)
    t.set(0x4000, 0, 0x7000 | P)
    t.set(0x4000, 1, 0x8000 | P)
    t.set(0x4000, 2, 0x9000 | P | NX)
    t.set(0x4000, 511, 0xA000 | P)
    t.set(0x4000, 4, 0xA000)  # not present
    found = executable(t.read, 0x1000, FOUR, 1 << 63)
    base = 0xFFFFFFFF80000000
    assert found.whole
    assert found.runs == [
        Run(base + 8 * 0x200000, 0x200000),
        Run(base + 10 * 0x200000, 0x2000),
        Run(base + 11 * 0x200000 - 0x1000, 0x1000),
    ]


def test_five_levels() -> None:
    t = Tables()
    t.set(0x1000, 511, 0x2000 | P)
    t.set(0x2000, 511, 0x3000 | P)
    t.set(0x3000, 510, 0x4000 | P)
    t.set(0x4000, 0, 0x5000 | P)
    t.set(0x5000, 7, 0x6000 | P)
    assert executable(t.read, 0x1000, FIVE, 1 << 63).runs == [Run(0xFFFFFFFF80007000, 0x1000)]


def test_pae_and_two_levels() -> None:
    t = Tables()
    t.set(0x1000, 3, 0x2000 | P)
    t.set(0x2000, 1, 0x3000 | P)
    t.set(0x3000, 5, 0x9000 | P)
    t.set(0x3000, 6, 0x9000 | P | NX)
    assert executable(t.read, 0x1000, PAE, 0xC0000000).runs == [Run(0xC0205000, 0x1000)]
    t = Tables(4)
    t.set(0x1000, 0x300, 0x400000 | P | LARGE)
    t.set(0x1000, 0x301, 0x2000 | P)
    t.set(0x2000, 0, 0x9000 | P)
    assert executable(t.read, 0x1000, PLAIN, 0xC0000000).runs == [Run(0xC0000000, 0x401000)]


def test_a_table_that_leads_to_itself_ends() -> None:
    t = Tables()
    for i in range(512):
        t.set(0x1000, i, 0x1000 | P)
    found = executable(t.read, 0x1000, FOUR, 1 << 63)
    assert t.reads <= len(FOUR.shifts)
    # Each entry of the last level is a page.
    assert sum(r.size for r in found.runs) <= 1 << 47


def test_tables_that_are_not_there_are_said() -> None:
    t = Tables()
    t.set(0x1000, 511, 0x2000 | P)
    t.set(0x1000, 510, 0xDEAD000 | P)
    t.set(0x2000, 511, 0x3000 | P)
    t.set(0x3000, 0, P | LARGE)
    found = executable(t.read, 0x1000, FOUR, 1 << 63)
    assert not found.whole
    assert [r.address for r in found.runs] == [0xFFFFFFFFC0000000]


def test_a_flood_of_runs_is_cut() -> None:
    t = Tables()
    t.set(0x1000, 511, 0x2000 | P)
    for i in range(512):
        t.set(0x2000, i, 0x3000 | P)
        t.set(0x3000, i, 0x4000 | P)
        t.set(0x4000, i, (0x5000 | P) if i % 2 else 0)
    found = executable(t.read, 0x1000, FOUR, 1 << 63)
    assert not found.whole
    assert len(found.runs) < 1 << 18
