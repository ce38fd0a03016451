"""What a scan says of the image as a whole: what it is, and which tables it must have and has not.

Imports image and its sisters.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmipatch import facts
from vmipatch.annotate.site import Finding, TableInfo
from vmipatch.image import Image

_KINDS = {
    "user-mode-linux": (
        "user-mode-linux",
        "User-mode Linux, a program: it carries alternatives and never applies them, so there is nothing to patch",
    ),
    "xen": (
        "xen-hypervisor",
        "the Xen hypervisor, no Linux kernel: its alternatives are in tables of its own, which are not read",
    ),
}


def of_kind(image: Image) -> list[Finding]:
    """The finding that names an image which no kernel's patcher runs in; none for Linux on hardware."""
    if image.kind not in _KINDS:
        return []
    id, message = _KINDS[image.kind]
    return [Finding(id, "error", message, "image")]


def missing(image: Image, tables: Iterable[TableInfo], families: Iterable[str]) -> list[Finding]:
    """A finding for each family, of those looked for, whose table must exist and was not found.

    Asked of images without section headers, in which a table can be there and not be seen: one must exist where the
    function that reads it does, and is more than the stub of a configuration without it (``reader`` in
    ``specs/tables``).  Without the table nothing can be said of the bytes of its sites; that they changed proves
    nothing.
    """
    bare = not image.sections and not image.symbols.sources
    if not (image.reconstructed or bare) or image.kind != "linux":
        return []
    found = {t.family for t in tables}
    result = []
    for family in families:
        spec = facts.load("tables", family)
        reader = spec.get("reader")
        if family in found or reader is None:
            continue
        places = (image.symbols.lookup(reader + part) for part in _PARTS)
        address = next((a for a in places if a is not None and not _is_stub(image, a)), None)
        if address is None:
            continue
        text = f"the kernel has {reader}, which reads this table, and it is found neither by symbols nor by content"
        result.append(Finding("table-missing", "warning", text, spec["sections"][0], address))
    if not image.symbols.sources:
        text = "neither section headers nor symbols: what the bytes are is known only as far as tables tell by content"
        result.append(Finding("table-missing", "warning", text, "image"))
    return result


def _is_stub(image: Image, address: int) -> bool:
    """Whether a function does nothing but return: the nearest other symbol is less than its least size away."""
    named = image.symbols.at(address + _STUB)
    return named is None or named[1] != _STUB


_PARTS = ("", ".part.0")
"""gcc may split a function and leave one that returns or jumps to the rest."""

_STUB = 64
"""Bytes that no empty function has with its padding, and each of the readers has."""
