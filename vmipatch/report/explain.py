"""What ``vmipatch explain`` prints, and the file of the legal-patch set."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from vmipatch.explain import ANYWHERE, DOMAINS, Explanation, Legal
from vmipatch.image import Image
from vmipatch.report.jsontext import addressed, compact, dumps
from vmipatch.report.modules import legal_record, proved, record, table, unexplained
from vmipatch.report.scan import image_record

if TYPE_CHECKING:
    from vmipatch.explain.late import State
    from vmipatch.explain.modules import ModuleLegal, Modules

SHOWN = 40
"""Runs that the table shows; JSON has them all."""


def as_json(image: Image, memory: str, found: Explanation, modules: Modules | None = None) -> None:
    """One JSON document on standard output."""
    document = {
        "schema": "vmipatch.explain/1",
        "image": image_record(image),
        "memory": memory,
        "text": {**addressed("address", found.start), "length": found.total, **addressed("slide", found.slide)},
        "bytes": {
            "total": found.total,
            "pristine": found.pristine,
            "explained": found.explained,
            "unexplained": found.unexplained_bytes,
        },
        "by_cause": found.by_cause,
        "states": found.states,
        "evidence": found.evidence,
        "proved": [proved(x) for x in found.proved],
        "unexplained": [unexplained(x) for x in found.unexplained],
        "unexplained_runs": found.runs,
        **record(modules),
        "warnings": found.warnings,
    }
    sys.stdout.write(dumps(document) + "\n")


def as_table(image: Image, memory: str, found: Explanation, modules: Modules | None = None) -> None:
    """Counts, causes and the first unexplained runs, for a person."""
    out = sys.stdout
    moved = f", moved by {found.slide:#x}" if found.slide else ""
    out.write(f"{memory}: {found.total} bytes of text at {found.start:#x}{moved}\n")
    out.write(f"  pristine     {found.pristine:>10}\n  explained    {found.explained:>10}\n")
    for cause, count in found.by_cause.items():
        out.write(f"    {cause:<18} {count:>8}\n")
    out.write(f"  unexplained  {found.unexplained_bytes:>10}\n")
    for line in found.evidence:
        out.write(f"  {line}\n")
    for p in found.proved[:SHOWN]:
        out.write(f"  {p.address:#x} {_where(p.symbol, p.offset)}: {p.cause}: {p.evidence}\n")
    if len(found.proved) > SHOWN:
        out.write(f"  and {len(found.proved) - SHOWN} more\n")
    for u in found.unexplained[:SHOWN]:
        out.write(f"\n{u.address:#x} {_where(u.symbol, u.offset)}{f' ({u.site})' if u.site else ''}\n")
        out.write(f"  found     {_hex(u.found):<34} {'; '.join(u.instructions_found)}\n")
        out.write(f"  expected  {_hex(u.expected):<34} {'; '.join(u.instructions_expected)}\n")
        if u.hint:
            out.write(f"  {u.hint}\n")
    if found.runs > SHOWN:
        out.write(f"\nand {found.runs - SHOWN} more runs of unexplained bytes\n")
    if modules is not None:
        table(modules, out)
    out.flush()
    for warning in found.warnings:
        print(f"{image.path}: warning: {warning}", file=sys.stderr)


def _where(symbol: str | None, offset: int | None) -> str:
    return f"{symbol}+{offset:#x}" if symbol else "?"


def _hex(code: bytes) -> str:
    return code[:16].hex(" ") + (" …" if len(code) > 16 else "")


_TOGETHER = 1024
"""Sites that are made into text at once: a kernel has some hundred thousand."""


def legal_text(image: Image, entries: Iterable[Legal], modules: Iterable[ModuleLegal] = ()) -> Iterator[str]:
    """The file of the legal-patch set (docs/explain.md), in pieces."""
    head = {
        "schema": "vmipatch.legal/1",
        "image": image_record(image),
        "domains": DOMAINS,
        "anywhere": [{"cause": cause, "pattern": text} for cause, text in ANYWHERE],
    }
    yield compact(head)[:-1] + ',"sites":['
    yield from _listed(map(_site, entries))
    yield '],"modules":['
    yield from _listed(map(legal_record, modules))
    yield "]}\n"


def _listed(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The text between the brackets of a list."""
    between, rest = "", iter(records)
    while some := list(islice(rest, _TOGETHER)):
        yield between + compact(some)[1:-1]
        between = ","


def _site(entry: Legal) -> dict[str, Any]:
    return {
        **addressed("address", entry.address),
        "length": entry.length,
        "families": entry.families,
        "states": [_state(s) for s in entry.states],
        "patterns": entry.patterns,
    }


def _state(state: State) -> dict[str, Any]:
    record: dict[str, Any] = {"bytes": state.code.hex(), "cause": state.cause}
    if state.free:
        record["free"] = state.free
    if state.moves:
        record["moves"] = [m._asdict() for m in state.moves]
    return record
