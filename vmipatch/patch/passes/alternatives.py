"""The alternatives pass (``apply_alternatives``): replacements for the CPU's features, displacements, nops.

Table order is meaning: a later entry sees, and may replace, what an earlier one wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from vmipatch.annotate import Site
from vmipatch.annotate.features import feature_name
from vmipatch.annotate.site import Alternative
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.isa import branch, opcodes
from vmipatch.isa.nops import NopTable
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import relocate
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.slots import direct_target
from vmipatch.patch.text import Text

NOP = 0x90


class Alternatives(Pass):
    """What each entry writes; an entry that writes nothing gives no patch."""

    family = "altinstructions"

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        how = boot.rules.section("alternatives")
        nops, bits, cpu = boot.nops, text.image.bits, boot.cpu
        optimise = how["optimise"]
        lengths = _nested_lengths(sites) if how.get("nested") else {}
        for site in _last_eligible(sites, cpu) if how.get("once") else sites:
            detail = site.detail
            assert isinstance(detail, Alternative)
            length = lengths.get(site.address, site.length)
            old = text.read(site.address, length)
            applies = _applies(site, cpu)
            if applies:
                new = _replacement(text, site, length, detail, how, nops)
                if optimise == "instructions":
                    new = join_nops(new, bits, nops)
                reason = f"{site.op} holds: the replacement at {detail.replacement:#x}"
            else:
                new = _not_applied(old, detail, how, bits, nops)
                reason = f"{site.op} does not hold: nops joined"
            if new != old or applies:
                text.write(site.address, new)
                source = detail.replacement if applies else None
                yield Patch(site.address, old, new, Cause(self.family, site.op, reason), site, source)

    def kept(self, sites: Sequence[Site]) -> frozenset[int]:
        """Direct calls: the kernel stops with a BUG where there is no indirect one any more (6.8 on)."""
        return frozenset(s.address for s in sites if isinstance(s.detail, Alternative) and s.detail.direct_call)

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """Each feature that an entry asks for, and the nops that fill a site."""
        features = sorted({s.detail.feature for s in sites if isinstance(s.detail, Alternative)})
        named = [(f, feature_name(f, image.version)) for f in features]
        found = [[Choice(f"no {name}", ((f, False),)), Choice(name, ((f, True),))] for f, name in named]
        return [*found, [Choice("", nops=table) for table in rules.nop_tables(image.bits)]]


def _applies(site: Site, cpu: Cpu) -> bool:
    assert isinstance(site.detail, Alternative)
    return cpu.has(site.detail.feature) != site.detail.inverted


def _last_eligible(sites: Sequence[Site], cpu: Cpu) -> Iterator[Site]:
    """7.0 on: of entries of one address that follow each other the last that applies is written, once
    (``analyze_patch_site``); where none applies, the first stands for them.
    """
    for _, group in groupby(sites, key=attrgetter("address")):
        entries = list(group)
        yield next((s for s in reversed(entries) if _applies(s, cpu)), entries[0])


def _nested_lengths(sites: Sequence[Site]) -> dict[int, int]:
    """6.8 on: entries of one address are nested, and all count as long as the longest."""
    longest: dict[int, int] = {}
    for site in sites:
        longest[site.address] = max(site.length, longest.get(site.address, 0))
    return longest


def _replacement(
    text: Text, site: Site, length: int, detail: Alternative, how: dict[str, object], nops: NopTable
) -> bytes:
    size = detail.replacement_length
    if size > length:
        raise PatchError(
            f"a replacement of {size} bytes is longer than its site of {length}",
            file=text.image.path, section=site.section, address=site.address,
        )  # fmt: skip
    # The replacement itself may hold LOCK prefixes or sites that an earlier pass has patched.
    body = text.read(detail.replacement, size)
    if detail.direct_call:
        body = direct_target(text, site, body, detail, how)
        size = len(body)
    displacement = how["displacement"]
    if displacement == "all":
        padded = body + bytes((NOP,)) * (length - size)
        return relocate.apply(
            padded, site.address, detail.replacement, detail.replacement_length, text.image.bits, nops,
            branches=how["optimise"] == "runs-and-branches", more=how.get("nops") == "more",
        )  # fmt: skip
    if displacement != "none" and size == 5 and body[0] == branch.CALL:
        body = _moved_call(body, detail.replacement, site.address, text.image.bits)
    elif displacement == "call-jump" and size == 5 and body[0] == branch.JMP:
        body = _moved_jump(body, detail.replacement, site.address, text.image.bits, nops)
    rest = length - size
    return body + (bytes((NOP,)) * rest if how["padding"] == "single" else nops.fill(rest))


def _moved_call(body: bytes, source: int, address: int, bits: int) -> bytes:
    target = branch.target_of(body, source, bits)
    assert target is not None
    return branch.near(branch.CALL, address, target, bits)


def _moved_jump(body: bytes, source: int, address: int, bits: int, nops: NopTable) -> bytes:
    """``recompute_jump``: two bytes where the kernel's own test says that they reach, else five.

    The kernel's test for a jump backwards compares the distance with its own low
    byte, which no negative distance equals: backward jumps always stay long.
    """
    target = branch.target_of(body, source, bits)
    assert target is not None
    distance = branch.signed32(target - address)
    if distance >= 0 and distance - 2 <= 127:
        return bytes((branch.JMP_SHORT, (distance - 2) & 0xFF)) + nops.fill(3)
    return branch.near(branch.JMP, address, target, bits)


def _not_applied(old: bytes, detail: Alternative, how: Mapping[str, Any], bits: int, nops: NopTable) -> bytes:
    optimise = how["optimise"]
    if optimise == "padding":
        pad = detail.pad_length or 0
        # 4.1 to 5.12 count the padding at the end but look for it at the beginning of the site.
        if pad > 1 and all(byte == NOP for byte in old[:pad]):
            return old[: len(old) - pad] + nops.fill(pad)
        return old
    if optimise.startswith("runs"):
        branches, more = optimise == "runs-and-branches", how.get("nops") == "more"
        return relocate.join_runs(old, bits, nops, branches=branches, more=more)
    return join_nops(old, bits, nops) if optimise == "instructions" else old


def join_nops(code: bytes, bits: int, nops: NopTable) -> bytes:
    """``optimize_nops`` of 5.13 to 6.3: every run of two or more one-byte nops between instructions is joined."""
    if b"\x90\x90" not in code:
        return code
    result = bytearray(code)
    position = 0
    while position < len(code):
        run = position
        while run < len(code) and code[run] == NOP:
            run += 1
        if run > position:
            if run - position > 1:
                result[position:run] = nops.fill(run - position)
            position = run
            continue
        parts = opcodes.parts(code, bits, position)
        if parts is None:
            break
        position += parts.size
    return bytes(result)
