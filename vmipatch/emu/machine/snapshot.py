"""A snapshot of a whole machine, and the way back that touches only what changed.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096
ZEROS = bytes(PAGE)


class SavedMemory:
    """The backing of a machine (RAM, ROMs, machine-owned pages), kept as the pages that hold anything.

    Snapshots of one machine share every page that did not change between them, as one object.
    """

    __slots__ = ("_pages", "length")

    def __init__(self, length: int, pages: Mapping[int, bytes]) -> None:
        """``length`` in bytes; ``pages`` by backing page number, zeros where there is none."""
        self.length = length
        self._pages = pages

    def __len__(self) -> int:
        return self.length

    def page(self, number: int) -> bytes:
        """The 4096 bytes of a backing page."""
        return self._pages.get(number, ZEROS)

    def with_pages(self, length: int, changed: Mapping[int, bytes]) -> SavedMemory:
        """The same memory with some pages changed (and perhaps grown); all others are shared."""
        pages = dict(self._pages)
        for number, content in changed.items():
            if content == ZEROS:
                pages.pop(number, None)
            elif pages.get(number) != content:
                pages[number] = content
        return SavedMemory(length, pages)

    def unlike(self, other: SavedMemory) -> Iterator[int]:
        """Numbers of the pages that are not one object in both: all that differ are among them."""
        mine, others = self._pages, other._pages
        for number, content in mine.items():
            if others.get(number) is not content:
                yield number
        for number in others:
            if number not in mine:
                yield number

    @property
    def held(self) -> int:
        """How many pages hold anything."""
        return len(self._pages)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that decides what a machine does next.

    ``memory`` is the whole backing; the other fields are opaque to all but the parts that made them.
    """

    memory: SavedMemory = field(repr=False)
    processor: Any = field(repr=False)
    board: Any = field(repr=False)
    personality: Any = field(repr=False)
    instructions: int
    serial_length: int
    debug_length: int
