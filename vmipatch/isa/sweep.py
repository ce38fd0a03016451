"""Linear sweeps: from one instruction to the next over megabytes, stopping only at those that are asked for.

The opcode maps become one regular expression that passes over whole runs of common instructions, some twenty times
as fast as taking each apart.  It leaves out what is rare (immediates whose size a prefix changes, many prefixes):
there it stops, and :func:`vmipatch.isa.opcodes.parts` decides.  Imports its sister opcodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from struct import Struct
from typing import NamedTuple

from vmipatch.isa import opcodes
from vmipatch.isa.opcodes import MAPS, Code, Opcode, Parts

BRANCH, WANTED, BAD = 1, 2, 3
"""What a sweep stops at: a relative branch, an opcode that was asked for, a byte that starts nothing."""

Wanted = Mapping[Opcode, frozenset[int] | None]
"""Opcodes that are asked for, with the ModRM bytes behind them that are (None: whatever follows)."""

_SHORT, _NEAR, _OTHER = 1, 2, 3
"""The groups of the expression: a plain branch by one byte, one by four; the third is the first byte of anything
else that no run takes."""

_SIGNED = tuple(range(128)) + tuple(range(-128, 0))

_FEW = 3
"""Prefixes that the expression takes: the longest instruction that has so few is no longer than allowed."""

_FORMS = ("m", "mb", "z", "v", "b", "mz", "", "a", "r", "w")
"""Forms that the expression takes."""

_COMMON = bytes.fromhex("488941 906683BE F6C780A8 0F")
"""First bytes of instructions, the commonest first (counted over the text of Debian's 6.12.118 for amd64, runs of one
byte as one): an alternative that is tried first is the cheapest."""


class Stop(NamedTuple):
    """Where a sweep stopped: what at, the offsets where it begins and ends, and a branch's target (an address).

    Of a wanted opcode also the instruction's parts.
    """

    what: int
    first: int
    last: int
    target: int
    parts: Parts | None = None


def sweep(
    data: Code, base: int, cuts: Iterable[int], bits: int, wanted: Wanted, landing: bytes | bytearray
) -> Iterator[Stop]:
    """The branches, wanted opcodes and bad bytes of ``data``, whose first byte has the virtual address ``base``.

    A sweep begins anew at each of ``cuts`` (ascending offsets) and ends at the last.  A byte that starts no
    instruction (of those that end before the next cut) is passed over alone.  Of branches to an offset of ``data``
    only those are given for which ``landing`` (as long as it) holds something else than 0 there.
    """
    run = expression(bits, frozenset(wanted.items())).finditer
    size, mask = len(data), (1 << bits) - 1
    word = Struct("<i").unpack_from
    # A short branch out of the data, at either end, finds a mark: an index below 0 counts from the end.
    marks = bytes(landing) + b"\1" * 128
    for cut, stop in pairwise(cuts):
        at = cut
        while at < stop:
            for match in run(data, at, stop):
                group = match.lastindex
                # The commonest first, and most branches go nowhere of interest.
                if group == _NEAR:
                    last = match.end()
                    target = last + word(data, last - 4)[0]
                    if 0 <= target < size and not marks[target]:
                        continue
                elif group == _SHORT:
                    last = match.end()
                    target = last + _SIGNED[data[last - 1]]
                    if not marks[target]:
                        continue
                elif group == _OTHER:
                    break
                else:
                    continue
                yield Stop(BRANCH, match.start(group), last, base + target & mask)
            else:
                break
            first = match.end() - 1
            found = opcodes.parts(data, bits, first, stop)
            if found is None:
                yield Stop(BAD, first, first + 1, 0)
                at = first + 1
                continue
            at = first + found.size
            if found.branch:
                target = branch_target(found, data[first:at], base + first, bits)
                if not 0 <= target - base < size or marks[target - base]:
                    yield Stop(BRANCH, first, at, target)
            elif found.opcode in wanted:
                asked = wanted[found.opcode]
                if asked is None or data[first + found.after] in asked:
                    yield Stop(WANTED, first, at, 0, found)


def starts(data: Code, cuts: Iterable[int], bits: int) -> Iterator[int]:
    """Where :func:`sweep` has instructions begin (emulation prefixes and bytes that start none too), as offsets."""
    one = expression(bits, frozenset(), single=True).finditer
    for cut, stop in pairwise(cuts):
        at = cut
        while at < stop:
            for match in one(data, at, stop):
                at = match.start()
                if match.lastindex == _OTHER:
                    break
                yield at
                at = match.end()
            else:
                continue
            yield at
            found = opcodes.parts(data, bits, at, stop)
            at += 1 if found is None else found.size


def branch_target(parts: Parts, code: Code, address: int, bits: int) -> int:
    """The virtual address that a relative branch at another goes to."""
    at, width = parts.immediate
    distance = int.from_bytes(code[at : at + width], "little", signed=True)
    return address + parts.size + distance & (0xFFFF if width == 2 else (1 << bits) - 1)


@cache
def expression(
    bits: int, wanted: frozenset[tuple[Opcode, frozenset[int] | None]], *, single: bool = False
) -> re.Pattern[bytes]:
    """The expression that matches a run of instructions and then one of the three groups, or nothing at the end.

    With ``single`` it matches either one instruction (or emulation prefix) or one of the groups.
    """
    known = opcodes.tables(bits)
    natural = opcodes.natural(bits)
    rows = _rows(bits, dict(wanted))
    legacy = known.legacy - {opcodes.ADDRESS, opcodes.OPERAND}
    sized = known.legacy - {opcodes.ADDRESS}
    common = [row for row in rows if row.modrm is None]
    fixed = [row for row in common if not set(row.parts) & set("zv")]
    other = [row for row in common if set(row.parts) & set("zv")]
    alone = frozenset(code for row in rows if (row.map, row.parts) == ("one", "") for code in row.codes)
    run = [
        _Choice(alone, _set(alone) + (b"" if single else b"++")),
        # An emulation prefix begins with an instruction.
        *(_Choice(frozenset(prefix[:1]), re.escape(prefix)) for prefix in known.emulate),
        *_instructions(rows, bits, natural),
        _prefixed(sized, _instructions(fixed, bits, natural)),
        _prefixed(legacy, _instructions(other, bits, natural)),
        *_extended(bits, natural),
    ]
    wide = opcodes.width("j", bits, *natural, wide=False) == 4
    form = b"%b|(%b)|(%b)|(.)" if single else b"%b*+(?:(%b)|(%b)|(.))?"
    text = form % (_ordered(run), _branch(bits, "b", 1), _branch(bits, "j", 4) if wide else b"(?!)")
    return re.compile(text, re.DOTALL)


class _Choice(NamedTuple):
    """An alternative of the expression, and the bytes that it can begin with."""

    lead: frozenset[int]
    text: bytes


def _ordered(choices: Iterable[_Choice]) -> bytes:
    """One of the alternatives, the common ones first; those alike stay in order."""
    ranks = {byte: rank for rank, byte in enumerate(_COMMON)}
    last = len(ranks)
    return _choice(
        c.text for c in sorted(choices, key=lambda c: min((ranks.get(b, last) for b in c.lead), default=last))
    )


def _prefixed(prefixes: frozenset[int], choices: Iterable[_Choice]) -> _Choice:
    """The alternatives behind some of the prefixes."""
    return _Choice(prefixes, b"%b{1,%d}+%b" % (_set(prefixes), _FEW, _ordered(choices)))


def _branch(bits: int, parts: str, width: int) -> bytes:
    """A relative branch of one form, without prefixes."""
    found: dict[str, set[int]] = {}
    for (name, code), forms in opcodes.tables(bits).opcodes.items():
        if any(form.branch and form.parts == parts for form in forms):
            found.setdefault(name, set()).add(code)
    return _choice(re.escape(MAPS[name]) + _set(codes) + _any(width) for name, codes in found.items())


class _Row(NamedTuple):
    """Opcodes of one map that are followed by the same; ``modrm`` is None where any may follow."""

    map: str
    codes: frozenset[int]
    parts: str
    modrm: frozenset[int] | None


_ANY = frozenset(range(256))


def _rows(bits: int, wanted: Wanted) -> list[_Row]:
    """What the expression takes, but what is wanted."""
    merged: dict[tuple[str, str, frozenset[int] | None], set[int]] = {}
    for (name, code), forms in opcodes.tables(bits).opcodes.items():
        asked = wanted.get((name, code), frozenset())
        if any(form.prefixes for form in forms):
            continue
        for form in forms:
            if form.branch or form.parts not in _FORMS or asked is None:
                continue
            modrm = (form.modrm or _ANY) - asked if form.modrm is not None or asked else None
            if modrm is None or (name == "one" and form.parts[:1] == "m"):
                merged.setdefault((name, form.parts, modrm), set()).add(code)
    rows = [_Row(name, frozenset(codes), parts, modrm) for (name, parts, modrm), codes in merged.items()]
    maps = list(MAPS)
    return sorted(rows, key=lambda r: (maps.index(r.map), _FORMS.index(r.parts), r.modrm is not None, min(r.codes)))


def _instructions(rows: Iterable[_Row], bits: int, natural: tuple[int, int]) -> list[_Choice]:
    """The instructions of the rows, from their REX prefix or opcode on."""
    narrow = _bodies(rows, bits, natural, wide=False)
    if bits != 64:
        return narrow
    rex = opcodes.tables(bits).rex
    wide, rest = frozenset(c for c in rex if c & 8), frozenset(c for c in rex if not c & 8)
    return [
        _Choice(wide, _set(wide) + _ordered(_bodies(rows, bits, natural, wide=True))),
        *narrow,
        _Choice(rest, _set(rest) + _ordered(narrow)),
    ]


def _bodies(rows: Iterable[_Row], bits: int, natural: tuple[int, int], *, wide: bool) -> list[_Choice]:
    """One alternative for all that is followed by the same, those of one map together."""
    merged: dict[tuple[str, bytes], frozenset[int]] = {}
    for row in rows:
        key = row.map, _form(row.parts, bits, natural, wide, row.modrm)
        merged[key] = merged.get(key, frozenset()) | row.codes
    found: dict[str, list[_Choice]] = {}
    for (name, form), codes in merged.items():
        found.setdefault(name, []).append(_Choice(codes, _set(codes) + form))
    own = found.pop("one", [])
    maps = (
        _Choice(frozenset(MAPS[name][:1]), re.escape(MAPS[name]) + _choice(c.text for c in bodies))
        for name, bodies in found.items()
    )
    return [*own, *maps]


def _extended(bits: int, natural: tuple[int, int]) -> list[_Choice]:
    """VEX, EVEX and XOP instructions."""
    found = []
    for row in opcodes.tables(bits).extended:
        codes: dict[str, set[int]] = {}
        for code, form in row.forms.items():
            codes.setdefault(form, set()).add(code)
        bodies = [_set(some) + _form(form, bits, natural, False, None) for form, some in codes.items()]
        found.append(_Choice(row.before[0], b"".join(map(_set, row.before)) + _choice(bodies)))
    return found


def _form(parts: str, bits: int, natural: tuple[int, int], wide: bool, modrm: frozenset[int] | None) -> bytes:
    """What follows an opcode."""
    rest = parts.lstrip("mr")
    size = sum(opcodes.width(letter, bits, *natural, wide=wide) for letter in rest)
    if parts.startswith("m"):
        return _modrm(natural[1], modrm if modrm is not None else _ANY, size)
    return b"." * parts.startswith("r") + _any(size)


def _modrm(address: int, allowed: frozenset[int], rest: int) -> bytes:
    """One of the ModRM bytes, the SIB byte and the displacement that it asks for, and ``rest`` bytes."""
    lengths: dict[int, set[int]] = {}
    varied = set()
    for modrm in allowed:
        if address != 2 and modrm >> 6 == 0 and modrm & 7 == 4:
            varied.add(modrm)
        else:
            lengths.setdefault(sum(opcodes.addressed(modrm, 0, address)), set()).add(modrm)
    choices = [_set(modrms) + _any(length + rest) for length, modrms in sorted(lengths.items())]
    if varied:
        baseless = _set(sib for sib in range(256) if opcodes.addressed(0x04, sib, address)[1])
        choices.append(_set(varied) + _choice([baseless + _any(4 + rest), _any(1 + rest)]))
    return _choice(choices)


def _any(length: int) -> bytes:
    return b".{%d}" % length if length > 2 else b"." * length


def _set(values: Iterable[int]) -> bytes:
    """A class of byte values, as ranges: the compiler takes long over single ones."""
    found = frozenset(values)
    if not found:
        return b"(?!)"
    if len(found) == 256:
        return b"."
    starts = sorted(v for v in found if v - 1 not in found)
    ends = sorted(v for v in found if v + 1 not in found)
    return b"[" + b"".join(b"\\x%02x-\\x%02x" % pair for pair in zip(starts, ends, strict=True)) + b"]"


def _choice(parts: Iterable[bytes]) -> bytes:
    found = list(parts)
    return b"(?:%b)" % b"|".join(found) if found else b"(?!)"
