"""The fields that KASLR moves, and where a boot's passes leave them: what each state of the legal set says of itself.

Imports image, patch and explain.late.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from vmipatch.explain.late import Move
from vmipatch.image import Image
from vmipatch.patch.patch import Patch, Plan
from vmipatch.patch.slide import moved

KERNEL = "kernel"
"""What moves of the kernel's own states name: the memory that KASLR places."""

_BLOCK = 4
"""Bits of an address within a block of fields."""


class Fields:
    """The fields that KASLR moves, and where they are after a boot's passes."""

    def __init__(self, image: Image, spans: Sequence[tuple[int, int]]) -> None:
        """``spans`` are all that will be asked for, virtual addresses and lengths in ascending order.

        Fields between them are left out: they stay where they are.
        """
        table = image.relocations
        lists = ((table.absolute32, 4, 1), (table.absolute64, 8, 1), (table.inverse32, 4, -1)) if table else ()
        first, last = (spans[0][0], sum(spans[-1])) if spans else (0, 0)
        self._kinds = []
        self._blocks: set[int] = set()
        for fields, width, sign in lists:
            ordered = sorted(fields)
            kept = [f for f in ordered if not first <= f < last]
            kept += (f for start, length in spans for f in _between(ordered, start, start + length - width + 1))
            self._kinds.append((sorted(kept), width, sign))
            self._blocks.update(at >> _BLOCK for field in kept for at in (field, field + width - 1))

    def inside(self, start: int, end: int) -> bool:
        """Whether there may be fields between two virtual addresses."""
        low, high = start >> _BLOCK, (end - 1) >> _BLOCK
        if low in self._blocks or high in self._blocks:
            return True
        return high > low + 1 and any(block in self._blocks for block in range(low, high))

    def concern(self, patch: Patch) -> bool:
        """Whether a patch may write over fields, or bring them along from where it was copied."""
        size = len(patch.new)
        source = patch.source
        return self.inside(patch.address, patch.address + size) or (
            source is not None and self.inside(source, source + size)
        )

    def after(
        self, patches: Iterable[Patch], spans: Sequence[tuple[int, int]], none: list[tuple[Move, ...]]
    ) -> list[tuple[Move, ...]]:
        """The fields of stretches of text (each a virtual address and a length, in ascending order).

        ``none`` is the answer where none of them has any.
        """
        plan = Plan(tuple(filter(self.concern, patches)))
        starts = [start for start, _ in spans]
        holding = [(start, start + length) for start, length in spans if self.inside(start, start + length)]
        if not plan.patches and not holding:
            return none
        found: dict[int, list[Move]] = {}
        for fields, width, sign in self._kinds:
            here = {f for start, end in holding for f in _between(fields, start, end - width + 1)}
            near = set(here)
            for patch in plan.patches:
                near.update(_between(fields, patch.address - width + 1, patch.end))
                if patch.source is not None:
                    near.update(_between(fields, patch.source, patch.source + len(patch.new)))
            lost, gained = moved(plan, near, width)
            way = ((KERNEL,), ()) if sign > 0 else ((), (KERNEL,))
            for field in (here - lost) | gained:
                index = bisect_right(starts, field) - 1
                if index >= 0 and field + width <= sum(spans[index]):
                    found.setdefault(index, []).append(Move(field - starts[index], width, *way))
        return [tuple(sorted(found.get(index, ()))) for index in range(len(spans))] if found else none


def _between(fields: Sequence[int], start: int, end: int) -> Sequence[int]:
    return fields[bisect_left(fields, start) : bisect_left(fields, end)]
