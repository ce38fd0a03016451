"""The pass over ENDBR instructions (``apply_seal_endbr``, 5.18 on): functions that no pointer names lose theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmipatch.annotate import Site
from vmipatch.annotate.endbr import ENDBR
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text


def plan(text: Text, sites: Iterable[Site], rules: Rules) -> Iterator[Patch]:
    """One patch a site that still holds its ENDBR."""
    poison = bytes.fromhex(rules.section("endbr")["poison"])
    endbr = ENDBR[text.image.bits]
    cause = Cause("endbr_seal", "endbr", "nothing may branch here indirectly")
    for site in sites:
        if text.read(site.address, site.length) == endbr:
            text.write(site.address, poison)
            yield Patch(site.address, endbr, poison, cause, site)
