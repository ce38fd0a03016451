"""A patch and its cause: the one object that is written, validated and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vmipatch.annotate import Site


class Cause(NamedTuple):
    """Why bytes change: the pass (a family, or ``seal``), the op, and one line for a person."""

    family: str
    op: str
    reason: str


class Patch(NamedTuple):
    """Bytes that the kernel's own patcher would write at a virtual address.

    ``old`` is what stood there before this patch and after all earlier ones;
    ``old`` and ``new`` are equally long and may be equal.  ``site`` is None for
    bytes that no site names (a sealed table).  ``source`` is the virtual address that
    the new bytes were copied from, with the fields in them that KASLR moves; None where they were made.
    """

    address: int
    old: bytes
    new: bytes
    cause: Cause
    site: Site | None
    source: int | None = None

    @property
    def end(self) -> int:
        """The virtual address just after the patch."""
        return self.address + len(self.new)


class Run(NamedTuple):
    """The patches of one pass over a table in bulk: what each of many virtual addresses becomes, and no more.

    They were made after ``after`` of the plan's own patches.
    """

    after: int
    family: str
    addresses: Sequence[int]
    codes: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Plan:
    """Patches in the order in which the kernel makes them, and what a person should know about them.

    ``runs`` are those over tables that the scan read in bulk, which only a boot's plan may have.

    ``rules`` names the era of the kernel's patcher (a file of ``specs/kernels/``),
    ``nops`` its nop table; ``sites`` are those that each family's pass looked at; ``left``
    counts those that are left for the kernel itself, which takes them for a fault once they are rewritten;
    ``skipped`` are those that keep their bytes because nobody knows what they do.
    """

    patches: tuple[Patch, ...]
    warnings: tuple[str, ...] = ()
    rules: str = ""
    nops: str = ""
    sites: Mapping[str, Sequence[Site]] = field(default_factory=dict, compare=False, repr=False)
    left: Mapping[str, int] = field(default_factory=dict, compare=False)
    runs: tuple[Run, ...] = ()
    skipped: tuple[Site, ...] = ()

    def changes(self) -> dict[int, tuple[int, int, Patch]]:
        """Every byte that ends up different: virtual address to (old, new, the last patch that wrote it)."""
        first: dict[int, int] = {}
        last: dict[int, tuple[int, Patch]] = {}
        for patch in self.patches:
            for i, (old, new) in enumerate(zip(patch.old, patch.new, strict=True)):
                if old != new:
                    address = patch.address + i
                    first.setdefault(address, old)
                    last[address] = new, patch
        return {a: (first[a], new, patch) for a, (new, patch) in last.items() if first[a] != new}
