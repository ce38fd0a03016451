"""The lock pass: LOCK prefixes go when there is one CPU (``alternatives_smp_unlock``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmipatch.annotate import Site
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

LOCK = 0xF0


def plan(text: Text, sites: Iterable[Site], rules: Rules, target: Native) -> Iterator[Patch]:
    """Prefixes between the kernel's bounds that are still LOCK; prefixes of init code keep theirs."""
    if target.cpus != 1:
        return
    locks = rules.section("locks")
    new = bytes((locks["byte"],))
    cause = Cause("smp_locks", "lock", f"one CPU: LOCK becomes {new.hex().upper()}")
    low, high = bounds(text, locks["bounds"])
    for site in sites:
        if low <= site.address < high:
            old = text.read(site.address, 1)
            if old[0] == LOCK:
                text.write(site.address, new)
                yield Patch(site.address, old, new, cause, site)


def bounds(text: Text, names: list[str]) -> tuple[int, int]:
    """``[_text, _etext)``, by symbols; without them the section ``.text``; without sections, all."""
    image = text.image
    low, high = (image.symbols.lookup(name) for name in names)
    if low is not None and high is not None:
        return low, high
    section = image.section(".text")
    return (section.address, section.end) if section is not None else (0, 1 << image.bits)
