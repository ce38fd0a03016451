"""The modules of a running kernel, by its own list: names, where their memory lies, where each section went.

``struct module`` (include/linux/module.h): its first members, ``state``, ``list``
and ``name``, have been the same since 2.6 and up to 7.3; the others are found by the kernel's BTF.
Without BTF what is needed is found by what it is: the table of sections is the
one thing in a ``struct module`` that points at a group named ``sections``
(kernel/module/sysfs.c).  The list is a guest's word: it may be a circle,
lead nowhere or have no end, and each of these is told.
Imports errors and its sisters in ``explain/``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

from vmipatch.explain.memory import PAGE
from vmipatch.explain.modules.btf import Types
from vmipatch.explain.modules.view import View

MOST = 10_000
"""Modules of one kernel; a list that is longer has no end."""
_MOST_SECTIONS = 4096
_LONGEST_NAME = 64
_SEARCHED = 4096
"""Bytes of a ``struct module`` in which its parts are looked for, where BTF does not say."""
_MOST_ITS_PAGES = 4096

_NAME = re.compile(r"[A-Za-z0-9_.,+-]+")

LIVE, COMING, GOING, UNFORMED = "live", "coming", "going", "unformed"
STATES = (LIVE, COMING, GOING, UNFORMED)
"""enum module_state, by number."""


@dataclass(frozen=True, slots=True)
class Region:
    """One piece of a module's memory: ``kind`` as the kernel names it, virtual address, size in bytes."""

    kind: str
    address: int
    size: int

    @property
    def exec(self) -> bool:
        """Whether it holds instructions."""
        return self.kind in ("text", "init text", "core")

    def holds(self, address: int) -> bool:
        """Whether an address is in it."""
        return self.address <= address < self.address + self.size


@dataclass(slots=True)
class Loaded:
    """A module as its kernel sees it; addresses are virtual ones of the running kernel.

    ``address`` is that of its ``struct module``.  ``regions`` is empty where nothing tells them; ``sections`` has
    name and address of each section at the time of loading, in the order of the file, empty where the
    kernel does not keep them.  ``percpu`` is what symbols of its per-cpu section are relative to.
    ``notes`` says what could not be read.
    """

    name: str
    address: int
    state: str
    regions: tuple[Region, ...] = ()
    sections: tuple[tuple[str, int], ...] = ()
    build_id: bytes | None = None
    srcversion: str | None = None
    taints: int | None = None
    percpu: int | None = None
    its_pages: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


