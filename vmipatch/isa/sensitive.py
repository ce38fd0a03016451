"""Sensitive instructions: which bytes are one, and whether it traps outside ring 0 (``specs/isa/sensitive.toml``).

Imports facts and its sister opcodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from vmipatch import facts
from vmipatch.isa.opcodes import MAPS, Opcode, Parts, applies, numbers

SETS = ("silent", "traps")
"""Sensitive and does not trap at CPL > 0; traps there."""

_MANDATORY = frozenset((0x66, 0xF2, 0xF3))
_ANY = frozenset(range(256))


class Sensitive(NamedTuple):
    """One kind of sensitive instruction.

    ``set`` is one of :data:`SETS`, ``where`` the manual's place, ``when`` the condition under which it behaves
    as the set says (empty: always).
    """

    name: str
    set: str
    where: str
    when: str


class _Pattern(NamedTuple):
    """What stands behind an opcode (None: whatever), and the mandatory prefix (None: does not matter)."""

    kind: Sensitive
    modrm: frozenset[int] | None
    prefix: str | None


@cache
def _patterns(bits: int) -> dict[Opcode, tuple[_Pattern, ...]]:
    spec = facts.load("isa", "sensitive")
    found: dict[Opcode, list[_Pattern]] = {}
    for name in SETS:
        for row in spec[name]:
            if not applies(row, bits):
                continue
            kind = Sensitive(row["name"], name, row["where"], row.get("when", ""))
            for text in row["code"]:
                opcode, modrm = _parse(text)
                found.setdefault(opcode, []).append(_Pattern(kind, modrm, row.get("prefix")))
    return {opcode: tuple(patterns) for opcode, patterns in found.items()}


def _parse(text: str) -> tuple[Opcode, frozenset[int] | None]:
    """An opcode and the ModRM bytes that a pattern of the spec stands for."""
    head, _, whole = text.partition("=")
    words = head.split()
    mods, regs = range(4), range(8)
    if words[-1] in ("mem", "reg"):
        mods = range(3) if words.pop() == "mem" else range(3, 4)
    if words[-1].startswith("/"):
        regs = range(number := int(words.pop()[1:]), number + 1)
    code = bytes.fromhex("".join(words))
    place = next(name for name, before in MAPS.items() if before == code[:-1])
    modrm = numbers(whole) or frozenset(m << 6 | r << 3 | n for m in mods for r in regs for n in range(8))
    return (place, code[-1]), None if modrm == _ANY else modrm


@cache
def wanted(bits: int) -> Mapping[Opcode, frozenset[int] | None]:
    """The opcodes that may be sensitive in code of ``bits`` bits, and the ModRM bytes with which (None: all)."""
    found: dict[Opcode, frozenset[int] | None] = {}
    for opcode, patterns in _patterns(bits).items():
        sets = [p.modrm for p in patterns if p.modrm is not None]
        found[opcode] = frozenset().union(*sets) if len(sets) == len(patterns) else None
    return found


def classify(code: bytes, parts: Parts, bits: int) -> Sensitive | None:
    """What kind of sensitive instruction ``code`` is, whose parts are given; None if it is not sensitive."""
    prefixes = _MANDATORY.intersection(parts.prefixes)
    for pattern in _patterns(bits).get(parts.opcode, ()):
        if pattern.modrm is not None and code[parts.after] not in pattern.modrm:
            continue
        if pattern.prefix == "none" and prefixes:
            continue
        if pattern.prefix not in (None, "none") and int(pattern.prefix, 16) not in prefixes:
            continue
        return pattern.kind
    return None


def name(code: bytes, parts: Parts, bits: int) -> str:
    """The name of a sensitive instruction, empty if it is none."""
    kind = classify(code, parts, bits)
    return "" if kind is None else kind.name


def kinds() -> tuple[Sensitive, ...]:
    """Every kind there is, in the order of the spec, none twice."""
    spec = facts.load("isa", "sensitive")
    rows = (Sensitive(r["name"], s, r["where"], r.get("when", "")) for s in SETS for r in spec[s])
    return tuple(dict.fromkeys(rows))
