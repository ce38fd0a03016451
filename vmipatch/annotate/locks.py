"""``.smp_locks``: every LOCK prefix that a kernel on one CPU may drop (2.6.17 on)."""

from __future__ import annotations

from dataclasses import replace

from vmipatch.annotate.site import Lock, Site
from vmipatch.annotate.tables import Code, Entry, FamilyScan, Layout, Reason, Table, scan_family
from vmipatch.image import Image

FAMILY = "smp_locks"

PREFIXES = frozenset((0xF0, 0x3E, 0x90))
"""LOCK; what 2.6.32 and later put there on one CPU; what earlier kernels put there."""

_LOCK = 0xF0

BEFORE_LOCK = frozenset((0x66, 0xF2, 0xF3))
"""Prefixes that the assembler may put before LOCK: the entry then names those (seen in a real 6.12), and no kernel
changes them."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every LOCK prefix that the image's tables name; a zero entry is padding and names none."""
    code = Code(image)
    detail = Lock()
    offset_of, data = image.offset_of, image.data

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        (address,) = values
        if not address:
            return None
        reason = code.executable(address, 1)
        if reason is not None:
            return reason
        offset = offset_of(address)
        found = data[offset]
        if found in PREFIXES or (found in BEFORE_LOCK and data[offset + 1 : offset + 2] == b"\xf0"):
            return None
        return Reason("lock-no-prefix", f"names {address:#x}, which holds {found:02x} and not a LOCK prefix")

    def strict(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        if data[offset_of(values[0])] != _LOCK:
            return Reason("lock-no-prefix", f"names {values[0]:#x}, which holds no LOCK prefix")
        return None

    def make(table: Table, layout: Layout, entry: Entry) -> Site | None:
        (address,) = entry.values
        if not address:
            return None
        return Site(FAMILY, address, 1, "lock", code.section, table.name, entry.address, detail)

    tables, sites, findings = scan_family(image, FAMILY, check, make, layout, strict=strict)
    full = {s.table for s in sites} | {f.section for f in findings}
    tables = [t if t.section in full or not t.padding else replace(t, sealed=True) for t in tables]
    return tables, sites, findings
