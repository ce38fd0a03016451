"""Calls of ``__fentry__`` or ``mcount``: nops while nobody traces (arch/x86/kernel/ftrace.c)."""

from __future__ import annotations

from itertools import repeat

from vmipatch.annotate import Site
from vmipatch.annotate.site import Sites
from vmipatch.explain.ground import Ground
from vmipatch.explain.late.contract import LateFamily, Live, State, Tally, five_byte_nop, five_byte_nops
from vmipatch.isa import branch
from vmipatch.patch.passes import Boot

_SAMPLED = 256


class McountCalls(LateFamily):
    """Every site holds the nop; all of them their calls where the kernel never got so far as ftrace_init."""

    family = "mcount"

    def expect(self, ground: Ground, sites: Sites, live: Live) -> Tally:
        """See :class:`LateFamily`."""
        tally = Tally()
        found, base = ground.found, ground.base
        addresses = list(sites.addresses())
        sample = addresses[:: max(1, len(sites) // _SAMPLED)]
        calls = sum(found[address - base] == branch.CALL for address in sample)
        if calls * 2 > len(sample):
            tally.states["call, ftrace not started"] = len(sites)
            return tally
        nop = five_byte_nop(live.boot.nops)
        cause = ground.cause(self.family)
        ground.lay_all(zip(addresses, repeat(nop)), cause)
        tally.states["nop"] = len(sites)
        return tally

    def states(self, site: Site, boot: Boot) -> tuple[list[State], tuple[str, ...]]:
        """See :class:`LateFamily`."""
        patterns = ("ftrace-call", "ftrace-jump") if boot.rules.section("mcount").get("jumps") else ("ftrace-call",)
        return [State(five, "not traced") for five in five_byte_nops(boot)], patterns
