"""Sealing: the tables emptied in place, so that the kernel finds nothing left to patch.

The kernel walks its tables between addresses that are compiled into it, so the
entries stay and are made harmless:

* a paravirt entry names the first entry of its own table as its site.  The
  kernel writes there, into memory that it frees after boot, over an entry that it
  has already read;
* an alternative gets length 0 on both sides: nothing is copied;
* a zero in the lock table is what the kernel skips.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmipatch.annotate import Scan, TableInfo
from vmipatch.annotate.tables import Layout, Table, find_tables, load_format
from vmipatch.image import Image
from vmipatch.patch.patch import Cause, Patch

SEALED = ("parainstructions", "altinstructions", "smp_locks")


FIRST_WITH_WORDS = (2, 6, 22)
"""Linux 2.6.22 made an op's type its word in struct paravirt_ops; the seven types before it have numbers."""


def plan(image: Image, scan: Scan, *, on_rom: bool = False) -> Iterator[Patch]:
    """A patch for each table entry that still names something; ``on_rom``: for a kernel that will run on a VMI ROM."""
    nobodys: int | None = None
    if on_rom:
        # Word 0 is no function; of the old enumeration 0 to 6 are taken.
        nobodys = 7 if image.version is not None and image.version[:3] < FIRST_WITH_WORDS else 0
    for info in scan.tables:
        if info.family not in SEALED or info.layout is None or info.sealed:
            continue
        form = load_format(info.family)
        layout = form.layout(info.layout)
        for table in find_tables(image, form):
            if table.address == info.address:
                yield from _table(info, layout, table, nobodys)


def _table(info: TableInfo, layout: Layout, table: Table, nobodys: int | None) -> Iterator[Patch]:
    cause = Cause("seal", info.family, f"{info.section} emptied")
    whole = len(table.data) // layout.size
    tail = table.data[whole * layout.size :]
    for index in range(whole + bool(tail)):
        at = index * layout.size
        old = table.data[at : at + layout.size]
        new = _emptied(info.family, layout, table, at, old, nobodys)[: len(old)]
        if new != old:
            yield Patch(table.address + at, old, new, cause, None)


def _emptied(family: str, layout: Layout, table: Table, at: int, old: bytes, nobodys: int | None) -> bytes:
    if family == "smp_locks":
        return bytes(len(old))
    values = dict(zip(layout.fields, layout.form.unpack(old.ljust(layout.size, b"\0")), strict=True))
    if family == "altinstructions":
        values["instrlen"] = values["replacementlen"] = 0
        if "padlen" in values:
            values["padlen"] = 0
    elif nobodys is not None:
        values["len"], values["type"] = 0, nobodys
    else:
        relative = any(layout.fields[position] == "instr" for position, _ in layout.relative)
        values["instr"] = -at if relative else table.address
        # No more than one entry may be written over: the next has not been read yet.
        values["len"] = min(values["len"], layout.size)
    packed = bytearray(old.ljust(layout.size, b"\0"))
    layout.form.pack_into(packed, 0, *values.values())
    return bytes(packed)
