"""What ``vmipatch scan`` prints."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from vmipatch.annotate import Finding, Scan, Site
from vmipatch.image import Image
from vmipatch.report.jsontext import dumps


def image_record(image: Image) -> dict[str, Any]:
    """An image as JSON says it; shared by every command."""
    return {
        "path": image.path,
        "container": image.container,
        "kind": image.kind,
        "compression": image.compression,
        "bits": image.bits,
        "banner": image.banner,
        "version": list(image.version) if image.version else None,
        "sha256": image.sha256(),
    }


def site_record(image: Image, site: Site) -> dict[str, Any]:
    """A site as JSON says it; ``symbol`` and ``offset`` are null where no symbol is known."""
    named = image.symbols.at(site.address)
    symbol, offset = named if named is not None else (None, None)
    return {
        "address": site.address,
        "address_hex": f"{site.address:#x}",
        "length": site.length,
        "family": site.family,
        "op": site.op,
        "section": site.section,
        "symbol": symbol,
        "offset": offset,
        "bytes": image.read(site.address, site.length).hex(),
    }


def finding_record(finding: Finding) -> dict[str, Any]:
    """A finding as JSON says it."""
    address = finding.address
    return {
        "id": finding.id,
        "severity": finding.severity,
        "message": finding.message,
        "section": finding.section,
        "address": address,
        "address_hex": None if address is None else f"{address:#x}",
    }


def as_json(image: Image, scan: Scan, *, sites: bool = True) -> None:
    """One JSON document on standard output."""
    counts = Counter((s.family, s.table) for s in scan.sites)
    record = {
        "schema": "vmipatch.scan/1",
        "image": image_record(image),
        "tables": [
            {
                "family": t.family,
                "section": t.section,
                "count": t.count,
                "padding": t.padding,
                "layout": t.layout,
                "address": t.address,
                "address_hex": f"{t.address:#x}",
                "size": t.size,
                "sealed": t.sealed,
                "sites": counts[t.family, t.section],
            }
            for t in scan.tables
        ],
        "sites": [site_record(image, s) for s in scan.sites] if sites else [],
        "findings": [finding_record(f) for f in scan.findings],
    }
    sys.stdout.write(dumps(record) + "\n")


def as_table(image: Image, scan: Scan, *, sites: bool = True) -> None:
    """Tables, sites and findings for a person; findings on standard error."""
    out = sys.stdout
    out.write(f"{image.path}: {image.container}, {image.bits}-bit, {image.banner or 'no Linux banner'}\n")
    counts = Counter((s.family, s.table) for s in scan.sites)
    for t in scan.tables:
        count = counts[t.family, t.section]
        note = "sealed" if t.sealed else t.layout or "unreadable"
        padding = f", {t.padding} more are padding" if t.padding else ""
        out.write(f"  {t.section:<22} {count:>7} sites  {t.count:>7} entries  {note}{padding}\n")
    if not scan.tables:
        out.write("  no annotation tables\n")
    if sites and scan.sites:
        width = image.bits // 4 + 2
        out.write(f"\n{'address':<{width}}  {'family':<15}  {'op':<34}  {'bytes':<30}  where\n")
        for s in scan.sites:
            named = image.symbols.at(s.address)
            where = f"{named[0]}+{named[1]:#x}" if named else s.section
            code = image.read(s.address, s.length).hex()
            out.write(f"{s.address:#0{width}x}  {s.family:<15}  {s.op:<34}  {code:<30}  {where}\n")
    out.flush()
    for f in scan.findings:
        print(f"{image.path}: {f}", file=sys.stderr)
