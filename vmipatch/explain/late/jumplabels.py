"""Branches by the state of their static keys (kernel/jump_label.c, arch/x86/kernel/jump_label.c)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.site import JumpLabel, Sites
from vmipatch.explain.ground import Ground
from vmipatch.explain.late.contract import Data, LateFamily, Live, State, Tally, five_byte_nop
from vmipatch.explain.result import Proved
from vmipatch.isa import branch
from vmipatch.isa.nops import NopTable
from vmipatch.patch.passes import Boot


class JumpLabels(LateFamily):
    """A nop or a jump, as the key says."""

    family = "jump_labels"

    def expect(self, ground: Ground, sites: Sites, live: Live) -> Tally:
        """See :class:`LateFamily`."""
        tally = Tally()
        nops = live.boot.nops
        cause = ground.cause(self.family)
        five = five_byte_nop(nops)
        groups: dict[int, list[Site]] = {}
        laid: list[tuple[int, bytes]] = []
        for site in sites:
            assert isinstance(site.detail, JumpLabel)
            groups.setdefault(site.detail.key, []).append(site)
        for key, group in groups.items():
            enabled = key_state(live.data, key) if live.data is not None else None
            tally.evidence["key" if enabled is not None else "sites of the key agree"] += len(group)
            if enabled is None:
                votes = Counter(v for s in group if (v := _vote(ground, s, five, nops)) is not None)
                enabled = votes[True] > votes[False]
            for site in group:
                detail = site.detail
                assert isinstance(detail, JumpLabel)
                taken = enabled != detail.likely
                laid.append((site.address, label_form(site, taken, five, nops)))
                tally.states["taken" if taken else "not taken"] += 1
        ground.lay_all(laid, cause)
        return tally

    def proved(self, ground: Ground, sites: Sequence[Site], live: Live) -> list[Proved]:
        """The jump labels that are not as on disk, with the state of their keys."""
        result: list[Proved] = []
        if live.data is None:
            return result
        for site in sites:
            detail = site.detail
            assert isinstance(detail, JumpLabel)
            at = site.address - ground.base
            now, before = ground.found[at : at + site.length], ground.pristine[at : at + site.length]
            jumps = now[0] in (branch.JMP, branch.JMP_SHORT)
            if now != ground.expected[at : at + site.length] or jumps == (before[0] in (branch.JMP, branch.JMP_SHORT)):
                continue
            raw = live.data.read(detail.key, 4)
            if raw is not None:
                count = int.from_bytes(raw, "little", signed=True)
                symbol, offset = ground.image.symbols.at(site.address) or (None, None)
                text = f"the key {site.op} at {detail.key:#x} is {count}"
                result.append(Proved(site.address, site.length, "static key", symbol, offset, text))
        return result

    def states(self, site: Site, boot: Boot) -> tuple[list[State], tuple[str, ...]]:
        """See :class:`LateFamily`."""
        detail = site.detail
        assert isinstance(detail, JumpLabel)
        listed = []
        for taken in (False, True):
            name = f"{site.op} is {'on' if taken != detail.likely else 'off'}"
            for table in boot.rules.nop_tables(boot.image.bits):
                listed.append(State(label_form(site, taken, five_byte_nop(table), table), name))
        return listed, ()


def label_form(site: Site, taken: bool, five: bytes, nops: NopTable) -> bytes:
    """The bytes of a jump label in one of its two states."""
    detail = site.detail
    assert isinstance(detail, JumpLabel)
    if not taken:
        return five if site.length == branch.CALL_SIZE else nops.sequences[1]
    if site.length == branch.CALL_SIZE:
        return branch.near(branch.JMP, site.address, detail.target, 32)
    return bytes((branch.JMP_SHORT, (detail.target - site.address - 2) & 0xFF))


def key_state(data: Data, key: int) -> bool | None:
    """Whether a static key is on; None where the dump does not have it, or has it just being switched on.

    While the first user is being counted the count is -1 (kernel/jump_label.c), and not all branches are changed yet.
    """
    raw = data.read(key, 4)
    count = -1 if raw is None else int.from_bytes(raw, "little", signed=True)
    return None if count < 0 else count > 0


def _vote(ground: Ground, site: Site, five: bytes, nops: NopTable) -> bool | None:
    """What a site's own bytes say of its key; None where they are neither state."""
    detail = site.detail
    assert isinstance(detail, JumpLabel)
    at = site.address - ground.base
    now = ground.found[at : at + site.length]
    for taken in (False, True):
        if now == label_form(site, taken, five, nops):
            return taken != detail.likely
    return None
