"""The pass over ENDBR instructions (``apply_seal_endbr``, 5.18 on): functions that no pointer names lose theirs.

In kernels with FineIBT the hash before the function goes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.endbr import ENDBR
from vmipatch.patch.passes import fineibt
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
        hashes = Cause(self.family, "hash", "no caller's hash may be right here")
        how = fineibt.kernel(boot) if boot.checks is not None else None
        for site in sites:
            if text.read(site.address, site.length) == endbr:
                text.write(site.address, poison)
                yield Patch(site.address, endbr, poison, cause, site)
            if how is not None and boot.checks is not None:
                for address, new in fineibt.sealed(text, site.address, how, boot.checks):
                    old = text.read(address, len(new))
                    if old != new:
                        text.write(address, new)
                        yield Patch(address, old, new, hashes, site)
