"""``.vmi.annotation``: the i386 VMI patch series of March 2006 (v1), its call_offset proposal (v1b) and API 3.0 (v2).

The three share one layout and carry no version: the translations tell them
apart.  A translation is a handful of pushes, one call and a stack adjustment;
the displacement of its call is the call number (v1, v1b: the 13.0 list, which
has no call 0 to 3) or zero (v2: the 3.0 list).
"""

from __future__ import annotations

from functools import cache

from vmipatch import facts
from vmipatch.annotate.site import Finding, Site, Vmi
from vmipatch.annotate.tables import Code, Entry, FamilyScan, Layout, Reason, Table, scan_family
from vmipatch.image import Image
from vmipatch.isa import decode

FAMILY = "vmi"

ABI_OF = {"v1": "vmi-13.0", "v1b": "vmi-13.0", "v2": "vmi-3.0"}

# The whitelist of the RFC's patcher (patch 5): opcode to length.
_GRAMMAR = {0xE8: 5, 0x68: 5, 0x6A: 2, 0x50: 1, 0x51: 1, 0x52: 1, 0x53: 1, 0x55: 1, 0x56: 1, 0x57: 1}
_POP_ARGUMENTS = b"\x8d\x64\x24"


def calls_in(translation: bytes) -> list[int] | None:
    """Where in a translation its calls (``E8``) stand, or None if it holds what the RFC's patcher refuses."""
    found, position = [], 0
    while position < len(translation):
        opcode = translation[position]
        if translation[position : position + 3] == _POP_ARGUMENTS:
            length = 4
        elif opcode in _GRAMMAR:
            length = _GRAMMAR[opcode]
        else:
            return None
        if opcode == 0xE8:
            found.append(position)
        position += length
    return found if position == len(translation) else None


@cache
def _names(abi: str) -> dict[int, str]:
    return {row["n"]: name for name, row in facts.load("abi", abi)["calls"].items() if "n" in row}


def call_name(version: str, number: int) -> str:
    """The name of a call in the ABI that this version of annotations numbers by; ``unknown`` if it has none."""
    return _names(ABI_OF[version]).get(number, "unknown")


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every VMI annotation; a table that mixes versions is a finding."""
    code, translations = Code(image), Code(image)
    bits = image.bits

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        call, address, translation, length, translation_length, growth, call_offset = values
        if length == 0 or length == 255:
            return Reason("entry-length", f"a site of {length} bytes at {address:#x}; 1 to 254 are possible")
        if translation_length > length or length < translation_length - min(growth, 0):
            text = f"a translation of {translation_length} bytes (growth {growth}) is longer than its site of {length}"
            return Reason("replacement-too-long", f"{text} at {address:#x}")
        reason = translations.executable(translation, translation_length) or code.executable(address, length)
        if reason is not None:
            return reason
        body = image.read(translation, translation_length)
        calls = calls_in(body)
        if not calls:
            return Reason("vmi-translation", f"the translation at {translation:#x} breaks the grammar: {body.hex(' ')}")
        if call_offset and call_offset not in calls:
            return Reason("vmi-call-offset", f"no call at offset {call_offset} of the translation at {translation:#x}")
        number = int.from_bytes(body[calls[0] + 1 : calls[0] + 5], "little")
        if number not in (0, call):
            text = f"the translation at {translation:#x} calls {number}, its entry says {call}"
            return Reason("vmi-call-number", text)
        if not decode.covers(image.read(address, length), bits):
            return Reason("site-not-instructions", f"{length} bytes at {address:#x} are no whole instructions")
        return None

    def make(table: Table, layout: Layout, entry: Entry) -> Site:
        call, address, translation, length, translation_length, growth, call_offset = entry.values
        body = image.read(translation, translation_length)
        at = (calls_in(body) or [0])[0]
        if int.from_bytes(body[at + 1 : at + 5], "little") == 0:
            version, offset = "v2", call_offset
        elif call_offset:
            version, offset = "v1b", call_offset
        else:
            version, offset = "v1", None
        detail = Vmi(version, call, translation, translation_length, growth, offset)
        op = call_name(version, call)
        return Site(FAMILY, address, length, op, code.section, table.name, entry.address, detail)

    tables, sites, findings = scan_family(image, FAMILY, check, make, layout)
    for info in tables:
        findings += _mixed(info.section, [s for s in sites if s.table == info.section])
    return tables, _same_version(sites), findings


def _versions(sites: list[Site]) -> set[str]:
    return {s.detail.version for s in sites if isinstance(s.detail, Vmi)}


def _mixed(section: str, sites: list[Site]) -> list[Finding]:
    if {"v1", "v1b"} & _versions(sites) and "v2" in _versions(sites):
        newest = next(s for s in sites if isinstance(s.detail, Vmi) and s.detail.version == "v2")
        text = "entries of API 13.0 and of API 3.0 in one table"
        return [Finding("vmi-mixed-versions", "error", text, section, newest.entry)]
    return []


def _same_version(sites: list[Site]) -> list[Site]:
    """v1 and v1b entries whose call stands first look alike: one entry that tells decides for its table."""
    proposals = {s.table for s in sites if isinstance(s.detail, Vmi) and s.detail.version == "v1b"}
    return [
        s._replace(detail=s.detail._replace(version="v1b", call_offset=0))
        if isinstance(s.detail, Vmi) and s.detail.version == "v1" and s.table in proposals
        else s
        for s in sites
    ]
