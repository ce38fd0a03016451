"""An audit as SARIF and as a page.  Imports audit, image, report.html, report.pages and report.sarif."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vmipatch.audit.finding import KINDS, SEVERITIES, Audit, Detailed, Finding
from vmipatch.errors import AddressError
from vmipatch.image import Image
from vmipatch.report import sarif
from vmipatch.report.html import Code, Column, Kind, Page, Row, TextMap
from vmipatch.report.pages import ADDRESS_WIDTH, code_of, symbols_of

_COLOURS = {
    "error": (("#d3281c", "#ff6a5a"), ("#b0305f", "#f07aa6"), ("#a8431a", "#f29a72")),
    "warning": (("#dc8a1a", "#e9a648"), ("#b39a10", "#d8c14a"), ("#9a6a2f", "#cfa069"), ("#7a8a1f", "#aebd52")),
    "note": (("#6f8fb3", "#7f9cc0"), ("#6a5bd6", "#8f82f0"), ("#1f9488", "#35b3a5"), ("#8c8f96", "#8b919b")),
}
_SHOWN = 32
"""Bytes of a finding that are shown."""


def sarif_document(image: Image, audit: Audit) -> str:
    """The findings of an audit as SARIF 2.1.0."""
    used = sorted({f.id for f in audit.findings})
    rules = [_rule(name) for name in used]
    others = [audit.rom] if audit.rom is not None else []
    return sarif.document(image, rules, (_result(f) for f in audit.findings), others)


def _rule(name: str) -> sarif.Rule:
    kind = KINDS.get(name)
    if kind is None:
        return sarif.Rule(name, name, "warning", name, name)
    return sarif.Rule(kind.id, kind.title, kind.severity, kind.description, kind.help)


def _result(finding: Finding) -> sarif.Result:
    return sarif.Result(
        rule=finding.id,
        level=finding.severity,
        message=finding.message,
        address=finding.address,
        offset=finding.offset,
        length=finding.length,
        symbol=finding.symbol,
        symbol_offset=finding.symbol_offset,
        section=finding.section,
        identity=finding.message if finding.address is None else "",
        properties={"section": finding.section or None, **_details(finding.details)},
    )


def _details(details: Mapping[str, Detailed]) -> dict[str, Any]:
    """Details as JSON; addresses as hexadecimal text."""
    return {
        key: f"{value:#x}" if _is_address(key) and isinstance(value, int) else list(value) if isinstance(value, tuple)
        else value
        for key, value in details.items()
    }  # fmt: skip


def _is_address(key: str) -> bool:
    return key == "address" or key.endswith("_address")


def audit_page(image: Image, audit: Audit) -> Page:
    """The findings of an audit: where in the text they are, and each with its instructions."""
    worst_of = {f.id: f.severity for f in sorted(audit.findings, key=lambda f: SEVERITIES.index(f.severity))}
    names = sorted(worst_of, key=lambda name: (-SEVERITIES.index(worst_of[name]), name))
    kinds = _kinds(audit, names, worst_of)
    number = {name: i for i, name in enumerate(names)}
    levels = Counter(f.severity for f in audit.findings)
    text = image.section(".text")
    base = text.address if text is not None else 0
    length = text.file_size if text is not None else 0
    places = sorted(
        (f.address - base, max(f.length or 1, 1), number[f.id])
        for f in audit.findings
        if f.address is not None and base <= f.address < base + length
    )
    swept = sum(s.size for s in audit.swept)
    worst = audit.worst()
    return Page(
        kicker="vmipatch audit",
        heading=_heading(levels),
        tone="bad" if worst == "error" else "good" if worst is None else "",
        lead=image.banner or image.path,
        tiles=[
            ("Errors", f"{levels['error']:,}", "", "bad" if levels["error"] else ""),
            ("Warnings", f"{levels['warning']:,}", "", ""),
            ("Notes", f"{levels['note']:,}", "", ""),
            ("Sites", f"{audit.sites:,}", f"in {len(audit.tables):,} tables", ""),
            ("Code looked at", f"{swept:,}", "bytes", ""),
        ],
        bits=image.bits,
        base=base,
        kinds=kinds,
        plain=("nothing found", ""),
        map_title="The kernel's text",
        map_about="Low addresses first; .text only. Errors win wherever they share a cell with something else. Click a "
        "cell to open the finding, a rule to hide it (with Alt, to see it alone).",
        table_title="Findings",
        table_about="",
        noun="findings",
        columns=[
            Column("kind", "Rule", "minmax(0, 1.2fr)"),
            Column("address", "Address", ADDRESS_WIDTH[image.bits], True),
            Column("where", "Symbol", "minmax(0, 1.5fr)", True),
            Column("what", "Finding", "minmax(0, 2.6fr)"),
        ],
        titles=("Instructions",),
        rows=(_row(image, number, f) for f in audit.findings),
        text=TextMap(length, places, symbols_of(image, base, base + length)) if length else None,
        facts=[
            ("Image", [image.path, f"SHA-256 {image.sha256()}", image.banner or ""]),
            *([("ROM", [audit.rom])] if audit.rom is not None else []),
            ("Tables", [f"{t.section}: {t.count:,} entries, {t.layout or 'unreadable'}" for t in audit.tables]),
            (
                "Sections swept",
                [f"{s.section}: {s.size:,} bytes, {s.undecoded:,} of them no instructions" for s in audit.swept],
            ),
            ("Inside sites", [f"{KINDS[name].title}: {count:,}" for name, count in audit.covered.items()]),
        ],
        warnings=list(audit.skipped),
        what_is_note=True,
    )


def _heading(levels: Counter[str]) -> str:
    for level in reversed(SEVERITIES):
        if levels[level]:
            return f"{levels[level]:,} {level}{'' if levels[level] == 1 else 's'}"
    return "Nothing found"


def _kinds(audit: Audit, names: list[str], worst: dict[str, str]) -> list[Kind]:
    counts = Counter(f.id for f in audit.findings)
    taken: Counter[str] = Counter()
    result = []
    for name in names:
        severity = worst[name]
        palette = _COLOURS[severity]
        kind = KINDS.get(name)
        help_text = f"{kind.title}. {kind.description} {kind.help}" if kind is not None else ""
        colours = palette[taken[severity] % len(palette)]
        taken[severity] += 1
        result.append(Kind(name, f"{counts[name]:,}", help_text, colours, severity == "error"))
    return result


def _row(image: Image, number: dict[str, int], finding: Finding) -> Row:
    details = "; ".join(f"{key.replace('_', ' ')}: {_said(value)}" for key, value in _details(finding.details).items())
    return Row(
        address=finding.address,
        length=finding.length,
        kind=number[finding.id],
        symbol=finding.symbol,
        offset=finding.symbol_offset or 0,
        section=finding.section,
        what=finding.message,
        note=details,
        codes=(_code(image, finding),),
    )


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _code(image: Image, finding: Finding) -> Code | None:
    section = image.section_at(finding.address) if finding.address is not None else None
    if finding.address is None or section is None or not section.exec or not finding.length:
        return None
    try:
        return code_of(image, image.read(finding.address, min(finding.length, _SHOWN)), finding.address)
    except AddressError:
        return None
