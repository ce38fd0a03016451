"""What ``vmipatch patch`` prints."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from vmipatch.annotate import Scan, Site
from vmipatch.annotate.site import Paravirt
from vmipatch.image import Image
from vmipatch.patch import Plan
from vmipatch.patch.journal import Change
from vmipatch.report.jsontext import addressed, dumps
from vmipatch.report.scan import image_record

SHOWN = 20
"""Skipped sites that the table shows; JSON has them all."""


def _counts(scan: Scan, plan: Plan, changes: list[Change]) -> list[tuple[str, int, int, int]]:
    """Family, its sites, runs of bytes changed, and bytes changed."""
    sites = Counter(s.family for s in scan.sites)
    sites.update({family: len(found) for family, found in plan.sites.items() if family not in scan.families})
    runs = Counter(c.family for c in changes)
    size: Counter[str] = Counter()
    for change in changes:
        size[change.family] += len(change.new) // 2
    families = [*sites, *(f for f in runs if f not in sites)]
    return [(f, sites[f], runs[f], size[f]) for f in families]


def _skipped(site: Site) -> dict[str, Any]:
    assert isinstance(site.detail, Paravirt)
    slot = site.detail.slot
    return {
        **addressed("address", site.address), "length": site.length, "type": site.detail.type,
        **({} if slot is None else addressed("slot", slot)),
    }  # fmt: skip


def _type(site: Site) -> str:
    assert isinstance(site.detail, Paravirt)
    slot = site.detail.slot
    return f"type {site.detail.type}" + (f" through the slot at {slot:#x}" if slot is not None else "")


def as_json(image: Image, scan: Scan, plan: Plan, changes: list[Change], output: Path | None) -> None:
    """One JSON document on standard output."""
    record = {
        "schema": "vmipatch.patch/1",
        "image": image_record(image),
        "output": None if output is None else str(output),
        "rules": plan.rules,
        "nops": plan.nops,
        "families": [
            {"family": f, "sites": sites, "runs": runs, "bytes": size}
            for f, sites, runs, size in _counts(scan, plan, changes)
        ],
        "left": dict(plan.left),
        "skipped": [_skipped(site) for site in plan.skipped],
        "bytes_changed": sum(len(c.new) // 2 for c in changes),
        "changes": [
            {
                "address": c.address,
                "address_hex": f"{c.address:#x}",
                "offset": c.offset,
                "old": c.old,
                "new": c.new,
                "family": c.family,
                "op": c.op,
                "reason": c.reason,
            }
            for c in changes
        ],
        "warnings": list(plan.warnings),
    }
    sys.stdout.write(dumps(record) + "\n")


def as_table(image: Image, scan: Scan, plan: Plan, changes: list[Change], output: Path | None) -> None:
    """Counts for a person; warnings on standard error."""
    rules = f", by the rules of {plan.rules} ({plan.nops} nops)" if plan.rules else ""
    print(f"{image.path}: {image.banner or image.container}{rules}")
    for family, sites, runs, size in _counts(scan, plan, changes):
        print(f"  {family:<16} {sites:>6} sites  {runs:>6} changes  {size:>6} bytes")
    if plan.left:
        said = ", ".join(f"{count} of {family}" for family, count in plan.left.items())
        print(f"  left to the kernel, which patches them while it boots (--seal writes them too): {said}")
    if plan.skipped:
        print(f"  left as they are, since nobody knows what they do: {len(plan.skipped)} sites")
        for site in plan.skipped[:SHOWN]:
            print(f"    {site.address:#x}, {site.length} bytes, {_type(site)}")
        if len(plan.skipped) > SHOWN:
            print(f"    and {len(plan.skipped) - SHOWN} more, all of them in --json")
    total = sum(len(c.new) // 2 for c in changes)
    print(f"{total} bytes changed; {f'wrote {output} and its journal' if output else 'nothing written'}")
    sys.stdout.flush()
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
