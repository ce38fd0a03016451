"""What each executable piece of a running kernel's memory belongs to: image, module, BPF, ftrace, kprobes, ITS …

Each owner is asked for what it has: lists and arrays of the kernel, by their symbols and its BTF.  What
nobody has is told: it is code that nothing in the kernel knows of.
Imports image, errors and its sisters.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vmipatch.errors import AddressError
from vmipatch.explain.memory import PAGE
from vmipatch.explain.modules import mapped
from vmipatch.explain.modules.btf import Types
from vmipatch.explain.modules.loaded import Loaded
from vmipatch.explain.modules.placement import Kernel
from vmipatch.explain.modules.result import Area, Note
from vmipatch.image.model import Section

_MOST = 65_536
"""Programs, pages or trampolines of one owner."""
_LARGE = 1 << 21
_CHUNK = 64
"""BPF_PROG_CHUNK_SIZE (kernel/bpf/core.c)."""
_INT3 = b"\xcc"
_LOW = 1 << 20
"""Physical memory that real mode reaches."""
_VSYSCALL = 0xFFFFFFFFFF600000
"""VSYSCALL_ADDR (asm/vsyscall.h)."""
_ENTRY_AREA = 0xFFFFFE0000000000
"""CPU_ENTRY_AREA_BASE (asm/pgtable_64_types.h)."""
_ALIKE = 48
"""Bytes of a copy that are looked for in the image at once."""
_MOST_UNKNOWN = 1000

_ITS_PAGE = re.compile(rb"(?:\xcc|\x41?\xff[\xe0-\xe7])+")
"""Nothing but jumps through a register and INT3 between them: ``its_allocate_thunk`` of arch/x86/kernel/alternative.c
(6.15 to 7.3).  The kernel's list of the pages that its own text uses is freed when it has booted (its_fini_core)."""

_BY_CONTENT = {
    "free": "INT3 all over: kept for code that may come",
    "its": "thunks against Indirect Target Selection, by their form",
    "unknown": "belongs to nothing known",
}


class _Owned(NamedTuple):
    start: int
    end: int
    kind: str
    what: str


def areas(
    kernel: Kernel, types: Types, modules: Iterable[Loaded], texts: dict[str, list[tuple[int, int]]]
) -> tuple[list[Area], list[Note]]:
    """All executable memory of the kernel's half by address, and what is to be said of it.

    ``texts`` has address and size of each module's executable memory, where its file told them.  Without page tables in
    the dump, or on a processor that can execute every page, nothing is told and that is said.
    """
    running = kernel.running
    tables = running.tables
    if tables is None:
        return [], [Note("areas", "executable memory is not listed: the dump has no page tables", False)]
    root, mode = tables
    bits = kernel.image.bits
    low = kernel.image.page_offset if bits == 32 else 1 << 63
    found = mapped.executable(running.memory.read_physical, root, mode, low)
    notes = []
    if not found.whole:
        text = "some page tables are not in the dump or lead to each other: executable memory is told in part"
        notes.append(Note("areas", text, False))
    if mode.entry == 4 or _executes_data(kernel, found.runs):
        return [], [Note("areas", "executable memory is not listed: this kernel may execute every page", False)]
    owners = _Owners(kernel, types, found.runs)
    result: list[Area] = []
    # The kernel's types are asked for only where there is something that they may tell of.
    for owned in (owners.few(modules, texts), owners.all):
        parts = owned if isinstance(owned, list) else owned()
        result = [area for run in found.runs for area in _divided(run, parts, owners)]
        if all(a.known for a in result):
            break
    unknown = [a for a in result if not a.known]
    for area in unknown[:_MOST_UNKNOWN]:
        notes.append(
            Note("region-unknown", f"executable region of {area.size} bytes that belongs to nothing known", True, None,
                 area.address)
        )  # fmt: skip
    if len(unknown) > _MOST_UNKNOWN:
        notes.append(Note("region-unknown", f"{len(unknown) - _MOST_UNKNOWN} more of them", True))
    return result, notes


