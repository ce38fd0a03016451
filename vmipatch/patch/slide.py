"""The relocation table of a relocatable kernel after its text has been patched.

The decompressor adds the distance by which it moves the kernel to every field
that the table names.  A patched site may have lost such a field (an absolute
operand became a relative call) or gained one (an alternative's replacement was
copied, absolute operand and all).  The table keeps its length, which is compiled
into the decompressor: entries that are no longer wanted are used for those that
are new, and what is left over names padding between two sections.  In a sealed image
a replacement is never copied again, so that each field in one has an entry to give for
its copy; in any other the kernel itself must copy what there is no entry for.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice, pairwise

from vmipatch.annotate.site import Alternative
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.patch.patch import Plan, Run


def adjusted(image: Image, plan: Plan, data: bytearray) -> None:
    """Correct the relocation table behind the ELF file in ``data``, the patched payload.

    Does nothing for a kernel without one.  Raises :class:`PatchError` where more
    fields are gained than there are entries for, or there is no padding to point at.
    """
    table = image.relocations
    if table is None or not len(table):
        return
    spare = _padding(image)
    for fields, width in ((table.absolute32, 4), (table.absolute64, 8), (table.inverse32, 4)):
        lost, gained = moved(plan, fields, width)
        if not lost and not gained:
            continue
        if len(gained) > len(lost) and any(patch.site is None for patch in plan.patches):
            lost |= set(islice(_copied(plan, fields, width) - lost, len(gained) - len(lost)))
        if len(gained) > len(lost) or spare is None:
            raise PatchError("the relocation table has no room for the patched sites", file=image.path)
        new = dict(zip(sorted(lost), [*sorted(gained), *[spare] * (len(lost) - len(gained))], strict=True))
        _rewrite(image, data, fields, new)


def moved(plan: Plan, fields: Iterable[int], width: int) -> tuple[set[int], set[int]]:
    """Fields that patches have overwritten, and fields that came with copied replacements."""
    present = set(fields)
    started = set(present)
    for run in plan.runs:
        present -= _covered(present, width, run)
    for patch in plan.patches:
        start, end = patch.address, patch.end
        if patch.site is None or patch.old == patch.new:
            continue
        # A field whose bytes this patch wrote with the same value is still a field.
        for at in range(start - width + 1, end):
            if at in present and any(
                patch.old[i - start] != patch.new[i - start] for i in range(max(at, start), min(at + width, end))
            ):
                present.discard(at)
        if patch.source is not None:
            detail = patch.site.detail
            size = detail.replacement_length if isinstance(detail, Alternative) else len(patch.new)
            for i in range(size - width + 1):
                if patch.source + i in started:
                    present.add(start + i)
    return started - present, present - started


def _covered(fields: set[int], width: int, run: Run) -> set[int]:
    """The fields of which a run has overwritten a part; what it wrote itself is relative."""
    starts = sorted(run.addresses)
    length = max(map(len, run.codes), default=0)
    first = ((field, bisect_left(starts, field - length + 1)) for field in fields)
    return {field for field, i in first if i < len(starts) and starts[i] < field + width}


def homeless(image: Image, plan: Plan) -> frozenset[int]:
    """Virtual addresses of the sites that brought fields for which the table has no entries, where that is so."""
    table = image.relocations
    if table is None:
        return frozenset()
    sites: set[int] = set()
    for fields, width in ((table.absolute32, 4), (table.absolute64, 8), (table.inverse32, 4)):
        lost, gained = moved(plan, fields, width)
        if len(gained) > len(lost):
            copies = [p for p in plan.patches if p.source is not None]
            sites |= {p.address for p in copies if any(p.address <= field < p.end for field in gained)}
    return frozenset(sites)


def _copied(plan: Plan, fields: Iterable[int], width: int) -> set[int]:
    """Fields in replacements that were copied to sites."""
    present = set(fields)
    found: set[int] = set()
    for patch in plan.patches:
        if patch.source is not None and patch.site is not None and isinstance(patch.site.detail, Alternative):
            last = patch.site.detail.replacement_length - width
            found |= present.intersection(range(patch.source, patch.source + last + 1))
    return found


def _padding(image: Image) -> int | None:
    """The address of eight bytes that lie in the file between two sections of one segment."""
    placed = sorted((s for s in image.sections if s.alloc and s.file_size), key=lambda s: s.address)
    for before, after in pairwise(placed):
        start = (before.end + 7) & ~7
        if after.address - start >= 8 and after.offset - before.offset == after.address - before.address:
            return start
    return None


def _rewrite(image: Image, data: bytearray, fields: tuple[int, ...], new: dict[int, int]) -> None:
    """Each list stands in the table as 32-bit words in the order of ``fields``."""
    low = struct.pack(f"<{len(fields)}I", *(f & 0xFFFFFFFF for f in fields))
    at = data.rfind(low)
    if at < 0:
        raise PatchError("the relocation table is not where it was read from", file=image.path)
    data[at : at + len(low)] = struct.pack(f"<{len(fields)}I", *(new.get(f, f) & 0xFFFFFFFF for f in fields))
