"""Runs every family over an image, and looks at their sites together."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib import import_module
from itertools import accumulate, islice, repeat
from operator import add, attrgetter, gt, le
from typing import TYPE_CHECKING

from vmipatch.annotate import presence
from vmipatch.annotate.family import FAMILIES
from vmipatch.annotate.site import Finding, Places, Scan, Site
from vmipatch.errors import UsageError

if TYPE_CHECKING:
    from vmipatch.image import Image


def scan(
    image: Image,
    families: Iterable[str] | None = None,
    layouts: Mapping[str, str] | None = None,
    bulk: Container[str] = (),
    *,
    compare: bool = True,
) -> Scan:
    """Every site of the given families; by default those of the listed ones, and the entries of the others counted.

    ``layouts`` overrides what the evidence says, by family name.  The sites of the families in ``bulk`` are read
    without an object for each, where all entries of their tables make sense.  Without ``compare`` sites that share
    bytes are no finding.  Raises
    :class:`UsageError` for a family or a layout that does not exist.
    """
    wanted = list(FAMILIES if families is None else families)
    layouts = dict(layouts or {})
    for name in (*wanted, *layouts):
        if name not in FAMILIES:
            raise UsageError(f"no family named {name!r}; there are: {', '.join(FAMILIES)}")
    tables, sites, findings, read = [], [], presence.of_kind(image), []
    in_bulk: list[Places] = []
    if image.kind == "xen":
        return Scan((), (), tuple(findings))
    for name in wanted:
        family = FAMILIES[name]
        module = import_module(f"vmipatch.annotate.{family.module or 'counted'}")
        if name in bulk and (places := module.bulk(image)) is not None:
            tables += [one.table for one in places]
            in_bulk += places
            read.append(name)
            continue
        if not family.module:
            more = module.scan(image, name, layouts.get(name))
        elif families is None and not family.listed:
            more = module.count(image)
        else:
            more = module.scan(image, layouts.get(name))
            read.append(name)
        tables += more[0]
        sites += more[1]
        findings += more[2]
    findings += presence.missing(image, tables, wanted)
    if compare:
        findings += overlaps(sites, in_bulk)
    return Scan(tuple(tables), tuple(sites), tuple(findings), tuple(read), tuple(in_bulk))


def overlaps(sites: list[Site], bulk: Sequence[Places] = ()) -> list[Finding]:
    """Sites that share some bytes but neither holds the other: no order of patching makes sense of both."""
    found = []
    open_sites: list[Site] = []
    for site in _sharing(sites, bulk):
        open_sites = [s for s in open_sites if s.address + s.length > site.address]
        for other in open_sites:
            if site.address + site.length > other.address + other.length and site.address != other.address:
                text = f"overlaps the {other.family} site of {other.length} bytes at {other.address:#x}"
                found.append(Finding("site-overlap", "error", text, site.table, site.address))
                break
        open_sites.append(site)
    return found


def _sharing(sites: Sequence[Site], bulk: Sequence[Places]) -> list[Site]:
    """The sites of more than one byte that share bytes with another, by address, the longest first.

    Of those in bulk: all that may.
    """
    # Most tables are sorted, and all but a few sites stand alone.
    sites = [s for s in sites if s.length > 1]
    placed = sorted([*sites, *_touched(sites, bulk)], key=attrgetter("address"))
    starts = [s.address for s in placed]
    ends = accumulate(map(add, starts, [s.length for s in placed]), max)
    joined = list(map(gt, ends, islice(starts, 1, None)))
    some = [s for s, before, after in zip(placed, [False, *joined], [*joined, False], strict=False) if before or after]
    return sorted(some, key=lambda s: (s.address, -s.length))


def _touched(sites: Sequence[Site], bulk: Sequence[Places]) -> list[Site]:
    """The sites in bulk that share bytes with others."""
    found = []
    tables = [(places, *_ascending(places.addresses)) for places in bulk]
    for places, starts, numbers in tables:
        length = places.length
        held = set[int]()
        ranges = [(s.address, s.address + s.length) for s in sites]
        ranges += [(a, a + other.length) for other in bulk if other is not places for a in other.addresses]
        for start, end in ranges:
            first = bisect_left(starts, start - length + 1)
            if first < len(starts) and starts[first] < end:
                held.update(range(first, bisect_left(starts, end)))
        if any(map(gt, map(add, starts, repeat(length)), islice(starts, 1, None))):
            held.update(range(len(starts)))
        found += [places.site(numbers[number]) for number in sorted(held)]
    return found


def _ascending(values: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The values in ascending order, and the number that each of them has."""
    if all(map(le, values, islice(values, 1, None))):
        return values, range(len(values))
    numbers = sorted(range(len(values)), key=values.__getitem__)
    return [values[number] for number in numbers], numbers
