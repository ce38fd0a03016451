"""Linear sweeps: from one instruction to the next over megabytes, stopping only at those that are asked for.

The opcode maps (``specs/isa/lengths.toml``) become one regular expression that passes over whole runs of
instructions, which is ten times as fast as decoding each.  Imports facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from mmap import mmap
from typing import NamedTuple

from vmipatch import facts

MAPS = {"one": b"", "0f": b"\x0f", "0f38": b"\x0f\x38", "0f3a": b"\x0f\x3a"}
"""Opcode maps and the bytes that lead to them."""

RUN = 64
"""Instructions that one match passes over at most: it keeps a little memory for each."""

BRANCH, WANTED, BAD = 1, 2, 3
"""The groups of the expression: a relative branch, an opcode that was asked for, a byte that starts nothing."""

Opcode = tuple[str, int]
"""A map of :data:`MAPS` and the opcode byte in it."""


class _Row(NamedTuple):
    """Opcodes of one map that are followed by the same."""

    map: str
    codes: frozenset[int]
    form: str
    reg: tuple[int, ...] | None
    mod: str | None
    branch: bool


class _Sizes(NamedTuple):
    """What prefixes make of an instruction: bytes of operand and of address, and REX.W (None: as it comes)."""

    bits: int
    operand: int
    address: int


def numbers(text: str) -> frozenset[int]:
    """``"00-03 0f"`` to its numbers."""
    found: set[int] = set()
    for part in text.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


@cache
def expression(bits: int, wanted: frozenset[Opcode] = frozenset()) -> re.Pattern[bytes]:
    """The expression that matches a run of instructions and then one of the groups :data:`BRANCH`,
    :data:`WANTED`, :data:`BAD`, or nothing after :data:`RUN` instructions and at the end.

    ``wanted`` opcodes are never part of the run.  Each group holds the whole instruction, prefixes included.
    """
    spec = facts.load("isa", "lengths")
    rows = _rows(spec, bits)
    plain = [_without(row, wanted) for row in rows if not row.branch]
    asked = [_only(row, wanted) for row in rows if not row.branch]
    branches = [row for row in rows if row.branch]
    emulate = (re.escape(bytes.fromhex(text)) for text in spec["prefixes"]["emulate"])
    boring = _choice([*emulate, _instructions(spec, bits, plain, extended=True)])
    branch = _instructions(spec, bits, branches, extended=False)
    stop = _instructions(spec, bits, asked, extended=False) if wanted else b"(?!)"
    text = b"(?:%b){0,%d}(?:(%b)|(%b)|(?!%b)(.))?" % (boring, RUN, branch, stop, boring)
    return re.compile(text, re.DOTALL)


def sweep(
    data: bytes | mmap, start: int, end: int, bits: int, wanted: frozenset[Opcode]
) -> Iterator[tuple[int, int, int]]:
    """Every branch, wanted opcode and bad byte of ``data[start:end]``: its group, where it begins and ends.

    A byte that starts no instruction (of those that end before ``end``) is passed over alone.
    """
    for match in expression(bits, wanted).finditer(data, start, end):
        group = match.lastindex
        if group is not None:
            first, last = match.span(group)
            yield group, first, last


def _rows(spec: facts.Spec, bits: int) -> list[_Row]:
    return [
        _Row(
            name,
            numbers(row["codes"]),
            row["form"],
            tuple(row["reg"]) if "reg" in row else None,
            row.get("mod"),
            row.get("branch", False),
        )
        for name in MAPS
        for row in spec[name]
        if row.get("bits", bits) == bits
    ]


def _without(row: _Row, wanted: frozenset[Opcode]) -> _Row:
    return row._replace(codes=frozenset(c for c in row.codes if (row.map, c) not in wanted))


def _only(row: _Row, wanted: frozenset[Opcode]) -> _Row:
    return row._replace(codes=frozenset(c for c in row.codes if (row.map, c) in wanted))


def _instructions(spec: facts.Spec, bits: int, rows: Iterable[_Row], *, extended: bool) -> bytes:
    """Any instruction of the rows, with any prefixes."""
    rows = [row for row in rows if row.codes]
    prefixes = spec["prefixes"]
    legacy, operand, address = (numbers(prefixes[k]) for k in ("legacy", "operand", "address"))
    most = prefixes["most"]
    natural = _Sizes(bits, 4, bits // 8)
    small = 2 if bits == 32 else 4
    bodies = {
        "": _body(spec, rows, natural, extended),
        "o": _body(spec, rows, natural._replace(operand=2), extended=False),
        "a": _body(spec, rows, natural._replace(address=small), extended=False),
        "oa": _body(spec, rows, _Sizes(bits, 2, small), extended=False),
    }
    any_legacy = _set(legacy)
    any_operand, any_address = _set(legacy | operand), _set(legacy | address)
    every = _set(legacy | operand | address)
    has_operand = b"(?=%b{0,%d}\x66)" % (any_address, most - 1)
    return _choice(
        [
            bodies[""],
            b"%b{1,%d}%b" % (any_legacy, most, bodies[""]),
            b"(?=%b{0,%d}\x66)%b{1,%d}%b" % (any_legacy, most - 1, any_operand, most, bodies["o"]),
            b"(?=%b{0,%d}\x67)%b{1,%d}%b" % (any_legacy, most - 1, any_address, most, bodies["a"]),
            has_operand + b"(?=%b{0,%d}\x67)%b{2,%d}%b" % (any_operand, most - 1, every, most, bodies["oa"]),
        ]
    )


def _body(spec: facts.Spec, rows: Iterable[_Row], sizes: _Sizes, extended: bool) -> bytes:
    """An instruction from its REX prefix or opcode on."""
    if sizes.bits == 32:
        return _choice([*_opcodes(rows, sizes, wide=False), *(_extended(spec, sizes) if extended else ())])
    rex = numbers(spec["prefixes"]["rex"])
    narrow, wide = _set(c for c in rex if not c & 8), _set(c for c in rex if c & 8)
    rows = list(rows)
    # REX.W matters only to those whose size it changes.
    sized = [row for row in rows if set(row.form) & set("zv")]
    fixed = [row for row in rows if not set(row.form) & set("zv")]
    choices = []
    if fixed:
        choices.append(b"%b?%b" % (_set(rex), _choice(_opcodes(fixed, sizes, wide=False))))
    if sized:
        choices.append(b"%b?%b" % (narrow, _choice(_opcodes(sized, sizes, wide=False))))
        choices.append(b"%b%b" % (wide, _choice(_opcodes(sized, sizes, wide=True))))
    return _choice([*choices, *(_extended(spec, sizes) if extended else ())])


def _opcodes(rows: Iterable[_Row], sizes: _Sizes, wide: bool) -> list[bytes]:
    """One alternative for each form and map."""
    merged: dict[tuple[str, str, tuple[int, ...] | None, str | None], set[int]] = {}
    for row in rows:
        merged.setdefault((row.map, row.form, row.reg, row.mod), set()).update(row.codes)
    return [
        re.escape(MAPS[name]) + _set(codes) + _form(form, sizes, wide, reg, mod)
        for (name, form, reg, mod), codes in merged.items()
    ]


def _extended(spec: facts.Spec, sizes: _Sizes) -> list[bytes]:
    """VEX, EVEX and XOP instructions; in 32-bit code their second byte has both high bits set (not XOP's)."""
    found = []
    for row in spec["extended"]:
        sets = [_before(text) for text in row["before"]]
        if sizes.bits == 32 and not row.get("any"):
            sets[1] = frozenset(b for b in sets[1] if b >= 0xC0)
        forms = dict(spec["extended_forms"][str(row["map"])])
        other = forms.pop("other")
        named = {form: numbers(codes) for form, codes in forms.items()}
        rest = numbers("00-ff").difference(*named.values())
        bodies = [_set(codes) + _form(form, sizes, False) for form, codes in (*named.items(), (other, rest))]
        found.append(b"".join(map(_set, sets)) + _choice(bodies))
    return found


def _before(text: str) -> frozenset[int]:
    """The values of one byte before an extended opcode: a set, or ``maps N M …``: those whose low N bits are an M."""
    if text.startswith("maps "):
        width, *maps = map(int, text.split()[1:])
        return frozenset(b for b in range(256) if b & ((1 << width) - 1) in maps)
    return numbers(text)


def _form(form: str, sizes: _Sizes, wide: bool, reg: tuple[int, ...] | None = None, mod: str | None = None) -> bytes:
    """What follows an opcode."""
    size: dict[str, Callable[[], int]] = {
        "b": lambda: 1,
        "w": lambda: 2,
        "z": lambda: 4 if wide else sizes.operand,
        "j": lambda: 4 if sizes.bits == 64 else sizes.operand,
        "v": lambda: 8 if wide else sizes.operand,
        "a": lambda: sizes.address,
    }
    length, text = 0, b""
    for letter in form:
        if letter == "m":
            text += _modrm(sizes.address, reg, mod)
        elif letter == "r":
            text += b"."
        else:
            length += size[letter]()
    return text + (b".{%d}" % length if length else b"")


def _modrm(address: int, reg: tuple[int, ...] | None, mod: str | None) -> bytes:
    """A ModRM byte with the SIB byte and the displacement that it asks for."""

    def bytes_of(mods: Iterable[int], rms: Iterable[int]) -> bytes:
        return _set(m << 6 | r << 3 | n for m in mods for r in reg or range(8) for n in rms)

    choices = [] if mod == "memory" else [bytes_of([3], range(8))]
    if mod != "register" and address == 2:
        choices += [
            bytes_of([1], range(8)) + b".",
            bytes_of([0], (0, 1, 2, 3, 4, 5, 7)),
            bytes_of([2], range(8)) + b"..",
            bytes_of([0], [6]) + b"..",
        ]
    elif mod != "register":
        simple = (0, 1, 2, 3, 5, 6, 7)
        based = _set(b for b in range(256) if b & 7 != 5)
        baseless = _set(b for b in range(256) if b & 7 == 5)
        choices += [
            bytes_of([1], simple) + b".",
            bytes_of([0], (0, 1, 2, 3, 6, 7)),
            bytes_of([2], simple) + b".{4}",
            bytes_of([0], [5]) + b".{4}",
            bytes_of([1], [4]) + b"..",
            bytes_of([0], [4]) + _choice([based, baseless + b".{4}"]),
            bytes_of([2], [4]) + b".{5}",
        ]
    return _choice(choices)


def _set(values: Iterable[int]) -> bytes:
    found = sorted(set(values))
    if len(found) == 256:
        return b"."
    return b"[" + b"".join(b"\\x%02x" % v for v in found) + b"]"


def _choice(parts: Iterable[bytes]) -> bytes:
    found = list(parts)
    return b"(?:%b)" % b"|".join(found) if found else b"(?!)"
