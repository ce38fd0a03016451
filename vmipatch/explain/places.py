"""Every place of the text that changed, with its bytes before, now and as they should be: what reports show.

Imports annotate, image, isa and its sisters in ``explain/``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmipatch.annotate import Site
from vmipatch.explain.ground import Ground, runs_of
from vmipatch.explain.result import Explanation
from vmipatch.explain.runs import boundary
from vmipatch.isa import decode

UNEXPLAINED = "unexplained"
MOST_LOOSE = 20_000
"""Places outside all sites that are told one by one: a dump may be damaged all over."""

_SAME_FAMILY = 4
_AROUND = 16


class Range(NamedTuple):
    """``length`` bytes at virtual ``address`` that changed, all of one ``cause``; or :data:`UNEXPLAINED`."""

    address: int
    length: int
    cause: str


class Place(NamedTuple):
    """One site that changed, or a run of bytes outside all sites.

    ``address`` is virtual, as linked.  ``original`` are the image's bytes (moved by KASLR), ``found`` the dump's,
    ``expected`` what should stand there.  ``op`` is the site's, empty without a site; ``note`` the evidence
    for what was switched on at run time, or the hint of what is unexplained.
    """

    address: int
    cause: str
    op: str
    note: str
    original: bytes
    found: bytes
    expected: bytes


def ranges(explanation: Explanation) -> Iterator[Range]:
    """The bytes that changed, in ascending order; together as many as ``explained`` and ``unexplained_bytes``."""
    ground = _ground(explanation)
    for start, stop in _changed(ground):
        begin, cause = start, _cause(ground, start)
        for at in range(start + 1, stop):
            now = _cause(ground, at)
            if now != cause:
                yield Range(ground.base + begin, at - begin, cause)
                begin, cause = at, now
        yield Range(ground.base + begin, stop - begin, cause)


def places(explanation: Explanation) -> list[Place]:
    """Every changed place in ascending order of address; outside sites the first :data:`MOST_LOOSE`."""
    ground = _ground(explanation)
    index = _Index(explanation.sites)
    notes = {p.address: f"{p.cause}: {p.evidence}" for p in explanation.proved}
    hints = {u.address: u.hint for u in explanation.unexplained if u.hint}
    result: list[Place] = []
    at_site: dict[tuple[int, int], int] = {}
    loose = 0
    for run in ranges(explanation):
        site = index.of(run)
        if site is None:
            loose += 1
            if loose > MOST_LOOSE:
                continue
            first, last = _whole_instructions(ground, run)
        else:
            first, last = site.address, site.end
            if site.length == 1:  # a prefix: nobody can read it without its instruction
                last = _instruction_end(ground, first)
        note = hints.get(run.address, "") if run.cause == UNEXPLAINED else notes.get(first, "")
        known = at_site.get((first, last))
        if known is not None:
            # One byte without a cause makes the place unexplained; of several causes the first is named.
            if run.cause == UNEXPLAINED and result[known].cause != UNEXPLAINED:
                result[known] = result[known]._replace(cause=UNEXPLAINED, note=note)
            continue
        at_site[first, last] = len(result)
        low, high = first - ground.base, last - ground.base
        found, expected = bytes(ground.found[low:high]), bytes(ground.expected[low:high])
        op = site.op if site is not None else ""
        result.append(Place(first, run.cause, op, note, ground.pristine[low:high], found, expected))
    return sorted(result)


def _ground(explanation: Explanation) -> Ground:
    assert explanation.ground is not None
    return explanation.ground


def _changed(ground: Ground) -> Iterator[tuple[int, int]]:
    size = len(ground.found)
    found = int.from_bytes(ground.found, "little")
    mixed = (int.from_bytes(ground.pristine, "little") ^ found) | (int.from_bytes(ground.expected, "little") ^ found)
    return runs_of(mixed.to_bytes(size, "little"))


def _cause(ground: Ground, at: int) -> str:
    return UNEXPLAINED if ground.found[at] != ground.expected[at] else ground.cause_at(ground.base + at)


def _whole_instructions(ground: Ground, run: Range) -> tuple[int, int]:
    """From the start of the instruction that a run begins in to the run's end."""
    first = boundary(ground, run.address, ground.image.symbols.at(run.address))
    return max(first, run.address - _AROUND), run.address + run.length


def _instruction_end(ground: Ground, address: int) -> int:
    at = address - ground.base
    sizes = decode.lengths(bytes(ground.found[at : at + _AROUND]), ground.image.bits)
    return address + (sizes[0] if sizes else 1)


class _Index:
    """Which site a run of changed bytes belongs to."""

    def __init__(self, sites: Sequence[Site]) -> None:
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.family, []).append(site)
        self._groups = {name: sorted(group, key=lambda s: s.address) for name, group in groups.items()}
        self._starts = {name: [s.address for s in group] for name, group in self._groups.items()}

    def of(self, run: Range) -> Site | None:
        """The site of the cause's own family, else the smallest site that the run begins in."""
        own = self._at(run.cause, run.address)
        if own is not None:
            return own
        held = [s for name in self._groups if (s := self._at(name, run.address)) is not None]
        return min(held, key=lambda s: s.length, default=None)

    def _at(self, family: str, address: int) -> Site | None:
        starts = self._starts.get(family)
        if starts is None:
            return None
        group = self._groups[family]
        last = bisect_right(starts, address)
        held = [s for s in group[max(0, last - _SAME_FAMILY) : last] if s.end > address]
        return min(held, key=lambda s: s.length, default=None)
