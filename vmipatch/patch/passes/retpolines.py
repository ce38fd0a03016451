"""The pass over retpoline sites (``apply_retpolines``, 5.16 on): where no retpoline is wanted, the branch itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.site import Thunk
from vmipatch.image import Image
from vmipatch.patch.passes import its, relocate
from vmipatch.patch.passes.alternatives import join_nops
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

_LFENCE = b"\x0f\xae\xe8"
_INT3 = b"\xcc"
_CS = b"\x2e"
_MOST_PREFIXES = 3
PREFIXES = "prefixes"
"""The word of an era's ``retpolines.form``."""
COUNTED = {"call": "__x86_indirect_call_thunk_array", "jmp": "__x86_indirect_jump_thunk_array"}
STRIDE = 32
"""Bytes from one register's thunk to the next (RETPOLINE_THUNK_SIZE)."""
CALL_DEPTH = "CALL_DEPTH"
ITS = "INDIRECT_THUNK_ITS"


class Retpolines(Pass):
    """One patch for every site that the kernel rewrites; none where the CPU keeps its retpolines as they are."""

    family = "retpoline_sites"

    def applies(self, boot: Boot) -> bool:
        """Not where the CPU keeps its retpolines, unless calls are counted."""
        return boot.has("RETPOLINE_LFENCE") or not boot.has("RETPOLINE") or boot.has(CALL_DEPTH)

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        fence = boot.has("RETPOLINE_LFENCE")
        if boot.has("RETPOLINE") and not fence:
            yield from counted(text, sites, boot)
            return
        thunks = boot.its if boot.has(ITS) else None
        bits, nops = text.image.bits, boot.nops
        how, form = boot.rules.section("alternatives"), boot.rules.section("retpolines")
        optimise, more = how["optimise"], how.get("nops") == "more"
        int3, prefixes = form.get("int3", True), form.get("form") == PREFIXES
        reason = "no retpoline, after LFENCE" if fence else "no retpoline"
        for site in sites:
            old = text.read(site.address, site.length)
            if old != text.image.read(site.address, site.length):
                # Paranoid FineIBT has written the branch already.
                continue
            if thunks is not None and (to_thunk := _its(site, old, fence, thunks)) is not None:
                text.write(site.address, to_thunk)
                yield Patch(site.address, old, to_thunk, Cause(self.family, site.op, "a thunk of its own"), site)
                continue
            new = direct(site, old, fence=fence, int3=int3, prefixes=prefixes)
            if new is None:
                continue
            if optimise == "instructions":
                new = join_nops(new, bits, nops)
            elif optimise.startswith("runs"):
                new = relocate.join_runs(new, bits, nops, branches=optimise == "runs-and-branches", more=more)
            text.write(site.address, new)
            yield Patch(site.address, old, new, Cause(self.family, site.op, reason), site)

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """With retpolines, without, or with LFENCE; with those that count calls, and thunks against ITS."""
        keep, fence = rules.bit("RETPOLINE"), rules.bit("RETPOLINE_LFENCE")
        if keep is None or fence is None:
            return []
        off = tuple((bit, False) for bit in map(rules.bit, (CALL_DEPTH, ITS)) if bit is not None)
        found = [
            Choice("retpoline", ((keep, True), (fence, False), *off)),
            Choice("no retpoline", ((keep, False), (fence, False), *off)),
            Choice("LFENCE", ((fence, True), *off)),
        ]
        depth, its_bit = rules.bit(CALL_DEPTH), rules.bit(ITS)
        if depth is not None and image.symbols.lookup(COUNTED["call"]) is not None:
            found.append(Choice("retpolines that count", ((keep, True), (fence, False), *off, (depth, True))))
        if its_bit is not None and image.symbols.lookup(its.STATIC) is not None:
            found.append(Choice("thunks against ITS", ((keep, False), (fence, False), *off, (its_bit, True))))
        return [found]


def counted(text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
    """Retpolines that are kept while calls are counted: to thunks that count, or (for jumps) that do not."""
    arrays = {kind: boot.lookup(name) for kind, name in COUNTED.items()}
    for site in sites:
        detail = site.detail
        assert isinstance(detail, Thunk)
        array = arrays["call" if site.op.startswith("call") else "jmp"]
        if detail.register is None or array is None:
            continue
        old = text.read(site.address, site.length)
        new = its.led(old, site.address, array + STRIDE * detail.register)
        text.write(site.address, new)
        yield Patch(site.address, old, new, Cause(Retpolines.family, site.op, "a retpoline where calls count"), site)


def _its(site: Site, old: bytes, fence: bool, thunks: its.Thunks) -> bytes | None:
    """The branch to a thunk against Indirect Target Selection; None where the site needs none (``patch_retpoline``)."""
    detail = site.detail
    assert isinstance(detail, Thunk)
    before = (2 if site.op.startswith("jcc") else 0) + (len(_LFENCE) if fence else 0)
    if detail.register is None or not its.wanted_at(site.address + before, detail.register):
        return None
    target = thunks.target(site.address, detail.register)
    return old if target is None else its.led(old, site.address, target)


def direct(site: Site, old: bytes, *, fence: bool, int3: bool, prefixes: bool = False) -> bytes | None:
    """The indirect branch of a site in as many bytes (``emit_indirect``); None where it does not fit.

    ``fence`` puts LFENCE before it; ``int3`` puts one INT3 behind a jump, so that nothing is speculated into (6.0 on),
    and nops behind that and behind a call.  With ``prefixes`` (6.18 on) a call that leaves up to three bytes
    has them in front as CS prefixes, and all that a jump leaves is INT3.
    """
    detail = site.detail
    assert isinstance(detail, Thunk)
    if detail.register is None:
        return None
    kind = site.op.split()[0]
    body = b""
    if kind == "jcc":
        # A short jump over the rest, on the opposite condition.
        body += bytes((0x70 + ((old[1] & 0xF) ^ 1), site.length - 2))
    if fence:
        body += _LFENCE
    jump = bytes((0xFF, (0xD0 if kind == "call" else 0xE0) + (detail.register & 7)))
    if detail.register >= 8:
        jump = b"\x41" + jump
    rest = site.length - len(body) - len(jump)
    if rest < 0:
        return None
    if prefixes and kind == "call" and rest <= _MOST_PREFIXES:
        return body + _CS * rest + jump
    body += jump
    if prefixes and kind != "call":
        return body + _INT3 * rest
    if kind != "call" and int3 and len(body) < site.length:
        body += _INT3
    return body + b"\x90" * (site.length - len(body))
