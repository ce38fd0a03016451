"""Findings with their places: section, symbol, offset in the file, and counts for each function.

Imports annotate.codesites, annotate.site, image, errors and its sister finding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import attrgetter, le

from vmipatch.annotate.site import Detailed, Finding, Places, Site
from vmipatch.audit.finding import KINDS, SEVERITIES, FunctionCount
from vmipatch.errors import AddressError
from vmipatch.image import Image

MOST = 50_000
"""Findings of one identifier that are kept; more are counted only: no kernel has as many, a damaged one may."""


MOST_SHARED = 64
"""Sites on the same bytes that are looked at: no kernel has as many, a damaged table may."""


class Collector:
    """Takes findings, and counts them by identifier and by function."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._found: list[Finding] = []
        self._functions: dict[tuple[str, str | None, str], tuple[int, Counter[str]]] = {}
        self.counts: Counter[str] = Counter()

    def add(
        self,
        id: str,
        message: str,
        *,
        address: int | None = None,
        length: int | None = None,
        section: str | None = None,
        severity: str | None = None,
        what: str | None = None,
        details: Mapping[str, Detailed] | None = None,
    ) -> None:
        """One finding; ``what`` is what the function's count tells apart (an instruction, a slot).

        The severity is the identifier's own unless given.  Without a section the one that the address is in is said.
        """
        image = self._image
        symbol, distance = image.symbols.at(address) or (None, None) if address is not None else (None, None)
        if section is None:
            at = image.section_at(address) if address is not None else None
            section = at.name if at is not None else ""
        self.counts[id] += 1
        if what is not None and address is not None:
            _, kinds = self._functions.setdefault((id, symbol, section), (address, Counter()))
            kinds[what] += 1
        if self.counts[id] > MOST:
            return
        self._found.append(
            Finding(
                id,
                severity or KINDS[id].severity,
                message,
                section,
                address,
                self._offset(address),
                length,
                symbol,
                distance,
                dict(details or {}),
            )
        )

    def take(self, findings: Iterable[Finding]) -> None:
        """Findings of a scan, with what they lack."""
        for found in findings:
            self.counts[found.id] += 1
            named = self._image.symbols.at(found.address) if found.address is not None else None
            symbol, distance = named or (None, None)
            offset = self._offset(found.address)
            self._found.append(replace(found, offset=offset, symbol=symbol, symbol_offset=distance))

    def _offset(self, address: int | None) -> int | None:
        try:
            return None if address is None else self._image.offset_of(address)
        except AddressError:
            return None

    def findings(self) -> tuple[Finding, ...]:
        """All of them: errors first, then by identifier and address."""
        rank = {severity: -i for i, severity in enumerate(SEVERITIES)}
        return tuple(sorted(self._found, key=lambda f: (rank[f.severity], f.id, f.address or 0, f.message)))

    def functions(self) -> tuple[FunctionCount, ...]:
        """The counts of every function, the most first."""
        found = [
            FunctionCount(id, symbol, section, first, kinds.total(), tuple(kinds.most_common()))
            for (id, symbol, section), (first, kinds) in self._functions.items()
        ]
        return tuple(sorted(found, key=lambda c: (c.id, -c.count, c.address)))

    def dropped(self) -> list[str]:
        """A line for each identifier of which there were more than are kept."""
        return [f"{id}: {n - MOST} more findings are counted only" for id, n in self.counts.items() if n > MOST]


class Cluster:
    """Sites that touch the same bytes, directly or through one another; by address, longer ones first."""

    __slots__ = ("address", "end", "partial", "sites")

    def __init__(self, first: Site) -> None:
        self.address = first.address
        self.end = first.end
        self.partial = False
        self.sites = [first]