def _executes_data(kernel: Kernel, runs: list[mapped.Run]) -> bool:
    """Whether the kernel's own data can be executed: then the processor, or the kernel, has no NX."""
    section = kernel.image.section(".data")
    if section is None:
        return False
    at = kernel.moved(section.address + section.size // 2)
    return any(run.address <= at < run.address + run.size for run in runs)


def _divided(run: mapped.Run, owned: list[_Owned], owners: _Owners) -> Iterator[Area]:
    """The parts of a run by owner, what touches and is of one owner together."""
    at, end = run.address, run.address + run.size
    i = max(0, bisect_right(owned, (at, 1 << 65, "", "")) - 1)
    while at < end:
        while i < len(owned) and owned[i].end <= at:
            i += 1
        if i < len(owned) and owned[i].start <= at:
            stop = min(end, owned[i].end)
            yield Area(at, stop - at, owned[i].kind, owned[i].what)
        else:
            stop = min(end, owned[i].start) if i < len(owned) else end
            yield from owners.rest(at, stop)
        at = stop


class _Owners:
    def __init__(self, kernel: Kernel, types: Types, runs: list[mapped.Run]) -> None:
        self._runs = runs
        self._kernel = kernel
        self._view = kernel.view
        self._types = types
        self._few: list[_Owned] = []

    def few(self, modules: Iterable[Loaded], texts: dict[str, list[tuple[int, int]]]) -> list[_Owned]:
        """What is known without the kernel's types, in ascending order and without overlaps."""
        parts: list[_Owned] = []
        for module in modules:
            regions = texts.get(module.name) or [(r.address, r.size) for r in module.regions if r.exec]
            for address, size in regions:
                parts.append(_Owned(address, address + size, "module", module.name))
            for page in module.its_pages:
                what = f"thunks of {module.name} against Indirect Target Selection"
                parts.append(_Owned(page, page + PAGE, "its", what))
        parts += self._image()
        parts += self._packs()
        parts += self._fixed()
        self._few = parts
        return _apart(parts)

    def all(self) -> list[_Owned]:
        """What every owner says that it has."""
        parts = list(self._few)
        for owner in (self._bpf, self._ftrace, self._kprobes, self._its):
            parts += owner()
        return _apart(parts)

    def rest(self, start: int, end: int) -> Iterator[Area]:
        """What belongs to no owner: filled with INT3, a copy of the image's real-mode code, or unknown."""
        at = start
        size = self._kernel.image.bits // 8
        while at < end:
            # A cache of memory for code is executable in large pages, of which the part that is free is all INT3.
            stop = min(end, (at // PAGE + 1) * PAGE)
            kind = self._kind_of_page(at, stop - at)
            what = _BY_CONTENT[kind]
            data = self._view.read(at, stop - at)
            if data is not None and not any(data) and stop - at < size:
                kind, what = "free", "alignment"
            while stop < end and kind == self._kind_of_page(stop, min(PAGE, end - stop)):
                stop = min(end, stop + PAGE)
            if kind == "unknown" and self._is_real_mode(at, stop):
                kind, what = "real mode", "a copy of the image's code that starts processors and wakes from sleep"
            elif kind == "unknown" and self._is_old_program(at, stop):
                kind, what = "bpf", "a BPF program by its header: classic ones are on no list"
            yield Area(at, stop - at, kind, what)
            at = stop

    def _kind_of_page(self, address: int, length: int) -> str:
        data = self._view.read(address, length)
        if data is None:
            return "unknown"
        if data.count(_INT3) == len(data):
            return "free"
        return "its" if _ITS_PAGE.fullmatch(data) else "unknown"

    def _is_old_program(self, start: int, end: int) -> bool:
        """Whether pages are those of one BPF program, before such programs were packed (5.18).

        ``struct bpf_binary_header`` begins with the number of its pages, and INT3 fills what the program leaves
        (kernel/bpf/core.c of 5.10).  ``bpf_kallsyms`` leaves out programs that were classic BPF.
        """
        if self._kernel.lookup("bpf_kallsyms") is None or self._kernel.lookup("pack_list") is not None:
            return False
        data = self._view.read(start, end - start)
        return data is not None and int.from_bytes(data[:4], "little") * PAGE == len(data) and data.endswith(_INT3)

    def _is_real_mode(self, start: int, end: int) -> bool:
        """Whether pages of the first megabyte hold what the image has, but for the fields that its loader filled in."""
        direct = self._kernel.running.direct_map
        if direct is None or not 0 <= start - direct < end - direct <= _LOW:
            return False
        data = self._view.read(start, end - start)
        image = self._kernel.image.data
        if data is None:
            return False
        first, last = self._blob()
        for at in range(0, min(len(data) - _ALIKE, PAGE), _ALIKE):
            piece = data[at : at + _ALIKE]
            place = image.find(piece, first, last) if len(set(piece)) > 8 else -1
            if place >= at:
                own = image[place - at : place - at + len(data)].ljust(len(data), b"\0")
                alike = sum(a == b for a, b in zip(own, data, strict=True))
                return alike * 10 >= len(data) * 9
        return False

    def _blob(self) -> tuple[int, int]:
        """Where in the image's bytes its real-mode code is: anywhere, unless its symbols tell (realmode/rm/piggy.S)."""
        image = self._kernel.image
        ends = [image.symbols.lookup(name) for name in ("real_mode_blob", "real_mode_blob_end")]
        try:
            first, last = (image.offset_of(end) for end in ends if end is not None)
        except (AddressError, ValueError):
            return 0, len(image.data)
        return first, last

    # Owners

    def _image(self) -> Iterator[_Owned]:
        """The image's own text, to the end of the large page that it is mapped by; its other code by section."""
        image = self._kernel.image
        text = image.section(".text")
        for section in image.sections:
            if section.exec and section.alloc and section.size:
                yield self._of_section(section)
        if text is not None:
            start, end = self._moved(text.address), self._moved(text.end)
            rounded = -(-end // _LARGE) * _LARGE
            if rounded > end:
                yield _Owned(end, rounded, "kernel", "behind the text, in its last large page")
            low = start // _LARGE * _LARGE
            if low < start:
                yield _Owned(low, start, "kernel", "in front of the text, in its first large page")

    def _of_section(self, section: Section) -> _Owned:
        start = self._moved(section.address)
        return _Owned(start, start + section.size, "kernel", section.name)

    def _bpf(self) -> Iterator[_Owned]:
        """Programs, trampolines and dispatchers (``bpf_kallsyms``, kernel/bpf/core.c)."""
        node = self._offset("bpf_ksym", "lnode")
        start_at, end_at = self._offset("bpf_ksym", "start"), self._offset("bpf_ksym", "end")
        name_at = self._offset("bpf_ksym", "name")
        if None not in (node, start_at, end_at, name_at):
            for at in self._list("bpf_kallsyms", node or 0):
                start, end = self._view.word(at + (start_at or 0)), self._view.word(at + (end_at or 0))
                if start and end and 0 < end - start <= _LARGE:
                    name = self._view.text(at + (name_at or 0), 512) or "?"
                    # A program's header is in front of it, in its first chunk (bpf_jit_binary_pack_hdr).
                    yield _Owned(start // _CHUNK * _CHUNK, -(-end // _CHUNK) * _CHUNK, "bpf", name)

    def _packs(self) -> Iterator[_Owned]:
        """The packs that BPF programs lie in.

        ``struct bpf_prog_pack`` of 5.18 to 7.3 begins with its list and a pointer.  Each has 2 MiB a node, or one
        page; behind it is a page that is not mapped.
        """
        for at in self._list("pack_list", 0):
            place = self._view.word(at + 2 * self._view.size)
            if place and not place % PAGE:
                i = bisect_right(self._runs, (place, 1 << 65)) - 1
                end = self._runs[i].address + self._runs[i].size if i >= 0 else 0
                if end > place:
                    yield _Owned(place, min(end, place + _LARGE), "bpf", "a pack of BPF programs")

    def _ftrace(self) -> Iterator[_Owned]:
        """Trampolines of those who trace (``struct ftrace_ops``)."""
        where, size_at = self._offset("ftrace_ops", "trampoline"), self._offset("ftrace_ops", "trampoline_size")
        node = self._offset("ftrace_ops", "list")
        if where is None or size_at is None or node is None:
            return
        found = list(self._list("ftrace_ops_trampoline_list", node))
        head = self._kernel.lookup("ftrace_ops_list")
        following = self._offset("ftrace_ops", "next")
        at = self._view.word(head) if head is not None and following is not None else None
        seen: set[int] = set()
        while at and at not in seen and len(seen) < _MOST:
            seen.add(at)
            at = self._view.word(at + (following or 0))
        for ops in [*found, *seen]:
            start, size = self._view.word(ops + where), self._view.word(ops + size_at)
            if start and size and size <= _LARGE:
                pages = -(-(start % PAGE + size) // PAGE) * PAGE
                first = start // PAGE * PAGE
                yield _Owned(first, first + pages, "ftrace", f"a trampoline of the ftrace_ops at {ops:#x}")

    def _kprobes(self) -> Iterator[_Owned]:
        """Pages of copied instructions (kernel/kprobes.c, ``struct kprobe_insn_page``)."""
        node, page = self._offset("kprobe_insn_page", "list"), self._offset("kprobe_insn_page", "insns")
        pages = self._offset("kprobe_insn_cache", "pages")
        if node is None or page is None or pages is None:
            return
        for name, what in (("kprobe_insn_slots", "instructions"), ("kprobe_optinsn_slots", "detours")):
            head = self._kernel.lookup(name)
            for at in self._view.listed(head + pages, _MOST) if head is not None else ():
                place = self._view.word(at - node + page)
                if place and not place % PAGE:
                    yield _Owned(place, place + PAGE, "kprobe", f"{what} of probed functions")

    def _its(self) -> Iterator[_Owned]:
        """Pages of thunks against Indirect Target Selection that the kernel itself uses (``its_pages``)."""
        at = self._kernel.lookup("its_pages")
        pages, number = self._offset("its_array", "pages"), self._offset("its_array", "num")
        if at is not None and pages is not None and number is not None:
            place, count = self._view.word(at + pages), self._view.int32(at + number)
            if place and count and 0 < count <= _MOST:
                yield from self._pages(place, count)
        single = self._kernel.lookup("its_page")
        place = self._view.word(single) if single is not None else None
        if place and not place % PAGE:
            yield _Owned(place, place + PAGE, "its", "thunks against Indirect Target Selection")

    def _pages(self, place: int, count: int) -> Iterator[_Owned]:
        data = self._view.read(place, count * self._view.size)
        for page in self._view.words(data) if data is not None else ():
            yield _Owned(page, page + PAGE, "its", "thunks against Indirect Target Selection")

    def _fixed(self) -> Iterator[_Owned]:
        """What has a place of its own: vsyscall page, entry trampolines, a hypervisor's call page."""
        if self._kernel.image.bits == 64:
            yield _Owned(_VSYSCALL, _VSYSCALL + PAGE, "vsyscall", "the page of old system calls")
            yield _Owned(_ENTRY_AREA, _ENTRY_AREA + (1 << 39), "entry", "the processors' entry areas")
        else:
            direct = self._kernel.image.page_offset
            yield _Owned(direct + 0xA0000, direct + _LOW, "bios", "the BIOS, which PCI may call")
        at = self._kernel.lookup("hv_hypercall_pg")
        page = self._view.word(at) if at is not None else None
        if page and not page % PAGE:
            yield _Owned(page, page + PAGE, "hypercall", "Hyper-V's page of calls")

    # Reading

    def _moved(self, address: int) -> int:
        return self._kernel.moved(address)

    def _offset(self, name: str, member: str) -> int | None:
        return self._types.offset(name, member)

    def _list(self, name: str, node: int) -> Iterator[int]:
        """The objects of a list by its head's name; ``node`` is where the list hangs in each."""
        head = self._kernel.lookup(name)
        if head is not None:
            yield from (at - node for at in self._view.listed(head, _MOST))


def _apart(parts: list[_Owned]) -> list[_Owned]:
    """Without overlaps: of two owners of a byte the one that has less says more."""
    result: list[_Owned] = []
    for part in sorted(parts, key=lambda p: (p.end - p.start, p.start)):
        for piece in _outside(part, result):
            result.append(piece)
        result.sort()
    return result


def _outside(part: _Owned, known: list[_Owned]) -> list[_Owned]:
    """What is left of a part beside those that are known already (which are in order)."""
    pieces: list[_Owned] = []
    at = part.start
    i = max(0, bisect_right(known, (part.start, 1 << 65, "", "")) - 1)
    for other in known[i:]:
        if other.start >= part.end:
            break
        if other.end <= at:
            continue
        if other.start > at:
            pieces.append(part._replace(start=at, end=other.start))
        at = max(at, other.end)
    if at < part.end:
        pieces.append(part._replace(start=at))
    return pieces
