"""The pass over return sites (``apply_returns``, 5.19 on): a return, or a jump to the mitigations' thunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.site import Places, Thunk
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

RET = b"\xc3\xcc\xcc\xcc\xcc"
"""A return, and INT3 so that nothing behind it is speculated into."""

DEFAULT = "__x86_return_thunk"
ITS = "its_return_thunk"

ITS_HALF = 0x20
"""Indirect Target Selection strikes branches in the lower half of a cache line: this bit of their address is clear."""


def forms_at(addresses: Sequence[int], thunk: int | None, its: int | None, bits: int) -> list[bytes]:
    """The five bytes of a return at each of many virtual addresses; ``thunk`` None means a plain return.

    ``its`` is the address of the thunk against Indirect Target Selection, which is used
    only where that can happen (``cpu_wants_rethunk_at``).
    """
    if thunk is None:
        return [RET] * len(addresses)
    jumps = branch.near_all(branch.JMP, addresses, thunk, bits)
    if thunk != its:
        return jumps
    return [RET if address & ITS_HALF else jump for address, jump in zip(addresses, jumps, strict=True)]


def form_at(address: int, thunk: int | None, its: int | None, bits: int) -> bytes:
    """What :func:`forms_at` gives at one address."""
    return forms_at((address,), thunk, its, bits)[0]


def thunk_of(boot: Boot) -> int | None:
    """What ``x86_return_thunk`` holds when returns are patched; None where they become plain returns.

    What the boot says, else what its mitigations choose by the CPU's features (``[returns]`` of the era).
    """
    if not boot.has("RETHUNK"):
        return None
    if boot.return_thunk is not None:
        return boot.return_thunk
    for feature, name in boot.rules.section("returns").get("thunks", ()):
        if boot.has(feature) and (address := boot.lookup(name)) is not None:
            return address
    return boot.lookup(DEFAULT)


class Returns(Pass):
    """One patch a site: a plain return, or a jump to the thunk that the boot's mitigations chose."""

    family = "return_sites"

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        bits = text.image.bits
        thunk, its = thunk_of(boot), boot.lookup(ITS)
        named = boot.image.symbols.at(thunk) if thunk is not None else None
        name = named[0] if named is not None and named[1] == 0 else f"{thunk or 0:#x}"
        plain = Cause(self.family, "return", "a return")
        jump = Cause(self.family, "return", f"a jump to {name}")
        # The kernel skips what is no jump, and so an address that the table has twice.
        places: dict[int, Site] = {}
        for site in sites:
            places.setdefault(site.address, site)
        kept = places.values()
        olds, forms = text.read_all(kept), forms_at(list(places), thunk, its, bits)
        # A jump with a prefix leaves a byte for one more INT3.
        patches = [
            Patch(site.address, old, form.ljust(site.length, RET[1:2]), plain if form is RET else jump, site)
            for site, old, form in zip(kept, olds, forms, strict=True)
            if old[site.length - branch.CALL_SIZE] == branch.JMP
        ]
        text.write_all((patch.address, patch.new) for patch in patches)
        yield from patches

    def codes(self, text: Text, places: Places, boot: Boot) -> list[bytes] | None:
        """See :class:`Pass`.  A table in bulk holds nothing but jumps of five bytes, on disk."""
        if not text.begin_with(places.addresses, branch.JMP):
            return None
        return forms_at(places.addresses, thunk_of(boot), boot.lookup(ITS), text.image.bits)

    def kept(self, sites: Sequence[Site]) -> frozenset[int]:
        """The thunk that returns go to until they are patched: from 6.9 on it is an alternative itself."""
        return frozenset(s.detail.target for s in sites if isinstance(s.detail, Thunk))

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """Plain returns, or one of the thunks that the image has."""
        rethunk = rules.bit("RETHUNK")
        if rethunk is None:
            return []
        found = [Choice("returns", ((rethunk, False),))]
        for name in thunk_names(rules):
            if (address := image.symbols.lookup(name)) is not None:
                found.append(Choice(f"returns through {name}", ((rethunk, True),), return_thunk=address))
        return [found]


def thunk_names(rules: Rules) -> list[str]:
    """The functions that ``x86_return_thunk`` may point at in an era."""
    return list(dict.fromkeys([DEFAULT, *(name for _, name in rules.section("returns").get("thunks", ()))]))
