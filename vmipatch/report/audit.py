"""What ``vmipatch audit`` prints."""

from __future__ import annotations

import sys
from typing import Any

from vmipatch.audit import KINDS, SEVERITIES, Audit, Finding, FunctionCount
from vmipatch.image import Image
from vmipatch.report.jsontext import dumps
from vmipatch.report.scan import finding_record, image_record

SHOWN = 20
"""Findings, and functions, of one identifier that the table shows; JSON has them all."""


def as_json(image: Image, audit: Audit) -> None:
    """One JSON document on standard output."""
    record = {
        "schema": "vmipatch.audit/1",
        "image": image_record(image),
        "rom": audit.rom,
        "sites": audit.sites,
        "tables": [
            {
                "family": t.family,
                "section": t.section,
                "count": t.count,
                "padding": t.padding,
                "layout": t.layout,
                **_address("address", t.address),
                "size": t.size,
                "sealed": t.sealed,
            }
            for t in audit.tables
        ],
        "swept": [
            {"section": s.section, **_address("address", s.address), "size": s.size, "undecoded": s.undecoded}
            for s in audit.swept
        ],
        "counts": audit.counts,
        "covered": audit.covered,
        "functions": [_function(f) for f in audit.functions],
        "findings": [_finding(f) for f in audit.findings],
        "skipped": audit.skipped,
    }
    sys.stdout.write(dumps(record) + "\n")


def _address(key: str, value: int | None) -> dict[str, Any]:
    return {key: value, f"{key}_hex": None if value is None else f"{value:#x}"}


def _function(found: FunctionCount) -> dict[str, Any]:
    return {
        "id": found.id,
        "symbol": found.symbol,
        "section": found.section,
        **_address("address", found.address),
        "count": found.count,
        "what": dict(found.what),
    }


def _finding(found: Finding) -> dict[str, Any]:
    details: dict[str, Any] = {}
    for key, value in found.details.items():
        if key == "address" or key.endswith("_address"):
            assert value is None or isinstance(value, int)
            details |= _address(key, value)
        else:
            details[key] = value
    return {
        **finding_record(found),
        "length": found.length,
        "symbol": found.symbol,
        "symbol_offset": found.symbol_offset,
        **_address("file_offset", found.offset),
        "details": details,
    }


def as_table(image: Image, audit: Audit) -> None:
    """Counts, and the first findings of each identifier, for a person."""
    out = sys.stdout
    out.write(f"{image.path}: {image.container}, {image.bits}-bit, {image.banner or 'no Linux banner'}\n")
    swept = sum(s.size for s in audit.swept)
    bad = sum(s.undecoded for s in audit.swept)
    out.write(f"  {audit.sites} sites in {len(audit.tables)} tables; {swept} bytes of code, {bad} no instruction\n")
    for line in audit.skipped:
        out.write(f"  not looked at: {line}\n")
    severities = {f.id: f.severity for f in reversed(audit.findings)}
    shown = [id for id, count in audit.counts.items() if count or id in audit.covered]
    for id in sorted(shown, key=lambda i: (-_rank(severities.get(i, KINDS[i].severity)), i)):
        covered = f"  ({audit.covered[id]} more inside sites)" if audit.covered.get(id) else ""
        severity = severities.get(id, KINDS[id].severity)
        out.write(f"  {severity:<8} {id:<24} {audit.counts[id]:>7}{covered}\n")
    for id in dict.fromkeys(f.id for f in audit.findings):
        _group(id, audit)
    out.flush()


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity)


def _group(id: str, audit: Audit) -> None:
    """One identifier: by function where it is counted so, else finding by finding."""
    out = sys.stdout
    out.write(f"\n{id}: {KINDS[id].title if id in KINDS else id}\n")
    functions = [f for f in audit.functions if f.id == id]
    if functions:
        for f in functions[:SHOWN]:
            what = ", ".join(f"{n} {name}" for name, n in f.what)
            out.write(f"  {f.count:>5}  {f.symbol or f.section or '?':<40} {f.address:#x}  {what}\n")
        _more(len(functions) - SHOWN, "functions")
        return
    found = [f for f in audit.findings if f.id == id]
    for one in found[:SHOWN]:
        place = f"{one.address:#x} " if one.address is not None else ""
        where = f"{one.symbol}+{one.symbol_offset:#x}" if one.symbol else one.section
        out.write(f"  {place}{where}: {one.message}\n")
    _more(len(found) - SHOWN, "findings")


def _more(count: int, what: str) -> None:
    if count > 0:
        sys.stdout.write(f"  and {count} more {what}\n")
