"""The memory of a running kernel by its own virtual addresses, page by page and each page fetched once.

Walking page tables for every word costs more than all else that is done with modules.  Imports its sisters in
``explain/``.
"""

from __future__ import annotations

from vmipatch.explain.memory import PAGE
from vmipatch.explain.running import Running

_MOST_PAGES = 8192
"""Pages that are kept: 32 MiB."""


class View:
    """Reads what a running kernel would read; addresses are virtual ones of the running kernel."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.size = running.image.bits // 8
        self.mask = (1 << running.image.bits) - 1
        self._pages: dict[int, bytes | None] = {}

    def read(self, address: int, length: int) -> bytes | None:
        """Bytes; None where the dump lacks any of them or nothing is mapped."""
        address &= self.mask
        start = address % PAGE
        if start + length <= PAGE:
            page = self._page(address - start)
            return self.running.read_running(address, length) if page is None else page[start : start + length]
        pieces = []
        left = length
        while left > 0:
            count = min(left, PAGE - address % PAGE)
            piece = self.read(address, count)
            if piece is None:
                return None
            pieces.append(piece)
            address, left = address + count, left - count
        return b"".join(pieces)

    def _page(self, address: int) -> bytes | None:
        if address not in self._pages:
            if len(self._pages) >= _MOST_PAGES:
                self._pages.clear()
            self._pages[address] = self.running.read_running(address, PAGE)
        return self._pages[address]

    def word(self, address: int) -> int | None:
        """A pointer-sized word."""
        data = self.read(address, self.size)
        return None if data is None else int.from_bytes(data, "little")

    def int32(self, address: int) -> int | None:
        """A signed number of 32 bits."""
        data = self.read(address, 4)
        return None if data is None else int.from_bytes(data, "little", signed=True)

    def words(self, data: bytes) -> memoryview:
        """The pointer-sized words of some bytes."""
        return memoryview(data[: len(data) // self.size * self.size]).cast("I" if self.size == 4 else "Q")

    def text(self, address: int, most: int) -> str | None:
        """A string that ends within ``most`` bytes; None where there is none."""
        result = b""
        while len(result) < most:
            at = (address + len(result)) & self.mask
            piece = self.read(at, min(most - len(result), PAGE - at % PAGE))
            if piece is None:
                return None
            result += piece
            if b"\0" in piece:
                break
        found, ended, _ = result.partition(b"\0")
        return found.decode("ascii", "backslashreplace") if ended else None

    def listed(self, head: int, most: int) -> list[int]:
        """The nodes of a ``struct list_head`` list, at most so many, up to the first that cannot be read."""
        result: list[int] = []
        seen = {head}
        at = self.word(head)
        while at and at not in seen and len(result) < most and not at % self.size:
            seen.add(at)
            result.append(at)
            at = self.word(at)
        return result
