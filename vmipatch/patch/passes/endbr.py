"""The pass over ENDBR instructions (``apply_seal_endbr``, 5.18 on): functions that no pointer names lose theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.endbr import ENDBR
from vmipatch.patch.passes.contract import Boot, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.text import Text


class EndbrSeal(Pass):
    """One patch a site that still holds its ENDBR."""

    family = "endbr_seal"
    needs_cpu = False

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        poison = bytes.fromhex(boot.rules.section("endbr")["poison"])
        endbr = ENDBR[text.image.bits]
        cause = Cause(self.family, "endbr", "nothing may branch here indirectly")
        for site in sites:
            if text.read(site.address, site.length) == endbr:
                text.write(site.address, poison)
                yield Patch(site.address, endbr, poison, cause, site)
