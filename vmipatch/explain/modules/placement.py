"""A module where its kernel has put it: sections at running addresses, relocations applied, names of both.

Addresses of sections come from the kernel's own table of them, where it keeps one
(kernel/module/sysfs.c); else from repeating the loader's layout over the
regions of memory.  Relocations are those of arch/x86/kernel/module.c
(:mod:`vmipatch.image.module`).  Imports image, errors, facts and its sisters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from vmipatch import facts
from vmipatch.errors import AddressError, ImageError
from vmipatch.explain.memory import PAGE
from vmipatch.explain.modules import layout, percpu
from vmipatch.explain.modules.files import ModuleFile
from vmipatch.explain.modules.loaded import Loaded, Region
from vmipatch.explain.modules.view import View
from vmipatch.image import Image, exports, symtab
from vmipatch.image.model import SHF_ALLOC, Section, no_bytes
from vmipatch.image.module import Linked
from vmipatch.image.symbols import Symbols
from vmipatch.image.symtab import Rows

_FILLS = (0x00, 0xCC)
"""What the loader leaves between sections: zeros, or INT3 of memory that was made executable beforehand
(execmem_fill_trapping_insns)."""
_LIVEPATCH = re.compile(r"\.klp\.sym\.([^.]+)\.(.+),(\d+)")


class Kernel:
    """The kernel around its modules: its memory, its names and what it exports, at running addresses.

    ``texts`` are the executable regions of all its modules.
    """

    def __init__(self, view: View, texts: tuple[range, ...] = ()) -> None:
        self.texts = texts
        self.view = view
        self.running = view.running
        self.image = view.running.image
        self._slide = view.running.slide

    @cached_property
    def exports(self) -> dict[str, int]:
        """Exported symbols at running addresses."""
        image = self.image
        found = exports.read(image.sections, image.bits, lambda s: bytes(image.data[s.offset : s.offset + s.file_size]))
        return {name: self.moved(address) for name, address in found.items()}

    @cached_property
    def text(self) -> range | None:
        """The running addresses of the kernel's own text."""
        own = self.image.own_text
        return None if own is None else range(self.moved(own.start), self.moved(own.stop))

    def exported(self, name: str) -> int | None:
        """The running address of an exported symbol; of any, in an image whose tables of exports are not found."""
        return self.exports.get(name) if self.exports else self.lookup(name)

    def moved(self, address: int) -> int:
        """An address of the image as the running kernel has it.  Per-cpu offsets stay: x86-64 linked its per-cpu data
        at 0 up to 6.14."""
        if self.image.bits == 64 and address < 1 << 32:
            return address
        return (address + self._slide) & self.view.mask

    def lookup(self, name: str) -> int | None:
        """The running address of any symbol of the image."""
        address = self.image.symbols.lookup(name)
        return None if address is None else self.moved(address)

    def at(self, address: int) -> tuple[str, int] | None:
        """The symbol of the image that a running address is in, and the distance from it."""
        linked = (address - self._slide) & self.view.mask
        return self.image.symbols.at(linked) if self.image.section_at(linked) is not None else None


class _Names(Symbols):
    """A module's names, and its kernel's."""

    def __init__(self, own: Symbols, image: PlacedModule) -> None:
        super().__init__({}, image._section_map)
        self._own = own
        self._kernel = image.kernel
        self._image_of = image.section_at

    def lookup(self, name: str) -> int | None:
        """A name that the kernel has means the kernel's: the patcher asks for no others."""
        found = self._kernel.lookup(name)
        return self._own.lookup(name) if found is None else found

    def at(self, address: int) -> tuple[str, int] | None:
        if self._image_of(address) is not None:
            return self._own.at(address)
        return self._kernel.at(address)

    def all(self) -> Iterator[tuple[int, str, str]]:
        return self._own.all()


