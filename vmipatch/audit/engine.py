"""An audit: the scan, the tables, the instructions, the ROM.

Imports annotate, image, patch.rules and its sisters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from vmipatch.annotate import FAMILIES, Scan, pvops, scan
from vmipatch.annotate.site import Alternative, Detailed, Paravirt, Vmi
from vmipatch.audit import tables
from vmipatch.audit.finding import KINDS, Audit
from vmipatch.audit.places import Collector, Sites, Spans
from vmipatch.audit.text import Instruction, Inward, Sweeper
from vmipatch.image import Image
from vmipatch.patch.rules import Version

COVERING = ("vmi", "afterburn", "parainstructions", "altinstructions")
"""Families whose sites stand for what the instructions in them do: these cover a sensitive instruction."""

BULK = ("call_sites", "return_sites", "mcount")
"""Families of a hundred thousand sites, of which few are ever looked at."""

_ID = {"silent": "sensitive-unannotated", "traps": "privileged-unannotated"}
_SLOT = "pv-slot-unannotated"


def audit(
    image: Image,
    *,
    rom: Path | None = None,
    kernel: Version | None = None,
    layouts: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Audit:
    """Everything about an image, and a ROM for it, that a person should see.

    ``kernel`` is the version to go by where the image carries no banner, or instead of it; ``layouts`` as for
    :func:`vmipatch.annotate.scan`; ``progress`` is told what is being looked at.  Raises :class:`UsageError` for
    a layout that does not exist and :class:`RomError` for a ROM file that cannot be read; what is wrong with
    the image or the ROM is a finding.
    """
    data = None
    if rom is not None:
        # What reads ROMs is imported for a ROM alone.
        from vmipatch.audit import rom as roms

        data = roms.read(rom)
    progress("tables")
    found = scan(image, FAMILIES, layouts, BULK, compare=False)
    sites = Sites(found.sites, found.bulk)
    collector = Collector(image)
    collector.take(found.findings)
    tables.tables(collector, found.tables, placed=image.container != "module")
    tables.overlaps(collector, sites.shared(but=tables.EVERY_CALL), tables.Order(image, found, kernel))
    tables.exceptions(collector, image, found, sites)
    covered, sweeper = _text(collector, image, found, sites, progress)
    if data is not None:
        progress("ROM")
        for wrong in roms.check(image, found, data, str(rom), kernel):
            collector.add(
                wrong.id,
                wrong.message,
                section="ROM",
                severity=wrong.severity,
                details={"rom": str(rom), **wrong.details},
            )
    looked_for = [id for id in KINDS if data is not None or not id.startswith("rom-")]
    return Audit(
        findings=collector.findings(),
        counts={id: collector.counts[id] for id in (*looked_for, *(c for c in collector.counts if c not in KINDS))},
        covered=covered,
        functions=collector.functions(),
        tables=found.tables,
        swept=tuple(sweeper.swept),
        sites=len(sites),
        rom=None if rom is None else str(rom),
        skipped=(*sweeper.skipped, *collector.dropped()),
    )


def _text(
    collector: Collector, image: Image, found: Scan, every: Sites, progress: Callable[[str], None]
) -> tuple[Mapping[str, int], Sweeper]:
    """What the instructions give, and how many of them sites cover."""
    sites = Spans((s.address, s.end) for s in found.sites if s.family in COVERING)
    replacements = Spans(_replacements(found))
    names = pvops.resolve(image)
    slots = {slot.address: slot.name for slot in names.slots()}
    for site in found.sites:
        if isinstance(site.detail, Paravirt) and site.detail.slot is not None:
            slots.setdefault(site.detail.slot, site.op)
    sweeper = Sweeper(image, every, slots)
    covered: Counter[str] = Counter()
    for one in sweeper.run(progress):
        if one.address in replacements:
            continue  # code that is copied into a site, and never runs where it stands
        if isinstance(one, Inward):
            _inward(collector, one)
            continue
        id = _SLOT if one.kind is None else _ID[one.kind.set]
        if one.address in sites:
            covered[id] += 1
        elif one.kind is not None:
            _sensitive(collector, id, one)
        else:
            _slot(collector, one, slots)
    return {id: covered[id] for id in (*_ID.values(), _SLOT)}, sweeper


def _replacements(found: Scan) -> list[tuple[int, int]]:
    spans = []
    for site in found.sites:
        detail = site.detail
        if isinstance(detail, Alternative):
            spans.append((detail.replacement, detail.replacement + detail.replacement_length))
        elif isinstance(detail, Vmi):
            spans.append((detail.translation, detail.translation + detail.translation_length))
    return spans


def _sensitive(collector: Collector, id: str, one: Instruction) -> None:
    assert one.kind is not None
    verb = "does not trap" if one.kind.set == "silent" else "traps"
    details: dict[str, Detailed] = {"instruction": one.kind.name, "bytes": one.code.hex(), "where": one.kind.where}
    if one.kind.when:
        details["when"] = one.kind.when
    collector.add(
        id,
        f"{one.kind.name} ({one.code.hex(' ')}) {verb} outside ring 0, and no annotation covers it",
        address=one.address,
        length=len(one.code),
        section=one.range.section,
        what=one.kind.name,
        details=details,
    )


def _slot(collector: Collector, one: Instruction, slots: Mapping[int, str]) -> None:
    assert one.slot is not None
    # FF /2 is a call, FF /4 a jump: the ModRM byte is the one behind FF.
    how = "call" if one.code[one.code.index(0xFF) + 1] >> 3 & 7 == 2 else "jump"
    collector.add(
        _SLOT,
        f"{how} through {slots[one.slot]} ({one.code.hex(' ')}) without an annotation",
        address=one.address,
        length=len(one.code),
        section=one.range.section,
        what=slots[one.slot],
        details={"how": how, "slot": slots[one.slot], "slot_address": one.slot, "bytes": one.code.hex()},
    )


def _inward(collector: Collector, one: Inward) -> None:
    site = one.site
    collector.add(
        "branch-into-site",
        f"a branch to {one.target:#x}, {one.target - site.address} bytes inside the {site.family} site at "
        f"{site.address:#x} ({site.op})",
        address=one.address,
        length=one.length,
        section=one.range.section,
        what=site.family,
        details={
            "target_address": one.target,
            "site_address": site.address,
            "site_length": site.length,
            "family": site.family,
            "op": site.op,
        },
    )
