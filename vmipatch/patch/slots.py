"""What stands in a paravirt slot: the function that the image initialises it with, and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmipatch.annotate import Site
from vmipatch.annotate.parainstructions import operand
from vmipatch.annotate.site import Alternative
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.text import Text


def function_in(image: Image, slot: int) -> int:
    """The virtual address of the function that a slot holds in the image; 0 for none."""
    return int.from_bytes(image.read(slot, image.bits // 8), "little")


def is_one_of(image: Image, function: int, names: Sequence[str]) -> bool:
    """Whether a function is one of those that the rules name."""
    return any(image.symbols.lookup(name) == function for name in names)


def need(image: Image, name: str, site: Site) -> int:
    """The address of a function that a patched site must call; :class:`PatchError` if no symbol tells."""
    address = image.symbols.lookup(name)
    if address is None:
        raise PatchError(
            f"the kernel would call {name} here, and no symbol says where that is: give --system-map",
            file=image.path, section=site.section, address=site.address,
        )  # fmt: skip
    return address


def direct_target(text: Text, site: Site, body: bytes, detail: Alternative, how: Mapping[str, Any]) -> bytes:
    """``alt_replace_call`` (6.8): the placeholder call becomes a call of the function in the site's slot.

    Displacements are still those of the replacement's own address.  The difference of two functions is added to the
    placeholder's: where that call is counted, which a module's are before its alternatives are applied, this one is.
    """
    image = text.image
    code = text.read(site.address, site.length)
    slot = operand(code, site.address, image.bits)
    if slot is None or len(body) != branch.CALL_SIZE or body[0] != branch.CALL:
        raise PatchError(
            "a direct call is asked for where there is no indirect one",
            file=image.path, section=site.section, address=site.address,
        )  # fmt: skip
    function = function_in(image, slot) or need(image, how["null"], site)
    if is_one_of(image, function, how["nop"]):
        return b""
    led = _displacement(body) - _displacement(image.read(detail.replacement, len(body)))
    return branch.near(branch.CALL, detail.replacement, function + led, image.bits)


def _displacement(call: bytes) -> int:
    return int.from_bytes(call[1:], "little", signed=True)
