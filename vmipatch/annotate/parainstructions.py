"""``.parainstructions``: calls through paravirt_ops (2.6.20 to 6.7, 32 and 64 bits)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from vmipatch.annotate import pvops
from vmipatch.annotate.site import Detailed, Finding, Paravirt, Site
from vmipatch.annotate.tables import MOST_FINDINGS, Code, Entry, FamilyScan, Layout, Reason, Table, scan_family
from vmipatch.image import Image
from vmipatch.isa import decode

FAMILY = "parainstructions"

UNKNOWN = "unknown"
"""The op of a site of which nothing tells what it does."""

MOST = 254
"""MAX_PATCH_LEN; a longer entry stops the kernel with a BUG."""

# Where in a site's bytes the operand of its indirect call or jump stands, by how the site begins: registers saved
# around the call (2.6.20 to 2.6.29, and assembly sites), a segment prefix that keeps the length (2E), or nothing.
_CALL, _JUMP = b"\xff\x15", b"\xff\x25"
# More bytes than any call has with all its registers saved around it.
_LONGEST = 32
_PUSHES = frozenset((0x50, 0x51, 0x52, 0x53, 0x55, 0x56, 0x57, 0x41))


def operand(code: bytes, address: int, bits: int) -> int | None:
    """The virtual address of the function pointer that a site calls or jumps through, or None.

    ``FF /2`` and ``FF /4`` with a memory operand: absolute in 32-bit code,
    RIP-relative or (through a SIB byte) absolute in 64-bit code.
    """
    at = 0
    while at < len(code) and code[at] in _PUSHES:
        at += 2 if code[at] == 0x41 else 1
    if code[at : at + 1] == b"\x2e":
        at += 1
    opcode = code[at : at + 2]
    if opcode in (_CALL, _JUMP) and len(code) >= at + 6:
        value = int.from_bytes(code[at + 2 : at + 6], "little", signed=bits == 64)
        return value if bits == 32 else (address + at + 6 + value) & 0xFFFFFFFFFFFFFFFF
    if bits == 64 and code[at : at + 3] in (b"\xff\x14\x25", b"\xff\x24\x25") and len(code) >= at + 7:
        return int.from_bytes(code[at + 3 : at + 7], "little", signed=True) & 0xFFFFFFFFFFFFFFFF
    return None


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every paravirt site; its op comes from the slot that its own bytes name, else from its type."""
    code = Code(image)
    bits = image.bits
    slots = None
    names: dict[tuple[int | None, int], str] = {}

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        address, length = values[0], values[2]
        if not 1 <= length <= MOST:
            return Reason("entry-length", f"a site of {length} bytes at {address:#x}; 1 to {MOST} are possible")
        reason = code.executable(address, length)
        if reason is not None:
            return reason
        body = image.read(address, length)
        if operand(body, address, bits) is None and not decode.covers(body, bits):
            return Reason("site-not-instructions", f"{length} bytes at {address:#x} are no whole instructions")
        return None

    def strict(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        address, length = values[0], values[2]
        if not 1 <= length <= _LONGEST or operand(image.read(address, length), address, bits) is None:
            return Reason("site-not-instructions", f"no call through memory at {address:#x}")
        return check(layout, values)

    def make(table: Table, layout: Layout, entry: Entry) -> Site:
        nonlocal slots
        address, kind, length = entry.values[:3]
        clobbers = entry.values[3] if len(entry.values) > 3 else 0
        slot = operand(image.read(address, length), address, bits)
        op = names.get((slot, kind))
        if op is None:
            if slots is None:
                slots = pvops.resolve(image)
            named = slots.name_of_slot(slot) if slot is not None else None
            op = names[slot, kind] = named or slots.name_of_type(kind) or UNKNOWN
        detail = Paravirt(kind, slot, clobbers)
        return Site(FAMILY, address, length, op, code.section, table.name, entry.address, detail)

    def sealed(layout: Layout, entries: Sequence[Entry]) -> bool:
        # As `patch --seal` leaves them (vmipatch.patch.seal): for bare hardware, or for a ROM.
        names_itself = all(e.values[0] == entries[0].address for e in entries)
        return bool(entries) and (names_itself or all(e.values[2] == 0 for e in entries))

    tables, sites, findings = scan_family(image, FAMILY, check, make, layout, sealed, strict)
    return tables, sites, findings + (_unknown(sites) if UNKNOWN in names.values() else [])


def _unknown(sites: Sequence[Site]) -> list[Finding]:
    """A finding for each slot and type that sites name and no layout does, at the first of these sites."""
    groups: dict[tuple[int | None, int], list[Site]] = {}
    for site in sites:
        if site.op == UNKNOWN:
            assert isinstance(site.detail, Paravirt)
            groups.setdefault((site.detail.slot, site.detail.type), []).append(site)
    found = []
    for (slot, kind), group in islice(groups.items(), MOST_FINDINGS):
        count = f"{len(group)} sites" if len(group) > 1 else "a site"
        through = f"through the slot at {slot:#x}" if slot is not None else "whose bytes name no slot"
        text = f"{count} of type {kind} {through}: no layout of paravirt_ops says what the call does"
        details: dict[str, Detailed] = {"type": kind, "slot_address": slot, "sites": len(group)}
        found.append(Finding("op-unknown", "warning", text, group[0].table, group[0].address, details=details))
    if len(groups) > MOST_FINDINGS:
        rest = sum(map(len, islice(groups.values(), MOST_FINDINGS, None)))
        text = f"{rest} more sites, of {len(groups) - MOST_FINDINGS} more slots or types, do what nobody knows"
        found.append(Finding("op-unknown", "warning", text, next(iter(groups.values()))[0].table))
    return found
