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
from vmipatch.audit.finding import Swept
from vmipatch.audit.places import Cluster, Clusters
from vmipatch.errors import ImageError
from vmipatch.image import Image
from vmipatch.image.model import PF_W
from vmipatch.isa import sensitive, sweep
from vmipatch.isa.sensitive import Sensitive

_INDIRECT = ("one", 0xFF)
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
    cluster: Cluster


def ranges(image: Image) -> tuple[list[Range], list[str]]:
    """Where the instructions are, and what cannot be told.

    Executable sections at kernel addresses; without sections executable segments that are not writable; in raw
    memory what lies between ``_stext`` (``_text``) and ``_etext``, and ``_sinittext`` and ``_einittext``.
    """
    if image.sections:
        placed = [s for s in image.sections if s.exec and s.alloc and s.file_size]
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
    starts = sorted({address for address, _, _ in image.symbols.all()})
    cuts = []
    for place in places:
        first, last = bisect_left(starts, place.address + 1), bisect_left(starts, place.end)
        cuts.append([0, *(a - place.address for a in starts[first:last]), len(place.data)])
    return cuts


class Sweeper:
    """One pass over an image's instructions; :attr:`swept` fills as :meth:`run` goes on."""

    def __init__(self, image: Image, clusters: Clusters, slots: Iterable[int]) -> None:
        self._bits = image.bits
        self._slots = frozenset(slots)
        self._clusters = clusters
        self._ranges, self.skipped = ranges(image)
        self._cuts = pieces(image, self._ranges)
        self.swept: list[Swept] = []

    def run(self, progress: Callable[[str], None]) -> Iterator[Instruction | Inward]:
        """Every instruction that may be a finding, in ascending order range by range."""
        for place, cuts in zip(self._ranges, self._cuts, strict=True):
            progress(f"instructions of {place.section or hex(place.address)} ({len(place.data) >> 10} KiB)")
            yield from self._sweep(place, cuts)

    def _inside(self, place: Range) -> bytearray:
        """For each byte of a range whether it is inside a site, and not a site's first."""
        marks = bytearray(len(place.data))
        size = len(marks)
        for cluster in self._clusters.all:
            if cluster.end <= place.address or cluster.address >= place.end:
                continue
            first = max(cluster.address + 1 - place.address, 0)
            last = min(cluster.end - place.address, size)
            if last > first:
                marks[first:last] = b"\1" * (last - first)
        return marks

    def _sweep(self, place: Range, cuts: list[int]) -> Iterator[Instruction | Inward]:
        bits, data, base = self._bits, place.data, place.address
        mask = (1 << bits) - 1
        wanted = sensitive.opcodes(bits) | {_INDIRECT}
        inner, size = self._inside(place), len(data)
        undecoded = 0
        for cut, stop in pairwise(cuts):
            for group, first, last in sweep.sweep(data, cut, stop, bits, wanted):
                if group == sweep.BRANCH:
                    target = sensitive.branch_target(data, first, last, base, bits)
                    at = (target - base) & mask
                    # Most branches stay in their range and go to no site.
                    if at < size and not inner[at]:
                        continue
                    cluster = self._entered(target, base + first)
                    if cluster is not None:
                        yield Inward(place, base + first, last - first, target, cluster)
                elif group == sweep.WANTED:
                    code = data[first:last]
                    kind = sensitive.classify(code, bits)
                    slot = None if kind else self._slot(code, base + first)
                    if kind or slot is not None:
                        yield Instruction(place, base + first, code, kind, slot)
                else:
                    undecoded += 1
        self.swept.append(Swept(place.section, base, size, undecoded))

    def _slot(self, code: bytes, address: int) -> int | None:
        """The paravirt slot that an indirect call or jump goes through, or None."""
        _, opcode, at = sensitive.opcode_at(code, self._bits)
        if opcode != _INDIRECT:
            return None
        slot = operand(code[at - 1 :], address + at - 1, self._bits)
        return slot if slot in self._slots else None

    def _entered(self, target: int, source: int) -> Cluster | None:
        """The cluster with a site that holds a target beyond its first byte, and does not hold the source."""
        cluster = self._clusters.at(target)
        if cluster is None:
            return None
        for site in cluster.sites[:64]:
            if site.address < target < site.end and not site.address <= source < site.end:
                return cluster
        return None
