"""The kernel's text while it is being patched: the image with what earlier patches wrote laid over it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import lt

from vmipatch.annotate import Site
from vmipatch.image import Image

_PAGE_BITS = 12
_PAGE = 1 << _PAGE_BITS


class Text:
    """Reads the image's bytes through the patches made so far."""

    def __init__(self, image: Image) -> None:
        self.image = image
        # Copies of the pages that were written to, by their number in the image's bytes.
        self._pages: dict[int, bytearray] = {}
        # A whole table that was written, and the pages that have their part of it: few are looked at again.
        self._table: tuple[Sequence[int], Sequence[bytes], int] | None = None
        self._settled: set[int] = set()

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a virtual address as they are now; :class:`AddressError` outside the image."""
        if length <= 0:
            return b""
        offset = self.image.locate(address, length)
        number, at = divmod(offset, _PAGE)
        if at + length > _PAGE:
            rest = _PAGE - at
            return self.read(address, rest) + self.read(address + rest, length - rest)
        if self._table is not None:
            self._settle(number)
        page = self._pages.get(number)
        return bytes(self.image.memory[offset : offset + length] if page is None else page[at : at + length])

    def write(self, address: int, new: bytes) -> None:
        """Lay bytes over the image at a virtual address; :class:`AddressError` outside it."""
        length = len(new)
        if not length:
            return
        number, at = divmod(self.image.locate(address, length), _PAGE)
        if at + length > _PAGE:
            rest = _PAGE - at
            self.write(address, new[:rest])
            self.write(address + rest, new[rest:])
            return
        if self._table is not None:
            self._settle(number)
        self._page(number)[at : at + length] = new

    def write_all(self, places: Iterable[tuple[int, bytes]]) -> None:
        """What :meth:`write` does, at each of many addresses."""
        for address, new in places:
            self.write(address, new)

    def write_table(self, addresses: Sequence[int], codes: Sequence[bytes]) -> None:
        """The same, of a table whose codes are equally long: each page gets its part when it is looked at."""
        _, high, move = self.image.around(addresses[0]) if addresses else (0, 0, 0)
        ascending = all(map(lt, addresses, islice(addresses, 1, None)))
        if self._table is not None or not ascending or not addresses or addresses[-1] + len(codes[-1]) > high:
            self.write_all(zip(addresses, codes, strict=True))
        else:
            self._table = addresses, codes, move

    def read_all(self, sites: Iterable[Site]) -> list[bytes]:
        """The bytes of many sites, as they are now; :class:`AddressError` outside the image."""
        return self.read_spans((site.address, site.length) for site in sites)

    def read_spans(self, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of many stretches, each a virtual address and a length; :class:`AddressError` as :meth:`read`."""
        if not self._pages and self._table is None:
            locate, memory = self.image.locate, self.image.memory
            offsets = ((locate(address, length), length) for address, length in spans)
            return [bytes(memory[at : at + length]) for at, length in offsets]
        pages, memory, around, low, high, move = self._pages, self.image.memory, self.image.around, 0, 0, 0
        found = []
        for address, length in spans:
            if not low <= address <= high - length:
                low, high, move = around(address)
            at = address + move
            end = at + length
            number = at >> _PAGE_BITS
            if address > high - length or end - 1 >> _PAGE_BITS != number:
                found.append(self.read(address, length))
                continue
            if self._table is not None:
                self._settle(number)
            page = pages.get(number)
            found.append(bytes(memory[at:end] if page is None else page[at & _PAGE - 1 : (at & _PAGE - 1) + length]))
        return found

    def begin_with(self, addresses: Iterable[int], lead: int) -> bool:
        """Whether a byte stands at each of many addresses, where the image has it."""
        if self._table is not None:
            return False
        pages, around, low, high, move = self._pages, self.image.around, 0, 0, 0
        for address in addresses:
            if not low <= address < high:
                low, high, move = around(address)
            if (address + move >> _PAGE_BITS in pages or address >= high) and self.read(address, 1)[0] != lead:
                return False
        return True

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(self.image.memory[number * _PAGE : (number + 1) * _PAGE])
        return page

    def _settle(self, number: int) -> None:
        """Write a page's part of the table."""
        if number in self._settled or self._table is None:
            return
        self._settled.add(number)
        addresses, codes, move = self._table
        start, length = number * _PAGE - move, len(codes[0])
        for i in range(bisect_left(addresses, start - length + 1), bisect_left(addresses, start + _PAGE)):
            at, code = addresses[i] - start, codes[i]
            if at < 0:
                at, code = 0, code[-at:]
            code = code[: _PAGE - at]
            self._page(number)[at : at + len(code)] = code
