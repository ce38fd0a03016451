"""The instructions of an image: sensitive ones, those through paravirt slots, branches into sites.

What is looked at: every executable section, each a linear sweep that begins anew at every symbol, as a
disassembler's does.  A byte that starts no instruction is passed over alone.  Indirect branches and jump tables
are not followed.  Imports annotate, image, isa.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from vmipatch.annotate.parainstructions import operand
from vmipatch.annotate.site import Site
from vmipatch.audit.finding import Swept
from vmipatch.audit.places import Sites
from vmipatch.audit.tables import inside
from vmipatch.errors import ImageError
from vmipatch.image import Image
from vmipatch.image.model import PF_W
from vmipatch.isa import sensitive, sweep
from vmipatch.isa.opcodes import Parts
from vmipatch.isa.sensitive import Sensitive

_INDIRECT = ("one", 0xFF)
_THROUGH_MEMORY = frozenset((0x15, 0x25))
"""ModRM bytes of a call and a jump through a pointer at a fixed place (FF /2 and /4)."""
_PADDING = b"\x90\xcc"
_BOUNDS = (("_stext", "_etext"), ("_text", "_etext"), ("_sinittext", "_einittext"))


class Range(NamedTuple):
    """Instruction bytes at a virtual address."""

    section: str
    address: int
    data: bytes

    @property
    def end(self) -> int:
        """The virtual address just after it."""
        return self.address + len(self.data)


class Instruction(NamedTuple):
    """A sensitive instruction, or (``slot`` not None) a call or jump through a function pointer.

    ``address`` and ``slot`` are virtual.
    """

    range: Range
    address: int
    code: bytes
    kind: Sensitive | None
    slot: int | None


class Inward(NamedTuple):
    """A branch at ``address`` to ``target``, inside a site that does not hold the branch (all virtual)."""

    range: Range
    address: int
    length: int
    target: int
    site: Site


def ranges(image: Image) -> tuple[list[Range], list[str]]:
    """Where the instructions are, and what cannot be told.

    Executable sections at kernel addresses; without sections executable segments that are not writable; in raw
    memory what lies between ``_stext`` (``_text``) and ``_etext``, and ``_sinittext`` and ``_einittext``.
    """
    if image.sections:
        placed = [s for s in image.code_sections if s.alloc and s.file_size]
        if image.container == "module":
            return [Range(s.name, s.address, image.read(s.address, s.size)) for s in placed], []
        floor = _floor(image)
        own = [s for s in placed if s.address >= floor] or placed
        skipped = [f"{s.name}: below the kernel's addresses, code of ring 3" for s in placed if s not in own]
        return [Range(s.name, s.address, bytes(image.data[s.offset : s.offset + s.size])) for s in own], skipped
    found = [
        Range("", s.address, bytes(image.data[s.offset : s.offset + s.file_size]))
        for s in image.segments
        if s.exec and not s.flags & PF_W and s.file_size
    ]
    if found:
        return found, []
    for first, last in _BOUNDS:
        start, end = image.symbols.lookup(first), image.symbols.lookup(last)
        known = start is not None and end is not None and start < end
        if known and not any(r.end == end for r in found):
            assert start is not None
            assert end is not None
            found.append(Range("", start, image.read(start, end - start)))
    if found:
        return found, []
    return [], ["instructions: no sections and no symbols say where they are (give --system-map)"]


def _floor(image: Image) -> int:
    """The lowest virtual address of the kernel's own code, 0 where nothing tells."""
    try:
        return image.text_map
    except ImageError:
        return 0


def pieces(image: Image, places: Iterable[Range]) -> list[list[int]]:
    """Offsets in each range at which a sweep begins anew, the end last."""
    starts = image.symbols.addresses()
    cuts = []
    for place in places:
        first, last = bisect_left(starts, place.address + 1), bisect_left(starts, place.end)
        own = [0, *(a - place.address for a in starts[first:last]), len(place.data)]
        # Nothing between two but padding of one byte each, as in front of most functions: no need to begin twice.
        data = place.data
        padded = [data[at] in _PADDING and not data[at:end].strip(_PADDING) for at, end in pairwise(own)]
        cuts.append([at for at, passed in zip(own, (False, *padded), strict=True) if not passed])
    return cuts


class Sweeper:
    """One pass over an image's instructions; :attr:`swept` fills as :meth:`run` goes on."""

    def __init__(self, image: Image, sites: Sites, slots: Iterable[int]) -> None:
        self._bits = image.bits
        self._slots = frozenset(slots)
        self._wanted = dict(sensitive.wanted(image.bits))
        if self._slots:
            self._wanted[_INDIRECT] = (self._wanted[_INDIRECT] or frozenset()) | _THROUGH_MEMORY
        self._sites = sites
        self._ranges, self.skipped = ranges(image)
        self._cuts = pieces(image, self._ranges)
        self._inside = {place.address: sites.inside(place.address, len(place.data)) for place in self._ranges}
        self.swept: list[Swept] = []

    def run(self, progress: Callable[[str], None]) -> Iterator[Instruction | Inward]:
        """Every instruction that may be a finding, in ascending order range by range."""
        for place, cuts in zip(self._ranges, self._cuts, strict=True):
            progress(f"instructions of {place.section or hex(place.address)} ({len(place.data) >> 10} KiB)")
            yield from self._sweep(place, cuts)

    def _sweep(self, place: Range, cuts: list[int]) -> Iterator[Instruction | Inward]:
        data, base = place.data, place.address
        undecoded = 0
        stops = sweep.sweep(data, base, cuts, self._bits, self._wanted, self._inside[base])
        for what, first, last, target, parts in stops:
            if what == sweep.BRANCH:
                site = self._entered(target, base + first)
                if site is not None:
                    yield Inward(place, base + first, last - first, target, site)
            elif parts is not None:
                code = data[first:last]
                kind = sensitive.classify(code, parts, self._bits)
                slot = None if kind else self._slot(code, parts, base + first)
                if kind or slot is not None:
                    yield Instruction(place, base + first, code, kind, slot)
            else:
                undecoded += 1
        self.swept.append(Swept(place.section, base, len(data), undecoded))

    def _slot(self, code: bytes, parts: Parts, address: int) -> int | None:
        """The paravirt slot that an indirect call or jump goes through, or None."""
        if parts.opcode != _INDIRECT:
            return None
        opcode = parts.after - 1
        slot = operand(code[opcode:], address + opcode, self._bits)
        return slot if slot in self._slots else None

    def _entered(self, target: int, source: int) -> Site | None:
        """The site that holds a target beyond its first byte; None if none does that does not hold the source too."""
        for place in self._ranges:
            if place.address <= target < place.end and not self._inside[place.address][target - place.address]:
                return None
        held = self._sites.holding(target)
        if any(s.address < target and not s.address <= source < s.end for s in held):
            return inside(held, target)
        return None
