"""The paravirt pass (``apply_paravirt``): native instructions, or a direct call of the function in the slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vmipatch.annotate import Site
from vmipatch.annotate.site import Paravirt
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.slots import function_in, is_one_of, need
from vmipatch.patch.text import Text

UD2 = b"\x0f\x0b"
ALL_CLOBBERED = {32: 0x7, 64: 0x1FF}
"""CLBR_ANY: every register that a C function may lose (asm/paravirt.h, asm/paravirt_types.h)."""


class ParavirtCalls(Pass):
    """One patch a site; where the kernel leaves a site alone it still writes the same bytes."""

    family = "parainstructions"
    needs_cpu = False

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        how = boot.rules.section("paravirt")
        inline = _inline(text.image, how)
        for site in sites:
            old = text.read(site.address, site.length)
            used, reason = _replacement(text.image, site, old, how, inline)
            new = old if used is None else used + boot.nops.fill(site.length - len(used))
            if len(new) > site.length:
                raise PatchError(
                    f"{reason}: {len(new)} bytes do not fit into a site of {site.length}",
                    file=text.image.path, section=site.section, address=site.address,
                )  # fmt: skip
            text.write(site.address, new)
            yield Patch(site.address, old, new, Cause(self.family, site.op, reason), site)

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """The nops that fill a site."""
        return [[Choice("", nops=table) for table in rules.nop_tables(image.bits)]]


def _inline(image: Image, how: dict[str, Any]) -> dict[str, bytes]:
    """Native instructions by op.

    Kernels up to 4.19 keep each sequence between labels (DEF_NATIVE): where the image has such labels, an op without
    one is not inlined, whatever its release does (stable updates and vendors dropped some).
    """
    inline = {op: bytes.fromhex(code) for op, code in how.get(f"inline{image.bits}", {}).items() if code}
    labels = {op: image.symbols.lookup(f"start_{op.replace('.', '_')}") for op in inline if op.startswith("pv_")}
    if any(labels.values()):
        for op, label in labels.items():
            if label is None:
                del inline[op]
    return inline


def _replacement(
    image: Image, site: Site, old: bytes, how: dict[str, Any], inline: dict[str, bytes]
) -> tuple[bytes | None, str]:
    detail = site.detail
    assert isinstance(detail, Paravirt)
    native = inline.get(site.op)
    slot = _slot(image, site, detail, how)
    if native is not None and len(native) <= site.length:
        only = how.get("only", {}).get(site.op)
        if only is None or (slot is not None and is_one_of(image, function_in(image, slot), only)):
            return native, "native instructions"
    if site.op in how.get("nothing", ()):
        return b"", "gives back what it is passed"
    if how.get("default") == "leave" or slot is None:
        return None, "left as an indirect call"
    function = function_in(image, slot)
    if not function:
        if how["null"] == "ud2":
            return UD2, "the slot is empty"
        bug = need(image, how["null"], site)
        return branch.near(branch.CALL, site.address, bug, image.bits), f"the slot is empty: call {how['null']}"
    if is_one_of(image, function, how["nop"]):
        return b"", "the slot holds the function that does nothing"
    if is_one_of(image, function, how.get("identity32", ())):
        return (b"" if image.bits == 32 else b"\x89\xf8"), "the slot holds the identity function"
    if is_one_of(image, function, how.get("identity64", ())):
        return (b"" if image.bits == 32 else b"\x48\x89\xf8"), "the slot holds the identity function"
    named = image.symbols.at(function)
    name = named[0] if named is not None and named[1] == 0 else f"{function:#x}"
    if site.op in how.get("jump", ()):
        if site.length < branch.CALL_SIZE:
            return None, "too short for a jump"
        return branch.near(branch.JMP, site.address, function, image.bits), f"jump to {name}"
    if how.get("clobbers") and ALL_CLOBBERED[image.bits] & ~detail.clobbers:
        return None, f"left as an indirect call: {name} may lose registers that the site needs"
    if site.length < branch.CALL_SIZE:
        return None, "too short for a call"
    return branch.near(branch.CALL, site.address, function, image.bits), f"call {name}"


def _slot(image: Image, site: Site, detail: Paravirt, how: dict[str, Any]) -> int | None:
    """The slot by the site's own operand; direct calls cannot be planned without it."""
    if detail.slot is None and how["mode"] == "direct":
        raise PatchError(
            "the site names no slot (already patched?), and the kernel would call what its slot holds",
            file=image.path, section=site.section, address=site.address,
        )  # fmt: skip
    return detail.slot
