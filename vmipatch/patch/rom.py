"""Sites that call straight into a VMI ROM: the planner's side of the ROM's answers.

RFC annotations (13.0), annotations of API 3.0, mainline's six patchable
paravirt ops, and afterburn sites.  Works on :class:`Relocations` alone: where they
came from (our ROM's own table, or GetRelocationInfo) is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from vmipatch import facts
from vmipatch.annotate import Site
from vmipatch.annotate.site import Vmi
from vmipatch.annotate.vmi import ABI_OF, calls_in
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.isa.nops import table
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.text import Text
from vmipatch.rombuild.abi import load
from vmipatch.rombuild.relocations import Relocations, RelocationType

OPCODE = {RelocationType.CALL_REL: branch.CALL, RelocationType.JUMP_REL: branch.JMP}


@dataclass(frozen=True, slots=True)
class Rom:
    """A ROM where the kernel will see it: its answers, and the linear address of its image's first byte.

    ``name`` and ``physical`` are for messages and journals.
    """

    name: str
    relocations: Relocations
    physical: int
    linear: int

    def target(self, call: int) -> int:
        """The linear address of a call's stub."""
        return (self.linear + self.relocations.of(call).offset) & 0xFFFFFFFF

    def number(self, call: str) -> int | None:
        """The number of a call in the ROM's ABI, or None if it has no such call."""
        found = load(self.relocations.abi).calls.get(call)
        return None if found is None else found.number

    def speaks(self, abi: str) -> bool:
        """Whether the ROM's ABI is ``abi`` or an extension of it."""
        return abi in load(self.relocations.abi).lineage


def plan_vmi(text: Text, sites: Iterable[Site], rom: Rom) -> Iterator[Patch]:
    """Annotated sites: the translation copied over the native code, its calls made to reach the ROM.

    v1 and v1b as the RFC's patcher does it (every call of the translation goes to
    the slot of the entry's number); v2 by the relocation type, at call_offset.
    """
    nops = table("vmi")
    for site in sites:
        detail = site.detail
        assert isinstance(detail, Vmi)
        wanted = ABI_OF[detail.version]
        if not rom.speaks(wanted):
            raise refusal(text, site, f"the site speaks {wanted}, {rom.name} speaks {rom.relocations.abi}")
        old = text.read(site.address, site.length)
        body = bytearray(text.image.read(detail.translation, detail.translation_length))
        calls = calls_in(bytes(body))
        if not calls:
            raise refusal(text, site, f"its translation breaks the grammar: {body.hex(' ')}")
        kind = rom.relocations.of(detail.call).type
        if detail.version != "v2":
            if kind is not RelocationType.CALL_REL:
                raise refusal(text, site, f"{rom.name} has no slot for call {detail.call} ({site.op})")
            places = calls
        else:
            offset = detail.call_offset or 0
            if offset not in calls:
                raise refusal(text, site, f"no call at offset {offset} of its translation")
            places = [offset]
        if kind is RelocationType.NONE:
            new, reason = old, "the ROM answers NONE: native code stays"
        elif kind is RelocationType.NOP:
            new, reason = nops.fill(site.length), "the ROM answers NOP"
        else:
            for at in places:
                body[at : at + 5] = branch.near(OPCODE[kind], site.address + at, rom.target(detail.call), 32)
            new = bytes(body) + nops.fill(site.length - len(body))
            reason = f"{kind.name} to {site.op} at {rom.target(detail.call):#x}"
        text.write(site.address, new)
        yield Patch(site.address, old, new, Cause("vmi", site.op, reason), site)


@cache
def paravirt_calls() -> dict[str, list[str]]:
    """The calls that replace a paravirt op on a VMI ROM, one after the other."""
    found: dict[str, list[str]] = facts.load("tables", "vmi")["paravirt_calls"]
    return found


def refusal(text: Text, site: Site, message: str) -> PatchError:
    """The error of a site that cannot call the ROM."""
    return PatchError(message, file=text.image.path, section=site.section, address=site.address)


def place(image: Image, name: str, relocations: Relocations, physical: int) -> Rom:
    """A ROM at a physical address, seen through the kernel's direct map of low memory."""
    return Rom(name, relocations, physical, (image.page_offset + physical + relocations.image_offset) & 0xFFFFFFFF)
