"""Asserts for people's own tests of kernel images and of what was patched into them.

    from vmipatch.testing import assert_patched_like, assert_sites

They raise AssertionError with the first site that is wrong: address, symbol, bytes and instructions.
pytest_plugin gives the same as fixtures.  Imports patch, annotate, image and isa when they are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmipatch.annotate import Scan, Site
    from vmipatch.image import Image
    from vmipatch.patch import Plan
    from vmipatch.patch.target import Target

_SHOWN = 10
_INSTRUCTION = 16


def opened(image: Image | str | PathLike[str]) -> Image:
    """An image, opened if it is a path."""
    if isinstance(image, (str, PathLike)):
        from vmipatch.image import open_image

        return open_image(Path(image))
    return image


def assert_sites(
    image: Image | str | PathLike[str],
    family: str,
    *,
    count: int | None = None,
    at_least: int | None = None,
    ops: Collection[str] | Mapping[str, int] | None = None,
    addresses: Iterable[int] | None = None,
) -> tuple[Site, ...]:
    """The sites of a family, if they are as they should be.

    ``count`` and ``at_least`` say how many; ``ops`` names all of the operations there are (a mapping: and how often
    each); ``addresses`` are virtual addresses, all of which must be sites.  A table that cannot be read fails too.
    """
    __tracebackhide__ = True
    from vmipatch.annotate import scan

    kernel = opened(image)
    found = scan(kernel, [family])
    errors = [str(f) for f in found.findings if f.severity == "error"]
    if errors:
        raise AssertionError("\n".join([f"{kernel.path}: the {family} table is damaged", *errors[:_SHOWN]]))
    sites = found.sites
    where = f"{kernel.path}: {family}"
    if count is not None and len(sites) != count:
        raise AssertionError(f"{where}: {len(sites)} sites, expected {count}")
    if at_least is not None and len(sites) < at_least:
        raise AssertionError(f"{where}: {len(sites)} sites, expected at least {at_least}")
    if ops is not None:
        _same_ops(where, kernel, sites, ops)
    wanted = set(addresses or ())
    missing = sorted(wanted - {s.address for s in sites})
    if missing:
        named = [f"  {_where(kernel, address)}" for address in missing[:_SHOWN]]
        raise AssertionError("\n".join([f"{where}: no site at {len(missing)} of {len(wanted)} addresses", *named]))
    return sites


def _same_ops(where: str, image: Image, sites: Iterable[Site], ops: Collection[str] | Mapping[str, int]) -> None:
    __tracebackhide__ = True
    found = Counter(s.op for s in sites)
    complaints = []
    for op in sorted(set(ops) | set(found)):
        if op not in found:
            complaints.append(f"  {op}: no site")
        elif op not in ops:
            first = next(s for s in sites if s.op == op)
            complaints.append(f"  {op}: {found[op]} sites, not expected; the first: {_where(image, first.address)}")
        elif isinstance(ops, Mapping) and ops[op] != found[op]:
            complaints.append(f"  {op}: {found[op]} sites, expected {ops[op]}")
    if complaints:
        raise AssertionError("\n".join([f"{where}: other operations than expected", *complaints]))


def assert_patched_like(
    original: Image | str | PathLike[str],
    patched: Image | str | PathLike[str],
    *,
    target: Target | None = None,
    cpu: str | None = None,
    features: str | PathLike[str] | None = None,
    cpus: int = 1,
    rom: str | PathLike[str] | None = None,
    rom_base: int | None = None,
    kernel: str | None = None,
    sealed: bool = False,
) -> None:
    """Every byte of ``patched`` is what the kernel's own patcher would have made of ``original``, and no other changed.

    For a ``target`` of the library, or: a CPU model (``cpu``) or a file of feature words (``features``) with ``cpus``
    CPUs, or a VMI ``rom`` at physical ``rom_base``.  ``kernel`` is the version whose rules count instead of the
    banner's; ``sealed`` as with ``vmipatch patch --seal``.
    """
    __tracebackhide__ = True
    from vmipatch.annotate import scan
    from vmipatch.patch import planner
    from vmipatch.patch.rules import parse_version

    before, after = opened(original), opened(patched)
    found = scan(before)
    if target is None:
        target = _target(before, found, cpu, features, cpus, rom, rom_base, kernel)
    version = None if kernel is None else parse_version(kernel)
    plan = planner.plan(before, found, target, kernel=version, seal=sealed, skip_unknown=True)
    _same_bytes(before, after, found, plan)


def _target(
    image: Image,
    found: Scan,
    cpu: str | None,
    features: str | PathLike[str] | None,
    cpus: int,
    rom: str | PathLike[str] | None,
    rom_base: int | None,
    kernel: str | None,
) -> Target:
    from vmipatch.cli.common import choose_target, native

    below = native(cpu, None if features is None else Path(features), cpus, image, kernel)
    base = None if rom_base is None else hex(rom_base)
    return choose_target(below, None if rom is None else Path(rom), base, None, image, found)


def _same_bytes(before: Image, after: Image, found: Scan, plan: Plan) -> None:
    __tracebackhide__ = True
    if len(before.data) != len(after.data):
        raise AssertionError(f"{after.path}: {len(after.data)} bytes, {before.path} has {len(before.data)}")
    expected = bytearray(before.data)
    patches = {}
    for address, (_, new, patch) in plan.changes().items():
        offset = before.offset_of(address)
        expected[offset] = new
        patches[offset] = patch
    held = bytes(after.data)
    if held == expected:
        return
    wrong = [i for i, (one, two) in enumerate(zip(held, expected, strict=True)) if one != two]
    first = wrong[0]
    lines = [f"{after.path}: {len(wrong)} bytes are not as expected; the first:"]
    try:
        address = before.address_of(first)
    except Exception:
        lines.append(f"  offset {first:#x}: {held[first]:02x}, expected {expected[first]:02x} (at no address)")
        raise AssertionError("\n".join(lines)) from None
    sites = [s for s in found.sites if s.address <= address < s.end]
    site = min(sites, key=lambda s: s.length, default=None)
    start = address if site is None else site.address
    length = 1 if site is None else site.length
    lines.append(f"  {_where(before, address)}" + (f", {site.family} {site.op}" if site else ", in no site"))
    at = before.offset_of(start)
    sides = (("original", bytes(before.data)), ("found", held), ("expected", bytes(expected)))
    for name, data in sides:
        lines.append(f"  {name:<9} {_code(before, data[at : at + _INSTRUCTION], start, length)}")
    cause = patches.get(first)
    lines.append(f"  because: {cause.cause.reason}" if cause else "  because: nothing changes this byte")
    raise AssertionError("\n".join(lines))


def _where(image: Image, address: int) -> str:
    named = image.symbols.at(address)
    return f"{address:#x} {named[0]}+{named[1]:#x}" if named else f"{address:#x}"


def _code(image: Image, data: bytes, address: int, length: int) -> str:
    """The bytes of a site, and the instructions that begin in it."""
    from vmipatch.isa.decode import disassemble

    texts = [x.text for x in disassemble(data, image.bits, address) if x.address < address + length]
    return f"{data[:length].hex(' '):<26} {'; '.join(texts)}"


def snapshot_lines(image: Image, subject: Scan | Plan) -> list[dict[str, Any]]:
    """A site table or a patch plan as rows that are the same for the same kernel, wherever its file lies."""
    from vmipatch.annotate import Scan

    if isinstance(subject, Scan):
        return [
            {
                "address": f"{s.address:#x}",
                "where": _where(image, s.address).partition(" ")[2],
                "family": s.family,
                "op": s.op,
                "bytes": image.read(s.address, s.length).hex(),
            }
            for s in subject.sites
        ]
    return [
        {
            "address": f"{p.address:#x}",
            "where": _where(image, p.address).partition(" ")[2],
            "family": p.cause.family,
            "op": p.cause.op,
            "old": p.old.hex(),
            "new": p.new.hex(),
        }
        for p in subject.patches
    ]


def first_difference(image: Image, kept: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """What to say of two snapshots that differ: how many rows, and the first of them in full."""
    old, new = ({(r["address"], r["family"], i): r for r, i in _numbered(rows)} for rows in (kept, now))
    keys = sorted(old.keys() | new.keys(), key=lambda k: (int(k[0], 16), k[1], k[2]))
    wrong = [k for k in keys if old.get(k) != new.get(k)]
    if not wrong:
        return "the same rows in another order (of two sites that overlap, the later one wins)"
    before, after = old.get(wrong[0]), new.get(wrong[0])
    row = after or before
    assert row is not None
    lines = [f"{len(wrong)} rows differ; the first: {row['address']} {row['where']}, {row['family']} {row['op']}"]
    for name, each in (("kept", before), ("now", after)):
        if each is None:
            lines.append(f"  {name:<5} (none)")
            continue
        for part in ("bytes", "old", "new"):
            if part in each:
                code = bytes.fromhex(each[part])
                label = name if part == "bytes" else f"{name} {part}"
                lines.append(f"  {label:<9} {_code(image, code, int(row['address'], 16), len(code))}")
        if before and after and before["op"] != after["op"]:
            lines.append(f"  {name:<9} {each['op']}")
    return "\n".join(lines)


def _numbered(rows: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], int]]:
    """Rows with their number among those of the same place and family: two alternatives may share an address."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = (row["address"], row["family"])
        yield row, seen[key]
        seen[key] += 1
