"""The kernel's text while it is being patched: the image with what earlier patches wrote laid over it."""

from __future__ import annotations

from collections.abc import Iterable

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

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a virtual address as they are now; :class:`AddressError` outside the image."""
        if length <= 0:
            return b""
        offset = self.image.locate(address, length)
        number, at = divmod(offset, _PAGE)
        if at + length > _PAGE:
            rest = _PAGE - at
            return self.read(address, rest) + self.read(address + rest, length - rest)
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
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = bytearray(self.image.memory[number * _PAGE : (number + 1) * _PAGE])
        page[at : at + length] = new

    def write_all(self, places: Iterable[tuple[int, bytes]]) -> None:
        """What :meth:`write` does, at each of many addresses."""
        pages, around, low, high, move = self._pages, self.image.around, 0, 0, 0
        for address, new in places:
            length = len(new)
            if not low <= address <= high - length:
                low, high, move = around(address)
            place = address + move
            at = place & _PAGE - 1
            page = pages.get(place >> _PAGE_BITS)
            if page is not None and at + length <= _PAGE and address <= high - length:
                page[at : at + length] = new
            else:
                self.write(address, new)

    def read_all(self, sites: Iterable[Site]) -> list[bytes]:
        """The bytes of many sites, as they are now; :class:`AddressError` outside the image."""
        pages, memory, around, low, high, move = self._pages, self.image.memory, self.image.around, 0, 0, 0
        found = []
        for site in sites:
            address, length = site.address, site.length
            if not low <= address <= high - length:
                low, high, move = around(address)
            at = address + move
            end = at + length
            if address > high - length or at >> _PAGE_BITS in pages or end - 1 >> _PAGE_BITS in pages:
                found.append(self.read(address, length))
            else:
                found.append(bytes(memory[at:end]))
        return found
