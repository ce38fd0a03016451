"""The lock pass: LOCK prefixes go when there is one CPU (``alternatives_smp_unlock``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.image import Image
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

LOCK = 0xF0


class Locks(Pass):
    """Prefixes between the kernel's bounds that are still LOCK; prefixes of init code keep theirs."""

    family = "smp_locks"

    def applies(self, boot: Boot) -> bool:
        """On one CPU only."""
        return boot.native is not None and boot.native.cpus == 1

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        locks = boot.rules.section("locks")
        new = bytes((locks["byte"],))
        cause = Cause(self.family, "lock", f"one CPU: LOCK becomes {new.hex().upper()}")
        low, high = bounds(text, locks["bounds"])
        for site in sites:
            if low <= site.address < high:
                old = text.read(site.address, 1)
                if old[0] == LOCK:
                    text.write(site.address, new)
                    yield Patch(site.address, old, new, cause, site)

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """One CPU, or more."""
        return [[Choice("one CPU", cpus=1), Choice("", cpus=2)]]


def bounds(text: Text, names: list[str]) -> tuple[int, int]:
    """``[_text, _etext)``, by symbols; without them the section ``.text``; without sections, all.

    Of a module all that its caller gives: which of its memory counts, the release decides.
    """
    image = text.image
    if image.container == "module":
        return 0, 1 << image.bits
    low, high = (image.symbols.lookup(name) for name in names)
    if low is not None and high is not None:
        return low, high
    section = image.section(".text")
    return (section.address, section.end) if section is not None else (0, 1 << image.bits)