class PlacedModule(Image):
    """A module's image at the addresses that it runs at.

    ``data`` are the bytes of its file with all relocations applied.  What is not its own is read from the running
    kernel, whose names it knows.
    """

    def __init__(self, kernel: Kernel, file: ModuleFile, sections: tuple[Section, ...], linked: Linked) -> None:
        super().__init__(
            path=file.path, container="module", bits=file.bits, data=bytes(linked.memory), file=file.data,
            sections=sections, elf_size=len(file.data), linked=linked,
        )  # fmt: skip
        self.kernel = kernel
        self.texts: tuple[Region, ...] = ()

    @property
    def own_text(self) -> range | None:
        """The memory of its code; that for its initialisation counts no calls (MOD_TEXT in callthunks.c)."""
        found = next((r for r in self.texts if r.kind in ("text", "core")), None)
        return None if found is None else range(found.address, found.address + found.size)

    @property
    def other_texts(self) -> tuple[range, ...]:
        """The kernel's text, and that of other modules."""
        kernel = () if self.kernel.text is None else (self.kernel.text,)
        return (*kernel, *self.kernel.texts)

    def read(self, address: int, length: int) -> bytes:
        """Bytes of the module; of the running kernel where the address is none of the module's."""
        try:
            return super().read(address, length)
        except AddressError:
            found = self.kernel.view.read(address, length)
            if found is None:
                raise no_bytes(address, length, file=self.path) from None
            return found

    @cached_property
    def symbols(self) -> Symbols:
        """The module's names and the kernel's."""
        return _Names(super().symbols, self)

    @cached_property
    def banner(self) -> str | None:
        """The kernel's."""
        return self.kernel.image.banner

    @cached_property
    def version(self) -> tuple[int, ...] | None:
        """The kernel's."""
        return self.kernel.image.version

    @cached_property
    def exported(self) -> dict[str, int]:
        """The symbols that other modules may use, at running addresses."""
        return exports.read(self.sections, self.bits, lambda s: bytes(self.data[s.offset : s.offset + s.file_size]))


class Placement:
    """One loaded module laid over its file.

    ``image`` is the module at its running addresses; ``text`` its executable memory; ``freed`` the sections whose
    memory the kernel has given back; ``notes`` what was odd.
    """

    def __init__(
        self,
        kernel: Kernel,
        loaded: Loaded,
        file: ModuleFile,
        resolve: Callable[[str], int | None],
    ) -> None:
        """Raises :class:`ImageError` where the file does not fit what was loaded."""
        self.notes: list[str] = []
        self._kernel = kernel
        self._loaded = loaded
        sections = layout.loaded(file.sections)
        addresses = _matched(loaded.sections, sections)
        self._layout = _fitting(sections, addresses, loaded)
        if not addresses and not loaded.regions:
            raise ImageError("nothing in the dump tells where its sections are", file=file.path)
        bases = self._bases(addresses)
        for index, (kind, offset) in self._layout.places.items():
            if index not in addresses and kind in bases:
                addresses[index] = bases[kind] + offset
        placed = tuple(
            replace(s, address=addresses[s.index])
            if s.alloc and s.index in addresses
            else replace(s, address=0, flags=s.flags & ~SHF_ALLOC)
            for s in sections
        )
        rows = symtab.read(file.data, file.path, file.bits, file.sections)
        own_data = self._percpu(file, placed, rows)
        linked = Linked(
            file.data,
            file.path,
            file.bits,
            placed,
            rows,
            self._livepatch(resolve),
            own_data,
            _not_needed,
        )
        # A table that is not in memory is no table.
        here = tuple(s for s, own in zip(placed, file.sections, strict=True) if s.alloc or not own.alloc)
        self.image = PlacedModule(kernel, file, here, linked)
        self.freed = tuple(s.name for s in placed if s.alloc and s.size and self._kind(s).startswith("init"))
        if linked.undefined:
            names = ", ".join(linked.undefined[:5]) + (" …" if len(linked.undefined) > 5 else "")
            self.notes.append(f"{len(linked.undefined)} symbols are not found: {names}")
        self.text = self.image.texts = self._executable(bases)

    def _kind(self, section: Section) -> str:
        return self._layout.places.get(section.index, ("", 0))[0]

    def _bases(self, addresses: Mapping[int, int]) -> dict[str, int]:
        """Where each kind of memory begins: as the kernel says, else as its sections' addresses do."""
        bases = {r.kind: r.address for r in self._loaded.regions}
        for index, address in addresses.items():
            kind, offset = self._layout.places.get(index, ("", 0))
            if kind and kind not in bases:
                bases[kind] = address - offset
        return bases

    def _executable(self, bases: Mapping[str, int]) -> tuple[Region, ...]:
        sizes = {r.kind: r.size for r in self._loaded.regions}
        result = []
        for kind in ("text", "init text"):
            # The kernel forgets the memory for initialisation once it has given it back.
            here = kind in sizes or (kind == "text" and not sizes)
            if here and kind in bases and kind in self._layout.sizes:
                size = sizes.get(kind, layout.pages(self._layout.sizes[kind]))
                result.append(Region(kind, bases[kind], size))
        if "core" in bases and self._layout.text:
            result.append(Region("core", bases["core"], self._layout.text))
        return tuple(result)

    def _percpu(self, file: ModuleFile, placed: tuple[Section, ...], rows: Rows) -> tuple[int, int] | None:
        """The number of its section of per-cpu data, and what symbols of it are relative to."""
        name = facts.load("modules", "loader")["percpu"]
        section = next((s for s in placed if s.name == name and s.size), None)
        if section is None:
            return None
        base = self._loaded.percpu
        if base is None:
            base = percpu.base(file, placed, rows, section.index, self._kernel.view, self._loaded.address)
        if base is None:
            self.notes.append("where its per-cpu data is, nothing tells")
            return None
        return section.index, base

    def _livepatch(self, resolve: Callable[[str], int | None]) -> Callable[[str], int | None]:
        """Names of a live patch say which of several symbols of one name they mean (Documentation/livepatch)."""

        def find(name: str) -> int | None:
            named = _LIVEPATCH.fullmatch(name)
            return resolve(name) if named is None else self._kernel.lookup(named[2])

        return find

    def pristine(self, region: Region, found: bytes) -> bytes:
        """The bytes that the loader put into a region, before anything was patched; ``found`` those there now.

        Between sections lies what most of what is found there is, zeros or INT3.
        """
        parts = [
            s
            for s in self.image.sections
            if s.alloc and s.file_size and region.address <= s.address and s.end <= region.address + region.size
        ]
        gaps = bytearray()
        end = 0
        for s in sorted(parts, key=lambda s: s.address):
            gaps += found[end : s.address - region.address]
            end = max(end, s.end - region.address)
        gaps += found[end:]
        fill = max(_FILLS, key=gaps.count)
        result = bytearray((fill,)) * region.size
        for s in parts:
            at = s.address - region.address
            result[at : at + s.size] = self.image.data[s.offset : s.offset + s.size]
        return bytes(result)


