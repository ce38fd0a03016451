"""Guest-physical memory: one backing buffer, a page map over it, and a log of written pages.

May import words.  Addresses: *physical* is what the guest's paging yields;
*backing* is an offset into the one host buffer that holds RAM, ROM images and
the pages that only a hypervisor owns.  Several physical pages may show one
backing page (the aliases below 1 MiB do).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

from vmipatch.emu.cpu.words import COMPILED, p8, p32, u32, zeros8, zeros32
from vmipatch.errors import EmulatorError

PAGE = 4096
PHYSICAL_PAGES = 0x100000  # 4 GiB

# Low bits of a page-map entry (the backing page number is above them); 0 is "the bus answers".
MAP_READ = 1
MAP_WRITE = 2

HOOKED = 1  # page_flags: writes by the guest leave the engine with PAGE_WRITE

address_of: Any = None
release: Any = None


class Memory:
    """The memory of one machine; several processors may share it."""

    mapping: object
    buffer: object
    cores: object
    host: p8
    pages: p32
    dirty: p8
    page_flags: p8
    code_bits: p32
    dirty_list: p32
    dirty_count: u32
    total_pages: u32
    next_page: u32
    scratch: u32
    ram_bytes: object

    def __init__(self, ram_bytes: int, reserve_bytes: int = 64 << 20) -> None:
        """Backing of ``ram_bytes`` from offset 0, and room for :meth:`allocate` behind it.

        Nothing is mapped yet.  Raises EmulatorError for a size that is not a
        positive multiple of 4096 or does not fit.
        """
        if ram_bytes <= 0 or ram_bytes % PAGE or reserve_bytes % PAGE:
            raise EmulatorError(f"memory of {ram_bytes} bytes is not a whole number of 4 KiB pages")
        if ram_bytes + reserve_bytes >= 1 << 32:
            raise EmulatorError(f"memory of {ram_bytes} bytes does not fit in 32-bit addresses")
        self.ram_bytes = ram_bytes
        self.total_pages = (ram_bytes + reserve_bytes) // PAGE + 1
        self.next_page = ram_bytes // PAGE
        self.scratch = (self.total_pages - 1) * PAGE
        self.mapping = mmap.mmap(-1, self.total_pages * PAGE)
        self.buffer = memoryview(self.mapping)
        if COMPILED:
            self.host = address_of(self.mapping)
        else:
            self.host = self.buffer  # type: ignore[assignment]
        self.pages = zeros32(PHYSICAL_PAGES)
        self.dirty = zeros8(self.total_pages)
        self.page_flags = zeros8(self.total_pages)
        self.code_bits = zeros32(self.total_pages)
        self.dirty_list = zeros32(self.total_pages)
        self.dirty_count = 0
        self.cores = []

    def __dealloc__(self) -> None:
        if COMPILED:
            release(self.pages)
            release(self.dirty)
            release(self.page_flags)
            release(self.code_bits)
            release(self.dirty_list)

    def allocate(self, length: int) -> int:
        """New zeroed backing of at least ``length`` bytes; its page-aligned backing offset."""
        count: int = (length + PAGE - 1) // PAGE
        if length <= 0 or self.next_page + count >= self.total_pages:
            raise EmulatorError(f"no room for {length} more bytes of machine-owned memory")
        offset: int = self.next_page * PAGE
        self.next_page += count
        return offset

    def map(self, physical: int, length: int, backing: int, *, readable: bool = True, writable: bool = True) -> None:
        """Show backing bytes at a physical address; all three multiples of 4096."""
        if (physical | length | backing) % PAGE or length < 0 or physical < 0 or backing < 0:
            raise EmulatorError("a memory window that is not page-aligned", address=physical)
        if physical + length > 1 << 32 or backing + length > self.scratch:
            raise EmulatorError("a memory window past the end of memory", address=physical)
        low: int = (MAP_READ if readable else 0) | (MAP_WRITE if writable else 0)
        page: int
        for page in range(length // PAGE):
            self.pages[physical // PAGE + page] = (backing // PAGE + page) << 2 | low
        self._changed()

    def unmap(self, physical: int, length: int) -> None:
        """Send accesses to these pages to the bus."""
        if (physical | length) % PAGE or physical < 0 or length < 0 or physical + length > 1 << 32:
            raise EmulatorError("a memory window that is not page-aligned", address=physical)
        page: int
        for page in range(length // PAGE):
            self.pages[physical // PAGE + page] = 0
        self._changed()

    def backing_of(self, physical: int) -> int:
        """The backing offset shown at a physical address, or -1 where the bus answers."""
        if not 0 <= physical < 1 << 32:
            return -1
        entry: int = self.pages[physical // PAGE]
        return -1 if entry == 0 else (entry >> 2) * PAGE + physical % PAGE

    def read(self, physical: int, length: int) -> bytes:
        """Bytes through the map, without side effects; 0xFF where the bus would answer."""
        parts: list[bytes] = []
        while length > 0:
            size: int = min(length, PAGE - physical % PAGE)
            at: int = self.backing_of(physical)
            parts.append(b"\xff" * size if at < 0 else bytes(self.buffer[at : at + size]))  # type: ignore[index]
            physical += size
            length -= size
        return b"".join(parts)

    def write(self, physical: int, data: bytes) -> None:
        """Store through the map, read-only pages included; bytes for the bus are dropped."""
        done: int = 0
        while done < len(data):
            size: int = min(len(data) - done, PAGE - (physical + done) % PAGE)
            at: int = self.backing_of(physical + done)
            if at >= 0:
                self.write_backing(at, data[done : done + size])
            done += size

    def write_backing(self, offset: int, data: bytes) -> None:
        """Store at a backing offset; marks the pages written and drops code decoded from them."""
        if offset < 0 or offset + len(data) > self.scratch:
            raise EmulatorError("a write past the end of the backing memory", offset=offset)
        self.buffer[offset : offset + len(data)] = data  # type: ignore[index]
        page: int
        for page in range(offset // PAGE, (offset + len(data) + PAGE - 1) // PAGE):
            self.mark_dirty(page)
            if self.code_bits[page] != 0:
                for core in self.cores:  # type: ignore[attr-defined]
                    core.forget_page(page)

    @property
    def used(self) -> int:
        """Bytes of backing handed out: RAM and every allocation."""
        return self.next_page * PAGE

    def read_backing(self, offset: int, length: int) -> bytes:
        """Bytes of the backing buffer."""
        if offset < 0 or length < 0 or offset + length > self.scratch:
            raise EmulatorError("a read past the end of the backing memory", offset=offset)
        return bytes(self.buffer[offset : offset + length])  # type: ignore[index]

    def restore_pages(self, saved: Any, pages: Iterable[int]) -> None:
        """Copy backing pages back from a saved memory, whose ``page(number)`` gives the 4096 bytes of each."""
        for page in pages:
            start: int = page * PAGE
            if page < 0 or start + PAGE > self.scratch:
                raise EmulatorError("a page past the end of the backing memory", offset=start)
            self.buffer[start : start + PAGE] = saved.page(page)  # type: ignore[index]
            self.mark_dirty(page)
            if self.code_bits[page] != 0:
                for core in self.cores:  # type: ignore[attr-defined]
                    core.forget_page(page)

    def mark_dirty(self, page: int) -> None:
        """Log a backing page as written."""
        if self.dirty[page] == 0:
            self.dirty[page] = 1
            self.dirty_list[self.dirty_count] = page
            self.dirty_count += 1

    def dirty_pages(self) -> list[int]:
        """Backing page numbers written since :meth:`clear_dirty`, in order of first write."""
        return [self.dirty_list[index] for index in range(self.dirty_count)]

    def clear_dirty(self) -> None:
        """Start a new log."""
        index: int
        for index in range(self.dirty_count):
            self.dirty[self.dirty_list[index]] = 0
        self.dirty_count = 0
        for core in self.cores:  # type: ignore[attr-defined]
            core.slow_writes()

    def hook_page(self, page: int, hooked: bool) -> None:
        """Make guest writes to a backing page leave the engine (or not)."""
        self.page_flags[page] = HOOKED if hooked else 0
        for core in self.cores:  # type: ignore[attr-defined]
            core.slow_writes()

    def _changed(self) -> None:
        for core in self.cores:  # type: ignore[attr-defined]
            core.flush()
