"""Runs every family over an image, and looks at their sites together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from itertools import accumulate, islice
from operator import add, attrgetter, gt
from typing import TYPE_CHECKING

from vmipatch.annotate import presence
from vmipatch.annotate.family import FAMILIES
from vmipatch.annotate.site import Finding, Scan, Site
from vmipatch.errors import UsageError

if TYPE_CHECKING:
    from vmipatch.image import Image


def scan(image: Image, families: Iterable[str] | None = None, layouts: Mapping[str, str] | None = None) -> Scan:
    """Every site of the given families; by default those of the listed ones, and the entries of the others counted.

    ``layouts`` overrides what the evidence says, by family name.  Raises
    :class:`UsageError` for a family or a layout that does not exist.
    """
    wanted = list(FAMILIES if families is None else families)
    layouts = dict(layouts or {})
    for name in (*wanted, *layouts):
        if name not in FAMILIES:
            raise UsageError(f"no family named {name!r}; there are: {', '.join(FAMILIES)}")
    tables, sites, findings, read = [], [], presence.of_kind(image), []
    if image.kind == "xen":
        return Scan((), (), tuple(findings))
    for name in wanted:
        family = FAMILIES[name]
        module = import_module(f"vmipatch.annotate.{family.module or 'counted'}")
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
    findings += overlaps(sites)
    return Scan(tuple(tables), tuple(sites), tuple(findings), tuple(read))


def overlaps(sites: list[Site]) -> list[Finding]:
    """Sites that share some bytes but neither holds the other: no order of patching makes sense of both."""
    found = []
    open_sites: list[Site] = []
    for site in _sharing(sites):
        open_sites = [s for s in open_sites if s.address + s.length > site.address]
        for other in open_sites:
            if site.address + site.length > other.address + other.length and site.address != other.address:
                text = f"overlaps the {other.family} site of {other.length} bytes at {other.address:#x}"
                found.append(Finding("site-overlap", "error", text, site.table, site.address))
                break
        open_sites.append(site)
    return found


def _sharing(sites: Iterable[Site]) -> list[Site]:
    """The sites of more than one byte that share bytes with another, by address, the longest first."""
    # Most tables are sorted, and all but a few sites stand alone.
    placed = sorted((s for s in sites if s.length > 1), key=attrgetter("address"))
    starts = [s.address for s in placed]
    ends = accumulate(map(add, starts, [s.length for s in placed]), max)
    joined = list(map(gt, ends, islice(starts, 1, None)))
    some = [s for s, before, after in zip(placed, [False, *joined], [*joined, False], strict=False) if before or after]
    return sorted(some, key=lambda s: (s.address, -s.length))
