"""What the image itself tells of its kernel's patcher, laid over the rules that its version points at.

A distribution's kernel carries other releases' changes, so what can be read is read: the constant that replaces
ENDBR in the code that compares with it, the table of nops in the data, the bytes that static calls may become beside
each other in ``.rodata``, and feature bits in the functions that test one of them.  The candidates stand in
``specs/`` with the releases that brought them.  Imports annotate, image, isa, facts and patch.rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from vmipatch import facts
from vmipatch.annotate import Scan, Site
from vmipatch.annotate.features import numbers
from vmipatch.annotate.site import Alternative
from vmipatch.image import Image
from vmipatch.image.search import find_each
from vmipatch.isa import nops as nop_tables
from vmipatch.patch.rules import Rules, Version, choose, eras, parse_version

_NEAR = 0x100
"""Bytes from its start in which a function that tests one feature does so."""

_LEAST_TABLE = 30
"""Bytes of a nop table, its sequences one behind the other, that no other data has by chance."""

_CONSTANTS = (".rodata", ".data", ".init.rodata")

_COMPARE_EAX, _COMPARE, _MOVE = 0x3D, 0x81, 0xB8
"""Opcodes with a 32-bit immediate behind (Intel SDM vol. 2): CMP EAX, CMP of a register (``/7``), MOV to a register."""


class Settled(NamedTuple):
    """Rules as the image bears them out, a line for each thing that it told, and what a person should know."""

    rules: Rules
    told: tuple[str, ...]
    warnings: tuple[str, ...]


_settled: WeakKeyDictionary[Image, dict[Version | None, Settled]] = WeakKeyDictionary()
_forms: WeakKeyDictionary[Image, tuple[dict[str, Any], ...]] = WeakKeyDictionary()


def rules_for(image: Image, scan: Scan, kernel: Version | None = None) -> Settled:
    """The rules of an image's own patcher: the era of its version (or of ``kernel``) and tables, settled by the image.

    An image is asked once: the first ``scan`` should have its alternatives.  Raises as :func:`rules.choose` does.
    """
    known = _settled.setdefault(image, {})
    if kernel not in known:
        rules, warnings = choose(kernel or image.version, scan.tables, image.path)
        found = settle(image, rules, scan.of("altinstructions"))
        known[kernel] = found._replace(warnings=(*warnings, *found.warnings))
    return known[kernel]


def settle(image: Image, rules: Rules, sites: Iterable[Site]) -> Settled:
    """An era's rules, corrected by what this image shows; of ``sites`` the alternatives are looked at.

    What it does not show stays as the era has it, and is among the warnings.
    """
    spec = dict(rules.spec)
    told: list[str] = []
    warnings: list[str] = []

    def take(section: str, values: dict[str, Any], what: str) -> None:
        before = spec.get(section, {})
        spec[section] = {**before, **values}
        changed = any(before.get(key) not in (None, value) for key, value in values.items())
        told.append(what + (f", not as {rules.name} has it" if changed else ""))

    # Code that knows the poison has a table of what to seal.
    seals = image.reconstructed or any(True for _ in _tables(image, "endbr_seal"))
    if "endbr_seal" in rules.boot and seals:
        row = poison(image)
        if row is not None:
            take(
                "endbr", {"poison": row["poison"]}, f"a sealed ENDBR is {row['poison']}, in the code that looks for it"
            )
            take("retpolines", {"form": row["indirect"]}, f"indirect branches are written with {row['indirect']}")
        elif not image.reconstructed:
            warnings.append(f"the image does not tell what a sealed ENDBR becomes: taken to be as in {rules.name}")
    name = nop_table(image)
    if name is not None:
        rows = [row for row in spec["nops"] if row.get("bits", image.bits) != image.bits]
        if [row["table"] for row in spec["nops"] if row.get("bits", image.bits) == image.bits] != [name]:
            told.append(f"the only nop table in the data is {name}, not as {rules.name} has it")
        spec["nops"] = [*rows, {"bits": image.bits, "table": name}]
    bits, known = feature_bits(image, sites), numbers(image.version)
    told += [
        f"{name} is bit {bit >> 5}*32+{bit & 31}, by the code that tests it"
        for name, bit in bits.items()
        if known.get(name) != bit
    ]
    spec["bits"] = {**known, **bits}
    return Settled(replace(rules, spec=spec), tuple(told), tuple(warnings))


def _tables(image: Image, family: str) -> Iterator[str]:
    from vmipatch.annotate.tables import find_tables, load_format

    return (table.name for table in find_tables(image, load_format(family)))


def poison(image: Image) -> dict[str, Any] | None:
    """The row of ``specs/tables/endbr_seal.toml`` whose constant this kernel's code compares with or writes.

    The code that has it most often decides; None where none has it.
    """
    rows = facts.load("tables", "endbr_seal")["poison"]
    values = [bytes.fromhex(row["poison"]) for row in rows]
    counts = list(zip(_immediates(image, values), rows, strict=True))
    count, best = max(counts, key=lambda pair: pair[0])
    return best if count else None


def _immediates(image: Image, values: list[bytes]) -> list[int]:
    """How many instructions of a compare or a move have each 32-bit immediate, as far as the bytes before it tell."""
    found, data = [0] * len(values), image.data
    for start, end in _code(image):
        start = max(start + 1, 2)
        for at, number in find_each(data, values, start, end):
            opcode, last = data[at - 2], data[at - 1]
            wanted = last == _COMPARE_EAX or _MOVE <= last < _MOVE + 8 or (opcode == _COMPARE and last >= 0xF8)
            found[number] += wanted
    return found


def nop_table(image: Image) -> str | None:
    """The one nop table, of those that kernels of its width have had, whose sequences stand in the kernel's data.

    None where it has none or more than one (before 5.13, where the CPU decides).
    """
    bits = image.bits
    names = dict.fromkeys(r["table"] for era in eras() for r in era.spec["nops"] if r.get("bits", bits) == bits)
    tables = {name: b"".join(nop_tables.table(name).sequences) for name in names}
    long = {name: body for name, body in tables.items() if len(body) >= _LEAST_TABLE}
    there = _has(image, list(long.values()))
    found = {name: body for (name, body), has in zip(long.items(), there, strict=True) if has}
    whole = [n for n, body in found.items() if not any(o != body and o.startswith(body) for o in found.values())]
    return whole[0] if len(whole) == 1 else None


def call_forms(image: Image) -> tuple[dict[str, Any], ...]:
    """The rows of ``specs/tables/static_calls.toml`` whose function this kernel has, and whose bytes its constants.

    Without any of their bytes (a compiler may compare with immediates): those that are as old as the kernel's version.
    An image is asked once, whoever asks for each of its calls.
    """
    known = _forms.get(image)
    if known is None:
        known = _forms[image] = _read_forms(image)
    return known


def _read_forms(image: Image) -> tuple[dict[str, Any], ...]:
    rows = facts.load("tables", "static_calls")["form"]
    named = [row for row in rows if row.get("bits", image.bits) == image.bits and image.symbols.lookup(row["function"])]
    has = _has(image, [bytes.fromhex(row["code"]) for row in named])
    there = [row for row, it in zip(named, has, strict=True) if it]
    version = image.version or ()
    return tuple(there or [row for row in named if parse_version(row["since"]) <= version])


def feature_bits(image: Image, sites: Iterable[Site]) -> dict[str, int]:
    """Feature bits that a function of this kernel gives away: it tests that one, by an alternative, and no other.

    ``specs/isa/features.toml`` names the functions.
    """
    tests = facts.load("isa", "features")["tests"]
    starts = {a: (name, row) for name, rows in tests.items() for row in rows if (a := image.symbols.lookup(row))}
    if not starts:
        return {}
    always = numbers()["ALWAYS"]
    seen: dict[str, set[int]] = {}
    for site in sites:
        if not isinstance(site.detail, Alternative) or site.detail.feature == always:
            continue
        for start, (name, function) in starts.items():
            if start <= site.address < start + _NEAR:
                named = image.symbols.at(site.address)
                if named is not None and named[0] == function:
                    seen.setdefault(name, set()).add(site.detail.feature)
    return {name: features.pop() for name, features in seen.items() if len(features) == 1}


def _code(image: Image) -> Iterator[tuple[int, int]]:
    """Where the image's instructions lie, first and last offset; all of it where it has no sections."""
    if not image.sections:
        yield 0, len(image.data)
    for section in image.sections:
        if section.exec and section.file_size and section.name.endswith(".text"):
            yield section.offset, section.offset + section.file_size


def _has(image: Image, values: list[bytes]) -> list[bool]:
    """Whether the image's constants and initialised data have each of these; all of it where it has no sections."""
    ranges = [
        (section.offset, section.offset + section.file_size)
        for section in image.sections
        if section.alloc and section.file_size and section.name in _CONSTANTS
    ]
    if not image.sections:
        ranges = [(0, len(image.data))]
    found = [False] * len(values)
    for start, end in ranges:
        for _, number in find_each(image.data, values, start, end, limit=1):
            found[number] = True
    return found
