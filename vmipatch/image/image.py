"""One kernel image, whatever container it came in: where its bytes are, and what it says of itself.

Made by :func:`vmipatch.image.open_image`.  Imports errors and its sisters in
``image/``.  Everything that costs more than reading headers is found when it
is first asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from mmap import mmap

from vmipatch.errors import AddressError
from vmipatch.image.model import AddressMap, Section, Segment, no_bytes


class Image:
    """A kernel's bytes with their virtual, physical and file addresses.

    ``path``        the file as the caller named it;
    ``container``   ``elf``, ``bzimage``, ``module`` or ``raw``;
    ``compression`` what the bytes were unpacked from (``xz``, ``gzip``, …), or
                    None where ``data`` is the file itself;
    ``bits``        32 or 64;
    ``data``        the ELF file (unpacked) or the raw memory; offsets count here.
    """

    def __init__(
        self,
        *,
        path: str,
        container: str,
        bits: int,
        data: bytes | mmap,
        file: bytes | mmap,
        sections: tuple[Section, ...] = (),
        segments: tuple[Segment, ...] = (),
        compression: str | None = None,
    ) -> None:
        self.path = path
        self.container = container
        self.compression = compression
        self.bits = bits
        self.data = data
        self.sections = sections
        self.segments = segments
        self._file = file

    def __repr__(self) -> str:
        return f"<Image {self.path} {self.container} {self.bits}-bit, {len(self.sections)} sections>"

    # Sections

    @cached_property
    def _by_name(self) -> dict[str, Section]:
        return {s.name: s for s in reversed(self.sections)}

    @cached_property
    def _by_address(self) -> tuple[list[int], list[Section]]:
        placed = sorted((s for s in self.sections if s.alloc and s.size), key=lambda s: s.address)
        return [s.address for s in placed], placed

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return self._by_name.get(name)

    def section_at(self, address: int) -> Section | None:
        """The section that is in memory at a virtual address."""
        starts, placed = self._by_address
        i = bisect_right(starts, address) - 1
        return placed[i] if i >= 0 and address in placed[i] else None

    # Addresses

    @cached_property
    def _virtual_to_offset(self) -> tuple[AddressMap, AddressMap]:
        return (
            AddressMap((s.address, s.offset, s.file_size) for s in self.segments),
            AddressMap((s.address, s.offset, s.file_size) for s in self.sections if s.alloc),
        )

    @cached_property
    def _offset_to_virtual(self) -> tuple[AddressMap, AddressMap]:
        return (
            AddressMap((s.offset, s.address, s.file_size) for s in self.segments),
            AddressMap((s.offset, s.address, s.file_size) for s in self.sections if s.alloc),
        )

    @cached_property
    def _virtual_to_physical(self) -> AddressMap:
        return AddressMap((s.address, s.physical, s.memory_size) for s in self.segments)

    @cached_property
    def _physical_to_virtual(self) -> AddressMap:
        return AddressMap((s.physical, s.address, s.memory_size) for s in self.segments)

    def _locate(self, address: int, length: int) -> int:
        segments, sections = self._virtual_to_offset
        offset = segments.find(address, length)
        if offset is None:
            offset = sections.find(address, length)
        if offset is None:
            raise no_bytes(address, length, file=self.path)
        return offset

    def offset_of(self, address: int) -> int:
        """Virtual address to offset in :attr:`data`; :class:`AddressError` if the file has no byte there."""
        return self._locate(address, 1)

    def address_of(self, offset: int) -> int:
        """Offset in :attr:`data` to virtual address; :class:`AddressError` if that byte is not loaded."""
        segments, sections = self._offset_to_virtual
        address = segments.find(offset)
        if address is None:
            address = sections.find(offset)
        if address is None:
            raise AddressError("this byte of the file is at no address", file=self.path, offset=offset)
        return address

    def physical_of(self, address: int) -> int:
        """Virtual to physical address, as the segments load it; :class:`AddressError` outside them."""
        physical = self._virtual_to_physical.find(address)
        if physical is None:
            raise AddressError("the image is not loaded at this address", file=self.path, address=address)
        return physical

    def virtual_of_physical(self, physical: int) -> int:
        """Physical to virtual address, as the segments load it; :class:`AddressError` outside them."""
        address = self._physical_to_virtual.find(physical)
        if address is None:
            raise AddressError(f"the image is not loaded at physical address {physical:#x}", file=self.path)
        return address

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from a virtual address; :class:`AddressError` unless the file has them all."""
        if length <= 0:
            return b""
        offset = self._locate(address, length)
        return self.data[offset : offset + length]

    def sha256(self) -> str:
        """The SHA-256 of the container file as it was given, in hexadecimal."""
        from hashlib import sha256

        return sha256(self._file).hexdigest()
