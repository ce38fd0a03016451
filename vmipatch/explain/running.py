"""A running kernel inside a memory dump: where it is, how far it was moved, and its bytes by linked address.

Imports image, errors and its sisters in ``explain/``.
"""

from __future__ import annotations

from functools import cached_property

from vmipatch.errors import AddressError
from vmipatch.explain import paging
from vmipatch.explain.memory import PAGE, Memory
from vmipatch.image import Image
from vmipatch.image.model import Section


class Running:
    """The kernel of an image as a dump has it.

    ``slide`` is what its virtual addresses are above those it was linked at;
    ``shift`` what its physical ones are above those it was to be loaded at (None
    where the dump is by virtual address only); ``how`` says how it was found.
    Addresses given to the methods are virtual as linked, unless a name says otherwise.
    """

    def __init__(self, image: Image, memory: Memory, slide: int, shift: int | None, how: str) -> None:
        self.image = image
        self.memory = memory
        self.slide = slide
        self.shift = shift
        self.how = how
        self._mask = (1 << image.bits) - 1
        self._text: tuple[int, bytes] = (0, b"")

    def read(self, address: int, length: int) -> bytes | None:
        """Bytes of the kernel's own image; None where the dump lacks any of them."""
        if length <= 0:
            return b""
        if self.shift is not None:
            try:
                physical = self.image.physical_of(address)
                self.image.physical_of(address + length - 1)
            except AddressError:
                return None
            return self.memory.read_physical(physical + self.shift, length)
        return self.memory.read_virtual((address + self.slide) & self._mask, length)

    def word(self, address: int) -> int | None:
        """A pointer-sized word of the kernel's own image."""
        data = self.read(address, self.image.bits // 8)
        return None if data is None else int.from_bytes(data, "little")

    def pointer(self, address: int) -> int | None:
        """A pointer of the kernel's own image, as linked: what it points at, less the slide; 0 stays 0."""
        value = self.word(address)
        return (value - self.slide) & self._mask if value else value

    def linked(self, address: int) -> int:
        """A virtual address of the running kernel as it was linked."""
        return (address - self.slide) & self._mask

    def read_running(self, address: int, length: int) -> bytes | None:
        """Bytes at any virtual address of the running kernel: its image, the direct mapping, modules.

        Through the page tables where the dump is by physical address; None where nothing is mapped.
        """
        data = self.memory.read_virtual(address, length) if not self.memory.raw or self.shift is None else None
        if data is not None:
            return data
        data = self.read(self.linked(address), length)
        if data is not None or self.shift is None:
            return data
        if self.tables is None:
            return None
        root, mode = self.tables
        result = b""
        while len(result) < length:
            at = address + len(result)
            physical = paging.walk(self.memory.read_physical, root, mode, at)
            if physical is None:
                return None
            piece = self.memory.read_physical(physical, min(length - len(result), PAGE - at % PAGE))
            if piece is None:
                return None
            result += piece
        return result

    def virtual_of(self, offset: int) -> int | None:
        """The virtual address, in the running kernel, of a byte of the dump: in its image or the direct mapping."""
        address = self.memory.addresses_of(self.memory.virtual, offset)
        if address is not None and (not self.memory.raw or self.shift is None):
            return address
        physical = self.memory.addresses_of(self.memory.physical, offset)
        if physical is None or self.shift is None:
            return None
        try:
            return (self.image.virtual_of_physical(physical - self.shift) + self.slide) & self._mask
        except AddressError:
            return None if self.direct_map is None else (physical + self.direct_map) & self._mask

    def may_be_at(self, offset: int, address: int) -> bool:
        """Whether a virtual address of the running kernel can be that of a byte of the dump, as far as is known.

        Memory that the image took before it was freed has two: in the image's mapping, and in the direct one.
        """
        known = self.virtual_of(offset)
        if known is None or known == address:
            return True
        physical = self.memory.addresses_of(self.memory.physical, offset)
        if physical is None or self.direct_map is None:
            return False
        return (physical + self.direct_map) & self._mask == address

    @cached_property
    def direct_map(self) -> int | None:
        """The virtual address of physical address 0 in the direct mapping, as the kernel has placed it."""
        if self.image.bits == 32:
            return self.image.page_offset
        address = self.image.symbols.lookup("page_offset_base")
        value = self.word(address) if address is not None else None
        if value is not None and value >= 1 << 63 and not value % PAGE:
            return value
        return self.image.page_offset

    @cached_property
    def tables(self) -> tuple[int, paging.Mode] | None:
        """Page tables that map the kernel's text where it is: their physical address, and the mode of paging."""
        text = self.image.section(".text")
        shift = self.shift
        if text is None or shift is None:
            return None
        probes = [text.address, text.address + text.size // 2 & ~(PAGE - 1), text.end - 1]
        wanted = [((p + self.slide) & self._mask, self.image.physical_of(p) + shift) for p in probes]
        read = self.memory.read_physical
        for root in self._roots():
            for mode in paging.MODES[self.image.bits]:
                if all(paging.walk(read, root, mode, virtual) == physical for virtual, physical in wanted):
                    return root, mode
        return None

    def _roots(self) -> list[int]:
        """Physical addresses at which page tables may begin: what the notes say, the kernel's own, any of its pages."""
        shift = self.shift or 0
        found = [cr3 & ~(PAGE - 1) if self.image.bits == 64 else cr3 & ~0x1F for cr3 in self.memory.cr3]
        for name in ("init_top_pgt", "init_level4_pgt", "swapper_pg_dir"):
            address = self.image.symbols.lookup(name)
            if address is not None:
                found.append(self.image.physical_of(address) + shift)
        for name in (".data", ".bss", ".brk"):
            section = self.image.section(name)
            if section is not None:
                first = self.image.physical_of(section.address) & ~(PAGE - 1)
                found += range(first + shift, first + shift + section.size, PAGE)
        return found

    def text(self, section: Section) -> bytes | None:
        """The running bytes of a section, read once."""
        if self._text[0] != section.address:
            self._text = section.address, self.read(section.address, section.size) or b""
        return self._text[1] or None
