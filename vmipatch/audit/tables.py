"""Tables and sites of an image, whatever the text says: alignment, tails, overlaps, exception-table entries.

Imports annotate, patch.rules, image, errors and its sisters.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping

from vmipatch.annotate import Scan, Site, TableInfo
from vmipatch.annotate.site import Detailed
from vmipatch.annotate.tables import Layout, find_tables, load_format
from vmipatch.audit.places import Clusters, Collector, Sites
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.patch.rules import Version, choose

EX_TABLE = "ex_table"
EVERY_CALL = ("call_sites",)
"""Families that name every call of the kernel: to share bytes with other tables is what they are for."""
NAMED = 8
"""Entries that a finding names; the rest are counted."""

_BEFORE_BOOT, _ANY_TIME = -1, 1000
_EARLY = ("vmi", "afterburn")


class Order:
    """In which order a kernel writes the sites of its families, as far as it is known."""

    def __init__(self, image: Image, scan: Scan, kernel: Version | None) -> None:
        self.why = ""
        self._ranks: dict[str, int] = dict.fromkeys(_EARLY, _BEFORE_BOOT)
        try:
            rules, _ = choose(kernel or image.version, scan.tables, image.path)
        except PatchError as error:
            self.why = error.message
        else:
            self._ranks |= {family: i for i, family in enumerate(rules.boot)}

    def rank(self, family: str) -> int:
        """The place of a family's pass; those that no pass of the boot writes come last."""
        return self._ranks.get(family, _ANY_TIME)

    def any_time(self, family: str) -> bool:
        """Whether a family's sites are written whenever the kernel likes, after the boot too."""
        return not self.why and self.rank(family) == _ANY_TIME


def tables(collector: Collector, found: tuple[TableInfo, ...], *, placed: bool) -> None:
    """Tables that begin off their alignment (where they are ``placed`` already), or whose last entry is short."""
    for table in found:
        layouts = {layout.name: layout for layout in load_format(table.family).layouts}
        layout = layouts.get(table.layout or "")
        if layout is None or not table.size:
            continue  # unreadable, or what a scan found without a table of that format
        align = alignment(layout)
        details: dict[str, Detailed] = {
            "family": table.family,
            "layout": layout.name,
            "size": table.size,
            "entry_size": layout.size,
        }
        if placed and table.address % align:
            text = f"begins at {table.address:#x}, {table.address % align} bytes off a multiple of {align}"
            collector.add(
                "table-misaligned",
                text,
                address=table.address,
                section=table.section,
                details={**details, "align": align},
            )
        if table.size % layout.size:
            text = f"{table.size} bytes: the last entry of {layout.size} lacks {-table.size % layout.size}"
            collector.add("table-tail", text, address=table.address, section=table.section, details=details)


def alignment(layout: Layout) -> int:
    """The natural alignment of a layout: its widest field, as far as the entry's size keeps it."""
    codes = re.sub(r"[<x0-9]", "", layout.form.format)
    widest = max(struct.calcsize("<" + code) for code in codes)
    while layout.size % widest:
        widest //= 2
    return widest


def overlaps(collector: Collector, clusters: Clusters, order: Order) -> None:
    """Bytes that several entries name, and which of them is written last."""
    for cluster in clusters.all:
        if len(cluster.sites) < 2:
            continue
        # A stable sort: within a family the order of the table stays.
        entries = sorted(cluster.sites, key=lambda s: (order.rank(s.family), s.entry))
        last = entries[-1]
        families = tuple(dict.fromkeys(s.family for s in entries))
        partial = "overlap in part" if cluster.partial else "share bytes"
        text = f"{len(entries)} entries ({_counted(entries)}) {partial}: {_winner(entries, order)}"
        details: dict[str, Detailed] = {
            "families": families,
            "entries": tuple(f"{s.family} {s.op} at {s.address:#x}+{s.length}" for s in entries[:NAMED]),
            "count": len(entries),
            "winner": last.family if not order.why else None,
            "winner_op": last.op if not order.why else None,
            "winner_entry_address": last.entry if not order.why else None,
        }
        id = "site-overlap" if cluster.partial else "site-shared"
        collector.add(id, text, address=cluster.address, length=cluster.end - cluster.address, details=details)


def _counted(entries: list[Site]) -> str:
    counts: dict[str, int] = {}
    for site in entries:
        counts[site.family] = counts.get(site.family, 0) + 1
    return ", ".join(name if n == 1 else f"{n} of {name}" for name, n in counts.items())


def _winner(entries: list[Site], order: Order) -> str:
    families = list(dict.fromkeys(s.family for s in entries))
    last = entries[-1]
    if order.why:
        return f"which wins is not known ({order.why})"
    if order.any_time(last.family):
        return f"{last.family} writes at any time, after the passes of the boot, and wins"
    if len(families) > 1:
        return f"the pass of {last.family} comes last and wins where it writes ({last.op})"
    return f"the last of the table that applies wins ({last.op} before the others)"


def exceptions(collector: Collector, image: Image, scan: Scan, sites: Sites) -> None:
    """Entries of the exception table that name bytes of a site."""
    layouts: Mapping[tuple[str, int], str | None] = {
        (t.section, t.address): t.layout for t in scan.tables if t.family == EX_TABLE
    }
    form = load_format(EX_TABLE)
    for table in find_tables(image, form):
        name = layouts.get((table.name, table.address))
        if name is None:
            continue
        for entry in form.layout(name).entries(table, image.bits):
            address = entry.values[0]
            held = sites.holding(address)
            if not held:
                continue
            site = inside(held, address)
            distance = address - site.address
            place = (
                f"at the start of the {site.family} site"
                if not distance
                else (f"{distance} bytes inside the {site.family} site")
            )
            collector.add(
                "extable-inside-site" if distance else "extable-at-site",
                f"entry {entry.number} of {table.name} names an instruction {place} of {site.length} ({site.op})",
                address=address,
                details={
                    "family": site.family,
                    "op": site.op,
                    "site_address": site.address,
                    "site_length": site.length,
                    "entry_address": entry.address,
                },
            )


def inside(held: Iterable[Site], address: int) -> Site:
    """Of sites that hold an address the one that it is deepest in: beyond the first byte, if it is so in any."""
    return min(held, key=lambda s: (s.address == address, s.length))
