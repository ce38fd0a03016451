"""Immediates that the kernel replaced by the value of a variable while it started (asm/runtime-const.h)."""

from __future__ import annotations

from collections import Counter

from vmipatch.annotate import Site
from vmipatch.annotate.site import Sites
from vmipatch.explain.ground import Ground
from vmipatch.explain.late.contract import LateFamily, Live, State, Tally
from vmipatch.patch.passes import Boot


class RuntimeConsts(LateFamily):
    """Immediates by the variables that they stand for; without the dump's data all of one variable must agree."""

    family = "runtime_consts"

    def expect(self, ground: Ground, sites: Sites, live: Live) -> Tally:
        """See :class:`LateFamily`."""
        tally = Tally()
        cause = ground.cause(self.family)
        groups: dict[tuple[str, int], list[Site]] = {}
        for site in sites:
            groups.setdefault((site.op, site.length), []).append(site)
        for (name, length), group in groups.items():
            address = live.boot.lookup(name)
            value = live.data.read(address, length) if live.data is not None and address is not None else None
            tally.evidence["variable" if value is not None else "sites of the variable agree"] += len(group)
            if value is None:
                votes = Counter(bytes(ground.found[s.address - ground.base : s.end - ground.base]) for s in group)
                value = votes.most_common(1)[0][0]
            for site in group:
                ground.lay(site.address, value, cause)
            tally.states[f"{name} = {int.from_bytes(value, 'little'):#x}"] += len(group)
        return tally

    def states(self, site: Site, boot: Boot) -> tuple[list[State], tuple[str, ...]]:
        """See :class:`LateFamily`."""
        return [], ("runtime-const",)
