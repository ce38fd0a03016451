"""Sealing: the tables emptied, so that the kernel finds nothing left to patch.

The kernel walks its tables between addresses that are compiled into it.  Where an entry can be made
harmless in its place, that is done:

* a paravirt entry names the first entry of its own table as its site.  The
  kernel writes there, into memory that it frees after boot, over an entry that it
  has already read;
* an alternative gets length 0 on both sides, and no flags: nothing is copied;
* a zero in the lock table is what the kernel skips.

An entry that names a return, an indirect branch or an ENDBR has no harmless form: the kernel warns of
instructions that it did not expect.  There the code that walks the table is told that it ends where it begins.

The hashes of indirect calls (kCFI, FineIBT) are seeded anew by each boot: a kernel that has them is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmipatch import facts
from vmipatch.annotate import Scan, TableInfo
from vmipatch.annotate.family import FAMILIES, Sealing
from vmipatch.annotate.tables import Layout, Table, find_tables, load_format
from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.patch import Cause, Patch

_LONGEST = 4096
"""Bytes of a function that walks tables: it is a list of calls."""
_ALIGNED = 16
"""Bytes that x86-64 aligns functions to (CONFIG_FUNCTION_ALIGNMENT_16B)."""
_NEAR = 32
"""Bytes between the loads of a table's two ends, which are arguments of one call."""

CALLS = "call_sites"
_ON_STACK = b"\x48\xc7\x04\x24"
"""MOV of an immediate to where RSP points."""
_DISPLACED = (b"\x48\xc7\x44\x24", b"\x48\xc7\x45")
"""The same with a displacement of 8 bits behind it, from RSP and from RBP."""

FIRST_WITH_WORDS = (2, 6, 22)
"""Linux 2.6.22 made an op's type its word in struct paravirt_ops; the seven types before it have numbers."""


def plan(image: Image, scan: Scan, walked: Iterable[str], *, on_rom: bool = False) -> Iterator[Patch]:
    """What empties the tables of all passes of the boot; ``on_rom``: for a kernel that will run on a VMI ROM.

    ``walked`` are the families whose tables the kernel walks when it boots.  Raises :class:`PatchError` for a table
    that cannot be emptied.
    """
    nobodys: int | None = None
    if on_rom:
        # Word 0 is no function; of the old enumeration 0 to 6 are taken.
        nobodys = 7 if image.version is not None and image.version[:3] < FIRST_WITH_WORDS else 0
    for info in scan.tables:
        if FAMILIES[info.family].sealing is not Sealing.ENTRIES or info.layout is None or info.sealed:
            continue
        form = load_format(info.family)
        layout = form.layout(info.layout)
        for table in find_tables(image, form):
            if table.address == info.address:
                yield from _table(info, layout, table, nobodys)
    for family in walked:
        if family == CALLS and any(segment.address == 0 and segment.file_size for segment in image.segments):
            # Up to 6.14 per-CPU data is linked at 0, and its distance from RIP is wrong where code runs at its
            # physical address: the kernel's first calls would count somewhere else.
            raise PatchError(
                "cannot be sealed: calls that count would run before this kernel's per-CPU data can be reached",
                file=image.path,
            )
        if FAMILIES[family].sealing is Sealing.REFUSED:
            for table in find_tables(image, load_format(family)):
                raise PatchError(
                    "cannot be sealed: each boot chooses by chance what it writes by this table", file=image.path,
                    section=table.name, address=table.address,
                )  # fmt: skip
        for table in find_tables(image, load_format(family)) if FAMILIES[family].sealing is Sealing.BOUNDS else ():
            yield _bounds(image, family, table)


def _bounds(image: Image, family: str, table: Table) -> Patch:
    """The end of a table, as its walker loads it, becomes its beginning.

    x86-64 passes them in RDI and RSI (psABI, section 3.2.3), loaded by MOV with a sign-extended immediate
    (``48 C7 C7``, ``48 C7 C6``) or by LEA relative to RIP (``48 8D 3D``, ``48 8D 35``); or they are members of a
    structure on the stack (MOV of an immediate to where RSP or RBP points).
    """
    name, start, code = _walker(image, family, table)
    found = _ends(code, start, table)
    if len(found) != 1:
        raise PatchError(
            f"cannot be sealed: {name} loads the ends of this table at {len(found)} places", file=image.path,
            section=table.name, address=start,
        )  # fmt: skip
    return _emptying(family, name, start, code, table, found[0])


def _walker(image: Image, family: str, table: Table) -> tuple[str, int, bytes]:
    """The function that walks a family's tables: its name, virtual address and bytes."""
    name: str = facts.load("tables", family)["walker"]
    start = image.symbols.lookup(name)
    if start is None:
        raise PatchError(
            f"cannot be sealed: no symbol says where {name} is, which walks this table", file=image.path,
            section=table.name, address=table.address,
        )  # fmt: skip
    return name, start, _function(image, start)


def _ends(code: bytes, start: int, table: Table) -> list[tuple[int, bool]]:
    """Where in a function the end of a table is loaded beside its beginning: see :func:`_loads`."""
    begins = [at for at, _ in _loads(code, start, table.address, b"\x48\xc7\xc7", b"\x48\x8d\x3d")]
    ends = _loads(code, start, table.address + len(table.data), b"\x48\xc7\xc6", b"\x48\x8d\x35")
    return [(at, absolute) for at, absolute in ends if any(abs(at - other) < _NEAR for other in begins)]


def _emptying(family: str, name: str, start: int, code: bytes, table: Table, found: tuple[int, bool]) -> Patch:
    at, absolute = found
    place = start + at
    value = table.address if absolute else table.address - place - 4
    new = (value & 0xFFFFFFFF).to_bytes(4, "little")
    return Patch(place, code[at : at + 4], new, Cause("seal", family, f"{table.name} emptied: {name}"), None)


def _function(image: Image, start: int) -> bytes:
    """The bytes of a function, as far as the next symbol; ``start`` is virtual."""
    section = image.section_at(start)
    longest = _LONGEST if section is None else min(_LONGEST, section.address + section.file_size - start)
    code = image.read(start, longest)
    own = image.symbols.at(start)
    for at in range(_ALIGNED, len(code), _ALIGNED):
        named = image.symbols.at(start + at)
        if named is None or own is None or named[0] != own[0]:
            return code[:at]
    return code


def _loads(code: bytes, start: int, address: int, absolute: bytes, relative: bytes) -> Iterator[tuple[int, bool]]:
    """Offsets of the fields by which an address is loaded, and whether by its own value or relative to the field's end.

    ``absolute`` and ``relative`` are what stands before the field in the one and the other.
    """
    low = (address & 0xFFFFFFFF).to_bytes(4, "little")
    at = code.find(low)
    while at >= 0:
        if code[:at].endswith((absolute, _ON_STACK)) or code[: at - 1].endswith(_DISPLACED):
            yield at, True
        at = code.find(low, at + 1)
    at = code.find(relative)
    while at >= 0:
        field = at + len(relative)
        if branch.signed32(int.from_bytes(code[field : field + 4], "little")) == address - (start + field + 4):
            yield field, False
        at = code.find(relative, at + 1)


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
        # A direct call of no bytes is no call, and the kernel stops with a BUG at that.
        values.update((word, 0) for word in ("padlen", "flags") if word in values)
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