def _not_needed(section: str) -> bool:
    """Sections of data that no explanation reads."""
    return section.startswith((".orc_unwind", "__bug_table", "__ex_table", ".BTF", "__dyndbg", "__tracepoints"))


def _matched(known: tuple[tuple[str, int], ...], sections: list[Section]) -> dict[int, int]:
    """Addresses by section number.  The kernel's table has the order of the file, empty sections left out."""
    result: dict[int, int] = {}
    at = 0
    for name, address in known:
        for i in range(at, len(sections)):
            if sections[i].name == name and sections[i].size:
                if sections[i].alloc:
                    result[sections[i].index] = address
                at = i + 1
                break
    return result


def _fitting(sections: list[Section], addresses: Mapping[int, int], loaded: Loaded) -> layout.Layout:
    """The layout that agrees best with what is known of addresses and sizes."""
    kinds = {r.kind for r in loaded.regions}
    candidates = [
        layout.layout(sections, separate=separate, before=before)
        for separate in (True, False)
        for before in (False, True)
        if not kinds or ("core" in kinds) != separate
    ]
    sizes = {r.kind: r.size for r in loaded.regions}
    bases = {r.kind: r.address for r in loaded.regions}

    def agreement(one: layout.Layout) -> int:
        starts: dict[str, int] = dict(bases)
        right = 0
        for index, address in addresses.items():
            kind, offset = one.places.get(index, ("", 0))
            if kind:
                right += starts.setdefault(kind, address - offset) == address - offset
        right += sum(layout.pages(size) == sizes.get(kind) for kind, size in one.sizes.items())
        # Of two that agree with all of it the one that needs fewer beginnings says more.
        return right - len(starts) - sum(start % PAGE != 0 for start in starts.values())

    return max(candidates, key=agreement)
