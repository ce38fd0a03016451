"""Sensitive instructions: which bytes are one, and whether it traps outside ring 0 (``specs/isa/sensitive.toml``).

Imports facts and its sister sweep.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from vmipatch import facts
from vmipatch.isa.sweep import MAPS, Opcode, numbers

SETS = ("silent", "traps")
"""Sensitive and does not trap at CPL > 0; traps there."""

_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\xf0\xf2\xf3\x66\x67")
_MANDATORY = (0x66, 0xF2, 0xF3)


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
    """What follows an opcode: ModRM's middle field, what it addresses, whole ModRM bytes, mandatory prefix."""

    kind: Sensitive
    reg: int | None
    mod: str | None
    modrm: frozenset[int]
    prefix: str | None


@cache
def _patterns(bits: int) -> dict[Opcode, tuple[_Pattern, ...]]:
    spec = facts.load("isa", "sensitive")
    found: dict[Opcode, list[_Pattern]] = {}
    for name in SETS:
        for row in spec[name]:
            if row.get("bits", bits) != bits:
                continue
            kind = Sensitive(row["name"], name, row["where"], row.get("when", ""))
            for text in row["code"]:
                opcode, pattern = _parse(text, kind, row.get("prefix"))
                found.setdefault(opcode, []).append(pattern)
    return {opcode: tuple(patterns) for opcode, patterns in found.items()}


def _parse(text: str, kind: Sensitive, prefix: str | None) -> tuple[Opcode, _Pattern]:
    head, _, whole = text.partition("=")
    words = head.split()
    reg = mod = None
    if words[-1] in ("mem", "reg"):
        mod = words.pop()
    if words[-1].startswith("/"):
        reg = int(words.pop()[1:])
    code = bytes.fromhex("".join(words))
    place = next(name for name, before in MAPS.items() if before == code[:-1])
    return (place, code[-1]), _Pattern(kind, reg, mod, numbers(whole), prefix)


@cache
def opcodes(bits: int) -> frozenset[Opcode]:
    """The opcodes that may be sensitive in code of ``bits`` bits."""
    return frozenset(_patterns(bits))


def opcode_at(code: bytes, bits: int) -> tuple[frozenset[int], Opcode, int]:
    """The prefixes of one whole instruction, its opcode, and where in it the byte after the opcode is."""
    at = 0
    while code[at] in _PREFIXES:
        at += 1
    prefixes = frozenset(code[:at])
    if bits == 64 and 0x40 <= code[at] <= 0x4F:
        at += 1
    place = "one"
    if code[at] == 0x0F:
        place = {b"\x38": "0f38", b"\x3a": "0f3a"}.get(code[at + 1 : at + 2], "0f")
        at += len(MAPS[place])
    return prefixes, (place, code[at]), at + 1


def branch_target(data: bytes, first: int, last: int, base: int, bits: int) -> int:
    """The virtual address that the relative branch ``data[first:last]`` goes to; ``base`` is that of ``data``."""
    opcode, length = data[first], last - first
    width = 1
    if (opcode in (0xE8, 0xE9) and length == 5) or (opcode == 0x0F and length == 6):
        width = 4
    elif length != 2:
        _, (_, opcode), at = opcode_at(data[first:last], bits)
        width = length - at - (opcode == 0xC7)  # XBEGIN has a ModRM byte
    target = base + last + int.from_bytes(data[last - width : last], "little", signed=True)
    return target & (0xFFFF if width == 2 else (1 << bits) - 1)


def classify(code: bytes, bits: int) -> Sensitive | None:
    """What kind of sensitive instruction ``code``, one whole instruction, is; None if it is not sensitive."""
    prefixes, opcode, at = opcode_at(code, bits)
    for pattern in _patterns(bits).get(opcode, ()):
        if pattern.reg is not None or pattern.mod is not None or pattern.modrm:
            modrm = code[at]
            if pattern.reg is not None and modrm >> 3 & 7 != pattern.reg:
                continue
            if pattern.mod is not None and (modrm >= 0xC0) != (pattern.mod == "reg"):
                continue
            if pattern.modrm and modrm not in pattern.modrm:
                continue
        if pattern.prefix == "none" and prefixes & set(_MANDATORY):
            continue
        if pattern.prefix not in (None, "none") and int(pattern.prefix, 16) not in prefixes:
            continue
        return pattern.kind
    return None


def kinds() -> tuple[Sensitive, ...]:
    """Every kind there is, in the order of the spec, none twice."""
    spec = facts.load("isa", "sensitive")
    rows = (Sensitive(r["name"], s, r["where"], r.get("when", "")) for s in SETS for r in spec[s])
    return tuple(dict.fromkeys(rows))
