"""What ``vmipatch explain`` says of a running kernel's modules and of all else that it can execute.

Imports explain, and report.jsontext's words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

from vmipatch.explain import Proved, Unexplained
from vmipatch.report.jsontext import addressed

if TYPE_CHECKING:
    from vmipatch.explain.modules import Area, ModuleExplained, ModuleLegal, Modules, Note

SHOWN = 5
"""Runs of a module that the table shows; JSON has them all."""


def record(found: Modules | None) -> dict[str, Any]:
    """The keys that modules have in the JSON; empty lists where they were not asked for."""
    if found is None:
        return {"modules_folder": None, "modules": [], "regions": [], "notes": []}
    return {
        "modules_folder": found.folder,
        "modules": [_module(m) for m in found.modules],
        "regions": [_area(a) for a in found.areas],
        "notes": [_note(n) for n in found.notes],
    }


def _module(found: ModuleExplained) -> dict[str, Any]:
    return {
        "name": found.name,
        **addressed("address", found.address),
        "file": found.file,
        "state": found.state,
        "bytes": {
            "total": found.total,
            "pristine": found.pristine,
            "explained": found.explained,
            "unexplained": found.unexplained_bytes,
        },
        "by_cause": found.by_cause,
        "states": found.states,
        "freed": list(found.freed),
        "proved": [proved(p) for p in found.proved],
        "unexplained": [{**unexplained(u), "module": found.name} for u in found.unexplained],
        "unexplained_runs": found.runs,
    }


def proved(x: Proved) -> dict[str, Any]:
    """One change that the dump proves."""
    where = {"length": x.length, "symbol": x.symbol, "offset": x.offset}
    return {**addressed("address", x.address), **where, "cause": x.cause, "evidence": x.evidence}


def unexplained(x: Unexplained) -> dict[str, Any]:
    """One run without a cause."""
    return {
        **addressed("address", x.address),
        "length": len(x.found),
        "found": x.found.hex(),
        "expected": x.expected.hex(),
        "symbol": x.symbol,
        "offset": x.offset,
        "site": x.site,
        "hint": x.hint,
        "instructions_found": list(x.instructions_found),
        "instructions_expected": list(x.instructions_expected),
    }


def _area(area: Area) -> dict[str, Any]:
    return {
        **addressed("address", area.address), "length": area.size, "kind": area.kind, "what": area.what,
        "known": area.known,
    }  # fmt: skip


def _note(note: Note) -> dict[str, Any]:
    where = {"address": None, "address_hex": None} if note.address is None else addressed("address", note.address)
    return {"id": note.id, "message": note.message, "finding": note.finding, "module": note.module, **where}


def legal_record(found: ModuleLegal) -> dict[str, Any]:
    """One module of the legal-patch set."""
    return {
        "name": found.name,
        "file": found.file,
        "build_id": found.build_id,
        "error": found.error,
        "bases": [{"kind": kind, **addressed("address", at)} for kind, at in found.bases.items()],
        "sites": [
            {
                "section": s.section,
                "offset": s.offset,
                "length": s.length,
                "families": list(s.families),
                "states": [
                    {
                        "bytes": x.code.hex(),
                        "cause": x.cause,
                        "moves": [
                            {"offset": m.offset, "width": m.width, "plus": list(m.plus), "minus": list(m.minus)}
                            for m in x.moves
                        ],
                    }
                    for x in s.states
                ],
                "patterns": list(s.patterns),
            }
            for s in found.sites
        ],
    }


def table(found: Modules, out: TextIO) -> None:
    """One line a module, one an executable region that is no module's, then what is wrong."""
    if found.modules:
        out.write(f"\n{len(found.modules)} modules, files below {found.folder}\n")
        width = max(len(m.name) for m in found.modules)
        out.write(
            f"  {'':<{width}}  {'address':>18} {'bytes':>9} {'pristine':>9} {'explained':>9} {'unexplained':>11}\n"
        )
    for m in found.modules:
        sizes = f"{m.total:>9} {m.pristine:>9} {m.explained:>9} {m.unexplained_bytes:>11}"
        out.write(f"  {m.name:<{width}}  {m.address:>#18x} {sizes}\n")
    others = [a for a in found.areas if a.kind not in ("module", "kernel")]
    if others:
        out.write("\nexecutable memory besides kernel and modules\n")
    for area in others:
        out.write(f"  {area.address:>#18x} {area.size:>9}  {area.kind}: {area.what}\n")
    for m in found.modules:
        for u in m.unexplained[:SHOWN]:
            site = f" ({u.site})" if u.site else ""
            out.write(f"\n{u.address:#x} {m.name}: {u.symbol or '?'}+{u.offset or 0:#x}{site}\n")
            out.write(f"  found     {u.found[:16].hex(' '):<48} {'; '.join(u.instructions_found)}\n")
            out.write(f"  expected  {u.expected[:16].hex(' '):<48} {'; '.join(u.instructions_expected)}\n")
        if m.runs > SHOWN:
            out.write(f"\nand {m.runs - SHOWN} more runs of unexplained bytes in {m.name}\n")
    for note in found.notes:
        where = f"{note.module}: " if note.module else ""
        place = f"{note.address:#x} " if note.address is not None and note.module is None else ""
        out.write(f"{'finding' if note.finding else 'note'}: {where}{place}{note.message}\n")
