"""One kernel image, whatever container it came in: where its bytes are, and what it says of itself.

Made by :func:`vmipatch.image.open_image`.  Imports errors and its sisters in
``image/``.  Everything that costs more than reading headers is found when it
is first asked for.
"""

from __future__ import annotations

from functools import cached_property
from mmap import mmap
from os import PathLike

from vmipatch.ahead import Ahead
from vmipatch.errors import AddressError, ImageError
from vmipatch.image import banner, elf, kaslr, kind, origins, pageoffset, reconstruct
from vmipatch.image.bzimage import Payload
from vmipatch.image.kaslr import Relocations
from vmipatch.image.model import AddressMap, Section, SectionMap, Segment, no_bytes
from vmipatch.image.module import Linked, Relocation
from vmipatch.image.symbols import Symbols

# No kernel has its constants further on; a raw dump of a whole memory may go on for long.
_MAX_SEARCHED = 1 << 30


class Image:
    """A kernel's bytes with their virtual, physical and file addresses.

    ``path``        the file as the caller named it;
    ``container``   ``elf``, ``bzimage``, ``uki`` (a unified kernel image), ``module`` or ``raw``;
    ``compression`` what the bytes were unpacked from (``xz``, ``gzip``, …), or
                    None where ``data`` is the file itself;
    ``payload``     where a bzImage or a unified kernel image holds them, else None;
    ``bits``        32 or 64;
    ``data``        the ELF file (unpacked; with what follows it in a bzImage's
                    payload) or the raw memory; offsets count here;
    ``elf_size``    the length of the ELF file in ``data``, 0 if it is none; of bare memory that a relocation
                    table follows the length of that memory;
    ``entry``       the ELF file's entry point, 0 if there is none;
    ``undefined``   the symbols that a module wants from elsewhere;
    ``reconstructed`` the file has no section headers: :attr:`sections` are made
                    up from symbols and, where tables were looked for, from content;
    ``searched``    the families of tables that were looked for by content.
    ``memory``      ``data`` as :meth:`read` gives it: of a module with its own relocations applied.
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
        payload: Payload | None = None,
        elf_size: int = 0,
        entry: int = 0,
        linked: Linked | None = None,
        system_map: str | PathLike[str] | None = None,
        reconstructed: bool = False,
    ) -> None:
        self.path = path
        self.container = container
        self.compression = compression
        self.payload = payload
        self.bits = bits
        self.data = data
        self.sections = sections
        self.segments = segments
        self.elf_size = elf_size
        self.entry = entry
        self.undefined = linked.undefined if linked else ()
        self.reconstructed = reconstructed
        self.searched: set[str] = set()
        self._file = file
        self._digest: Ahead[str] | None = None
        self._linked = linked
        self.memory: bytes | bytearray | mmap = linked.memory if linked else data
        # Of the segment that answered last: its first address and its end, and what its offsets are above them.
        self._last = (0, 0, 0)
        self._system_map = system_map

    def __repr__(self) -> str:
        return f"<Image {self.path} {self.container} {self.bits}-bit, {len(self.sections)} sections>"

    # Sections

    @cached_property
    def _by_name(self) -> dict[str, Section]:
        return {s.name: s for s in reversed(self.sections)}

    def add_section(self, section: Section) -> None:
        """Cut a section that was found by content out of the made-up one that holds it."""
        self.sections = tuple(reconstruct.add(self.sections, section))
        for name in ("_by_name", "code_sections", "_section_map"):
            self.__dict__.pop(name, None)

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return self._by_name.get(name)

    @cached_property
    def code_sections(self) -> tuple[Section, ...]:
        """The sections in memory that hold instructions, in the order of the file; without bytes none is one."""
        return tuple(s for s in self.sections if s.exec and s.alloc and s.file_size)

    @cached_property
    def _section_map(self) -> SectionMap:
        return SectionMap(self.sections)

    def section_at(self, address: int) -> Section | None:
        """The section that is in memory at a virtual address."""
        return self._section_map.at(address)

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
    def _loaded_to_offset(self) -> AddressMap:
        """Where segments lie that have an address of their own: x86-64 links its per-cpu data at 0, loads it
        with the rest, and names it by that place (__per_cpu_load) in the table of what KASLR changes."""
        mask = (1 << self.bits) - 1
        return AddressMap(
            ((s.physical + self.text_map) & mask, s.offset, s.file_size)
            for s in self.segments
            if self.bits == 64 and s.address < 1 << 32
        )

    @cached_property
    def _virtual_to_physical(self) -> AddressMap:
        return AddressMap((s.address, s.physical, s.memory_size) for s in self.segments)

    @cached_property
    def _physical_to_virtual(self) -> AddressMap:
        return AddressMap((s.physical, s.address, s.memory_size) for s in self.segments)

    def locate(self, address: int, length: int) -> int:
        """The offset of ``length`` bytes from a virtual address; :class:`AddressError` unless the file has them all."""
        low, high, move = self._last
        if low <= address and address + length <= high:
            return address + move
        segments, sections = self._virtual_to_offset
        around = segments.around(address)
        if around is not None:
            self._last = around
        offset = segments.find(address, length)
        if offset is None:
            offset = sections.find(address, length)
        if offset is None:
            offset = self._loaded_to_offset.find(address, length)
        if offset is None:
            raise no_bytes(address, length, file=self.path)
        return offset

    def around(self, address: int) -> tuple[int, int, int]:
        """First address and end of what is loaded at a virtual address, and what to add for offsets in :attr:`data`.

        ``(0, 0, 0)`` where :meth:`locate` must be asked for each address.
        """
        return self._virtual_to_offset[0].around(address) or (0, 0, 0)

    def offset_of(self, address: int) -> int:
        """Virtual address to offset in :attr:`data`; :class:`AddressError` if the file has no byte there.

        Per-cpu data of x86-64 has two addresses: the one that it is linked at, and where it is loaded.
        """
        return self.locate(address, 1)

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
        """``length`` bytes from a virtual address; :class:`AddressError` unless the file has them all.

        Of a module, with the relocations applied that stay within it.
        """
        if length <= 0:
            return b""
        offset = self.locate(address, length)
        return bytes(self.memory[offset : offset + length])

    # What the image says of itself

    @cached_property
    def _windows(self) -> list[tuple[int, int]]:
        """Ranges of offsets in which to look for the kernel's constant data, best first."""
        rodata = self.section(".rodata")
        first = [(rodata.offset, rodata.offset + rodata.file_size)] if rodata else []
        return [*first, (0, min(len(self.data), _MAX_SEARCHED))]

    @cached_property
    def symbols(self) -> Symbols:
        """Names of addresses, from everything that has them.

        Using it raises :class:`ImageError` for a damaged symbol table or an unusable System.map.
        """
        segments, placed = self._offset_to_virtual

        def place(offset: int) -> int | None:
            address = segments.find(offset)
            return placed.find(offset) if address is None else address

        # Nothing of it may refer to the image, which would then live until it is collected as a cycle.
        loaders = origins.loaders(
            path=self.path, bits=self.bits, data=self.data, memory=self.memory, sections=self.sections,
            section_map=self._section_map, windows=self._windows, place=place, module=self.container == "module",
            system_map=self._system_map,
        )  # fmt: skip
        return Symbols(loaders, self._section_map)

    @cached_property
    def banner(self) -> str | None:
        """The kernel's ``Linux version …`` line, None where there is none (as in a module)."""
        return None if self.container == "module" else banner.find(self.data, self._windows)

    @cached_property
    def kind(self) -> str:
        """``linux``, ``user-mode-linux``, ``xen``, ``module``, or ``unknown``: what the image is, by what it holds."""
        return kind.MODULE if self.container == "module" else kind.kind(self.data, self.sections, self.banner)

    @cached_property
    def version(self) -> tuple[int, ...] | None:
        """The upstream version of the kernel, or of that which a module is for; at least three numbers."""
        text = self.banner
        modinfo = self.section(".modinfo")
        if text is None and modinfo is not None:
            text = banner.vermagic(self.read(modinfo.address, modinfo.file_size))
        return banner.version(text) if text else None

    @cached_property
    def text_map(self) -> int:
        """What the virtual addresses of the kernel's own text and data are above the physical ones.

        PAGE_OFFSET on i386, __START_KERNEL_map on x86-64; :class:`ImageError` for a module.
        """
        if self.container == "module":
            raise ImageError("a module does not say where its kernel is", file=self.path)
        found = pageoffset.text_map(self.bits, self.segments)
        if found is not None:
            return found
        if self.bits == 64:
            return pageoffset.START_KERNEL_MAP
        starts = [s.address for s in self.segments] or [s.address for s in self.sections if s.alloc]
        split = pageoffset.split_of(min(starts, default=0))
        if not split:
            raise ImageError("PAGE_OFFSET is not found: nothing is at a kernel address", file=self.path)
        return split

    @cached_property
    def page_offset(self) -> int:
        """PAGE_OFFSET: the virtual address of physical address 0 in the direct mapping of all memory.

        On x86-64 as linked, before any randomisation.  :class:`ImageError` where nothing tells.
        """
        text_map = self.text_map
        if self.bits == 32:
            return text_map
        address = self.symbols.lookup("page_offset_base")
        if address is not None:
            try:
                value = int.from_bytes(self.read(address, 8), "little")
            except AddressError:
                value = 0
            if pageoffset.is_direct_map(value):
                return value
        found = pageoffset.direct_map(self.data, self.sections)
        if found is None and self.version is not None:
            found = pageoffset.direct_map_of(self.version)
        if found is None:
            raise ImageError("PAGE_OFFSET is not found", file=self.path)
        return found

    @property
    def bare_base(self) -> int | None:
        """Where :attr:`data` begins in virtual memory if it is bare memory that no header describes, else None.

        ``patch`` writes such data as it is: its output is opened with this base.
        """
        if self.container == "module" or len(self.segments) != 1 or self.data[:4] == elf.MAGIC:
            return None
        return self.segments[0].address - self.segments[0].offset

    # Relocations

    @cached_property
    def own_text(self) -> range | None:
        """Virtual addresses of the text that stays, ``[_text, _etext)``; None where nothing tells."""
        text = self.section(".text")
        if text is None:
            return None
        return range(self.symbols.lookup("_text") or text.address, self.symbols.lookup("_etext") or text.end)

    @property
    def other_texts(self) -> tuple[range, ...]:
        """Virtual addresses of text that this image's code may call, and that is not its own: none of a kernel's."""
        return ()

    @cached_property
    def relocations(self) -> Relocations | None:
        """What KASLR changes: the table behind the ELF file in a relocatable kernel's payload, if it is there."""
        if not self.elf_size or self.elf_size >= len(self.data):
            return None
        return kaslr.parse(self.data[self.elf_size :], self.bits)

    def relocation_at(self, address: int) -> tuple[str, int, int] | None:
        """Of a module's field at a virtual address: symbol (or section) name, addend, relocation type."""
        found = self._linked.relocation(address) if self._linked else None
        return (found.symbol, found.addend, found.type) if found else None

    def module_relocations(self) -> tuple[Relocation, ...]:
        """All relocations of a module, by the address of the field."""
        return tuple(self._linked.relocations()) if self._linked else ()

    def hash_ahead(self) -> None:
        """Begin with what :meth:`sha256` will be asked for, beside what else is done."""
        if self._digest is None:
            self._digest = Ahead(self._hash)

    def sha256(self) -> str:
        """The SHA-256 of the container file as it was given, in hexadecimal."""
        return self._hash() if self._digest is None else self._digest.result()

    def _hash(self) -> str:
        from hashlib import sha256

        return sha256(self._file).hexdigest()
