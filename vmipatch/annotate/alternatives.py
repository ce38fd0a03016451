"""``.altinstructions``: code that has a better form for some CPUs (2.6.16 on)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

from vmipatch.annotate.features import feature_name
from vmipatch.annotate.site import Alternative, Site
from vmipatch.annotate.tables import Code, Entry, FamilyScan, Layout, Reason, Table, scan_family
from vmipatch.image import Image
from vmipatch.isa import decode

FAMILY = "altinstructions"

INVERTED = 1 << 15
"""ALTINSTR_FLAG_INV of 5.13 to 6.2, in the feature word."""
FLAG_NOT, FLAG_DIRECT_CALL = 1, 2
"""ALT_FLAG_NOT (6.3) and ALT_FLAG_DIRECT_CALL (6.8), in the word of flags."""
MOST = 254
"""MAX_PATCH_LEN: more than this and the kernel stops with a BUG."""
MOST_FEATURES = 1024
"""x86_capability has never had more than 32 words."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every alternative that the image's tables name, in table order."""
    code, replacements = Code(image), Code(image)
    version = image.version
    # The same few instructions stand at thousands of sites.
    covers = cache(partial(decode.covers, bits=image.bits))

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        site = unpack(layout, values)
        address, length, what = site
        if not 1 <= length <= MOST:
            return Reason("entry-length", f"a site of {length} bytes at {address:#x}; 1 to {MOST} are possible")
        if what.replacement_length > length:
            text = f"a replacement of {what.replacement_length} bytes is longer than its site of {length}"
            return Reason("replacement-too-long", f"{text} at {address:#x}")
        if what.feature >= MOST_FEATURES:
            return Reason("entry-feature", f"feature {what.feature} of the site at {address:#x} does not exist")
        if what.pad_length is not None and what.pad_length > length:
            return Reason("entry-length", f"{what.pad_length} bytes of padding in a site of {length} at {address:#x}")
        if what.replacement_length:
            reason = replacements.executable(what.replacement, what.replacement_length)
            if reason is not None:
                return reason
        reason = code.executable(address, length)
        if reason is not None:
            return reason
        if not covers(image.read(address, length)):
            return Reason("site-not-instructions", f"{length} bytes at {address:#x} are no whole instructions")
        return None

    def strict(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        what = unpack(layout, values)[2]
        at = image.section_at(what.replacement)
        if at is None or at.name == ".text":
            return Reason("entry-outside-image", f"the replacement at {what.replacement:#x} is no replacement's place")
        return check(layout, values)

    def make(table: Table, layout: Layout, entry: Entry) -> Site:
        address, length, what = unpack(layout, entry.values)
        op = feature_name(what.feature, version)
        if what.inverted:
            op = "!" + op
        return Site(FAMILY, address, length, op, code.section, table.name, entry.address, what)

    def sealed(layout: Layout, entries: Sequence[Entry]) -> bool:
        return bool(entries) and all(
            e[1] == 0 and e[2].replacement_length == 0 for e in (unpack(layout, x.values) for x in entries)
        )

    return scan_family(image, FAMILY, check, make, layout, sealed, strict)


def unpack(layout: Layout, values: tuple[int, ...]) -> tuple[int, int, Alternative]:
    """The site's virtual address and length, and the rest, of one raw entry."""
    instr, replacement, cpuid = values[0], values[1], values[2]
    if layout.name == "rel13":
        instrlen, replacementlen, padlen = values[3:6]
        return instr, instrlen, Alternative(replacement, replacementlen, cpuid, False, False, padlen)
    if layout.name == "rel14":
        flags, instrlen, replacementlen = values[3:6]
        direct = bool(flags & FLAG_DIRECT_CALL)
        detail = Alternative(replacement, replacementlen, cpuid, bool(flags & FLAG_NOT), direct, None)
        return instr, instrlen, detail
    inverted = layout.name == "rel12" and bool(cpuid & INVERTED)
    feature = cpuid & ~INVERTED if layout.name == "rel12" else cpuid
    return instr, values[3], Alternative(replacement, values[4], feature, inverted, False, None)