class Clusters:
    """All sites of an image, those together that overlap."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.all: list[Cluster] = []
        open_ends: list[tuple[int, int]] = []
        # By address, the longest first: two sorts by one column each are faster than one by a tuple.
        longest = sorted((s for s in sites if s.length), key=attrgetter("length"), reverse=True)
        for site in sorted(longest, key=attrgetter("address")):
            last = self.all[-1] if self.all else None
            if last is None or site.address >= last.end:
                self.all.append(Cluster(site))
                open_ends = [(site.address, site.end)]
                continue
            while open_ends and open_ends[-1][1] <= site.address:
                open_ends.pop()
            if open_ends and site.end > open_ends[-1][1] and site.address != open_ends[-1][0]:
                last.partial = True
            open_ends.append((site.address, site.end))
            last.sites.append(site)
            last.end = max(last.end, site.end)
        self._starts = [c.address for c in self.all]

    def at(self, address: int) -> Cluster | None:
        """The cluster that an address is in, or None."""
        i = bisect_right(self._starts, address) - 1
        return self.all[i] if i >= 0 and address < self.all[i].end else None

    def between(self, start: int, end: int) -> list[Cluster]:
        """Those that have bytes in a range of virtual addresses."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        return [c for c in self.all[first : bisect_left(self._starts, end)] if c.end > start]


_LENGTH = 32
_MOST_LENGTH = (1 << _LENGTH) - 1


def _ascending(values: Sequence[int]) -> Sequence[int]:
    """The numbers of values, the lowest value's first."""
    numbers = range(len(values))
    return numbers if all(map(le, values, values[1:])) else sorted(numbers, key=values.__getitem__)


class Sites:
    """All sites of an image: those that are objects, and those of whole tables in bulk."""

    def __init__(self, sites: Sequence[Site], bulk: Sequence[Places] = ()) -> None:
        self._sites = sites
        self._clusters = Clusters(sites)
        self._bulk = bulk
        self._order = [_ascending(p.addresses) for p in bulk]
        self._starts = [
            p.addresses if isinstance(order, range) else [p.addresses[i] for i in order]
            for p, order in zip(bulk, self._order, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._sites) + sum(len(places.addresses) for places in self._bulk)

    def holding(self, address: int) -> list[Site]:
        """Sites that hold an address; not all where very many share it."""
        cluster = self._clusters.at(address)
        found = [s for s in cluster.sites[:MOST_SHARED] if s.address <= address < s.end] if cluster else []
        for places, starts, order in zip(self._bulk, self._starts, self._order, strict=True):
            i = bisect_right(starts, address) - 1
            if i >= 0 and address < starts[i] + places.length:
                found.append(places.site(order[i]))
        return found

    def inside(self, start: int, size: int) -> bytearray:
        """For each of ``size`` bytes from a virtual address whether it may be inside a site, and not its first."""
        marks = bytearray(size)
        for cluster in self._clusters.between(start, start + size):
            first, last = max(cluster.address + 1 - start, 0), min(cluster.end - start, size)
            if last > first:
                marks[first:last] = b"\1" * (last - first)
        for places, starts in zip(self._bulk, self._starts, strict=True):
            rest = places.length - 1
            ones = b"\1" * rest
            low, high = bisect_left(starts, start), bisect_left(starts, start + size - rest)
            for first in [address - start + 1 for address in starts[low:high]]:
                marks[first : first + rest] = ones
        return marks

    def shared(self, *, but: Container[str]) -> Clusters:
        """The sites that share bytes with others, of all families but some."""
        own = [s for s in self._sites if s.length and s.family not in but]
        bulk = [
            one for one in zip(self._bulk, self._starts, self._order, strict=True) if one[0].table.family not in but
        ]
        # Start and length in one number: a hundred thousand of those sort fast.
        spans = [site.address << _LENGTH | site.length for site in own]
        for places, starts, _ in bulk:
            spans += [start << _LENGTH | places.length for start in starts]
        spans.sort()
        firsts = [span >> _LENGTH for span in spans]
        reach = accumulate((first + (span & _MOST_LENGTH) for first, span in zip(firsts, spans, strict=True)), max)
        # Starts that something before them reaches beyond: who holds one of those shares it.
        shared = sorted({first for first, end in zip(firsts[1:], reach, strict=False) if first < end})
        found = [s for s in own if bisect_left(shared, s.end) > bisect_left(shared, s.address)]
        for places, starts, order in bulk:
            held = {bisect_right(starts, first) - 1 for first in shared}
            found += [
                places.site(order[i])
                for i in sorted(held)
                if i >= 0 and bisect_left(shared, starts[i] + places.length) > bisect_left(shared, starts[i])
            ]
        return Clusters(found)


class Spans:
    """A set of addresses, as ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif end > start:
                self._starts.append(start)
                self._ends.append(end)

    def __contains__(self, address: int) -> bool:
        i = bisect_right(self._starts, address) - 1
        return i >= 0 and address < self._ends[i]