class Walk:
    """The list of one kernel's modules; ``modules`` in its order, ``findings`` what is wrong with the list.

    ``unseen`` is true where no symbol names the list and nothing in the dump's data looks like one with a module in
    it: an empty list looks like any other.
    """

    def __init__(self, view: View, types: Types) -> None:
        self._view = view
        self._running = view.running
        self._types = types
        self._size = view.size
        self._mask = view.mask
        # enum module_state, padded; struct list_head; name.
        self._list, self._name = self._size, 3 * self._size
        self._sections_at: int | None = None
        self.findings: list[str] = []
        self.modules: list[Loaded] = []
        head = self._head()
        self.unseen = head is None
        if head is not None:
            self._walk(head)

    # The list

    def _head(self) -> int | None:
        """The running address of the list's head: by its name, else by what it looks like."""
        running = self._running
        known = running.image.symbols.lookup("modules")
        if known is not None:
            return (known + running.slide) & self._mask
        section = running.image.section(".data")
        data = running.read(section.address, section.size // 8 * 8) if section is not None else None
        if section is None or data is None:
            return None
        words = memoryview(data).cast("I" if self._size == 4 else "Q")
        least = (running.image.page_offset if self._size == 4 else 0xFFFF << 48) & self._mask
        for i in range(len(words) - 1):
            following = words[i]
            if following < least or following % self._size or words[i + 1] < least:
                continue
            head = (section.address + i * self._size + running.slide) & self._mask
            if following != head and self._looks_like_head(head, following, words[i + 1]):
                return head
        return None

    def _looks_like_head(self, head: int, following: int, previous: int) -> bool:
        """Whether both ends of a list lead back to its head, and what hangs there is a module.

        A ``struct module`` lies in its module's own memory, outside the kernel's image, and has a name and sections.
        """
        section = self._running.image.section_at(self._running.linked(following))
        if section is not None or self._view.word(following + self._size) != head or self._view.word(previous) != head:
            return False
        state = self._view.int32(following - self._list)
        name = self._view.text(following - self._list + self._name, _LONGEST_NAME)
        if state is None or not 0 <= state < len(STATES) or name is None or not _is_name(name):
            return False
        return self._search_sections(following - self._list) is not None

    def _walk(self, head: int) -> None:
        seen = {head}
        at = self._view.word(head)
        before = head
        while at != head:
            if at is None:
                self._say(f"cannot be read at {before:#x}")
                return
            if at in seen:
                self._say(f"leads back to {at:#x} and not to its head")
                return
            if len(self.modules) >= MOST:
                self._say(f"has no end after {MOST} modules")
                return
            seen.add(at)
            if at % self._size or self._view.word(at) is None:
                self._say(f"leads to {at:#x}, which is not in the dump or no list at all")
                return
            back = self._view.word(at + self._size)
            if back != before:
                self._say(f"is torn: {at:#x} follows {before:#x}, but says that {back or 0:#x} is in front of it")
            address = (at - self._list) & self._mask
            name = self._view.text((address + self._name) & self._mask, _LONGEST_NAME)
            if name is None or not _is_name(name):
                self._say(f"has a module at {address:#x} without a name")
                name = f"{address:#x}"
            self.modules.append(self._module(address, name))
            before, at = at, self._view.word(at)

    def _say(self, text: str) -> None:
        self.findings.append(f"the list of modules {text}")

    # One module

    def _module(self, address: int, name: str) -> Loaded:
        state = self._view.int32(address)
        known = state is not None and 0 <= state < len(STATES)
        found = Loaded(name, address, STATES[state] if known and state is not None else f"state {state}")
        self._by_types(found, self._types)
        found.sections = self._sections(found)
        return found

    def _by_types(self, found: Loaded, types: Types) -> None:
        address = found.address
        found.regions = tuple(self._regions(types, address))
        for member, width in (("build_id", 20), ("taints", self._size), ("percpu", self._size)):
            offset = types.offset("module", member)
            data = self._view.read(address + offset, width) if offset is not None else None
            if data is None:
                continue
            if member == "build_id":
                found.build_id = data if any(data) else None
            elif member == "taints":
                found.taints = int.from_bytes(data, "little")
            else:
                found.percpu = int.from_bytes(data, "little")
        offset = types.offset("module", "srcversion")
        place = self._view.word(address + offset) if offset is not None else None
        if place:
            found.srcversion = self._view.text(place, _LONGEST_NAME)
        found.its_pages = self._its_pages(types, address)

    def _regions(self, types: Types, address: int) -> list[Region]:
        """Its memory: from 6.4 on by kind, before that one piece that stays and one that goes."""
        result: list[Region] = []
        whole = types.field("module", "mem")
        if whole is not None:
            for i in range(min(whole.elements, 16)):
                base, size = types.offset("module", f"mem[{i}].base"), types.offset("module", f"mem[{i}].size")
                if base is not None and size is not None:
                    self._region(result, _KINDS[i] if i < len(_KINDS) else f"kind {i}", address + base, address + size)
            return result
        for kind, base_name, size_name in (
            ("core", "core_layout.base", "core_layout.size"), ("init", "init_layout.base", "init_layout.size"),
            ("core", "module_core", "core_size"), ("init", "module_init", "init_size"),
        ):  # fmt: skip
            base, size = types.offset("module", base_name), types.offset("module", size_name)
            if base is not None and size is not None:
                self._region(result, kind, address + base, address + size)
        return result

    def _region(self, result: list[Region], kind: str, base_at: int, size_at: int) -> None:
        base, size = self._view.word(base_at), self._view.int32(size_at)
        if base and size and 0 < size < 1 << 30:
            result.append(Region(kind, base, size))

    def _its_pages(self, types: Types, address: int) -> tuple[int, ...]:
        """Pages of thunks against Indirect Target Selection (struct its_array; members of their own before 6.16)."""
        for pages, number in (("arch.its_pages.pages", "arch.its_pages.num"), ("its_page_array", "its_num_pages")):
            at, count_at = types.offset("module", pages), types.offset("module", number)
            if at is None or count_at is None:
                continue
            place, count = self._view.word(address + at), self._view.int32(address + count_at)
            if place and count and 0 < count <= _MOST_ITS_PAGES:
                data = self._view.read(place, count * self._size)
                if data is not None:
                    return tuple(self._view.words(data))
        return ()

    # Where its sections went

    def _sections(self, found: Loaded) -> tuple[tuple[str, int], ...]:
        offset = self._types.offset("module", "sect_attrs")
        if offset is None:
            offset = self._sections_at if self._sections_at is not None else self._search_sections(found.address)
            self._sections_at = offset
        place = self._view.word(found.address + offset) if offset is not None else None
        return self._read_sections(place) if place else ()

    def _search_sections(self, address: int) -> int | None:
        """The offset in ``struct module`` of a pointer at a group named ``sections``."""
        room = min(_SEARCHED, PAGE - address % PAGE)
        data = self._view.read(address, _SEARCHED) or self._view.read(address, room)
        for i, word in enumerate(self._view.words(data) if data is not None else ()):
            if word % self._size or word < (1 << 8 * self._size - 1):
                continue
            name = self._view.word(word)
            if name and self._view.text(name, 16) == "sections":
                return i * self._size
        return None

    def _read_sections(self, place: int) -> tuple[tuple[str, int], ...]:
        """``struct module_sect_attrs``: a group, whose last list names one attribute for each section.

        The address stands in the attribute itself from 6.14 on, behind it before.
        """
        size = self._size
        head = self._view.read(place, 8 * size)
        if head is None or self._view.text(int.from_bytes(head[:size], "little"), 16) != "sections":
            return ()
        rows: list[int] = []
        for pointer in self._view.words(head[size:]):
            # The list whose entries lie in this very object, behind its head.
            first = self._view.word(pointer) if pointer and not pointer % size else None
            if first is not None and 4 * size <= first - place <= 16 * size:
                rows = self._pointers(pointer)
                break
        if not rows:
            return ()
        stride = min((b - a for a, b in pairwise(rows)), default=0)
        if not 5 * size <= stride <= 64 * size:
            stride = 12 * size
        result = []
        for row in rows:
            data = self._view.read(row, stride)
            if data is None:
                break
            words = list(self._view.words(data))
            name = self._view.text(words[0], _LONGEST_NAME * 2)
            # struct attribute is two words; then bin_attribute's size and its private pointer.
            address = words[3] or words[-1]
            if name is None:
                break
            result.append((name, address))
        return tuple(result)

    def _pointers(self, place: int) -> list[int]:
        """Pointers up to the empty one that ends them."""
        result: list[int] = []
        while len(result) < _MOST_SECTIONS:
            word = self._view.word(place + len(result) * self._size)
            if not word:
                break
            result.append(word)
        return result


_KINDS = ("text", "data", "rodata", "ro after init", "init text", "init data", "init rodata")
"""enum mod_mem_type of 6.4 to 7.3."""


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None
