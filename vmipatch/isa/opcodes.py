"""The opcode maps (``specs/isa/lengths.toml``), and one instruction taken apart by them.

This decides where instructions begin and end, and where their parts lie; what they mean to a person is capstone's
business (:mod:`vmipatch.isa.decode`).  Imports facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from mmap import mmap
from typing import NamedTuple

from vmipatch import facts

MAPS = {"one": b"", "0f": b"\x0f", "0f38": b"\x0f\x38", "0f3a": b"\x0f\x3a"}
"""Opcode maps and the bytes that lead to them."""

MOST = 15
"""Bytes of the longest instruction (SDM vol. 2, section 2.3.11)."""

_HEAD = 3
"""Bytes by which all of an instruction without prefixes is decided: opcode, ModRM, SIB."""

Opcode = tuple[str, int]
"""A map of :data:`MAPS` and the opcode byte in it."""

Code = bytes | bytearray | mmap


class Form(NamedTuple):
    """What follows an opcode, given a ModRM byte of ``modrm`` (None: any, or there is none).

    ``parts`` are the letters of the spec; ``branch`` tells a relative branch; where ``prefixes`` are named, one of
    them must be there.
    """

    parts: str
    modrm: frozenset[int] | None
    branch: bool
    prefixes: frozenset[int] = frozenset()


class Extended(NamedTuple):
    """VEX, EVEX or XOP: sets for each byte before the opcode, and the form of each opcode."""

    before: tuple[frozenset[int], ...]
    forms: Mapping[int, str]


class Tables(NamedTuple):
    """The maps as code of one size has them; all sets are of byte values.

    ``plain`` are those with which an instruction of the first map begins that has no prefix.
    """

    plain: frozenset[int]
    legacy: frozenset[int]
    rex: frozenset[int]
    opcodes: Mapping[Opcode, tuple[Form, ...]]
    extended: tuple[Extended, ...]
    emulate: tuple[bytes, ...]


class Parts(NamedTuple):
    """One instruction; offsets and sizes in bytes, offsets from its start.

    ``prefixes`` are all bytes before the opcode's first, REX included; ``after`` is the offset of the byte behind
    the opcode, the ModRM byte where it has one (``modrm``, else -1).  ``displacement`` and ``immediate`` are
    offset and size, size 0 where there is none; of several immediates (ENTER, far pointers) all together.
    ``extended`` tells VEX, EVEX and XOP, whose maps are not :data:`MAPS`: their ``opcode`` has the map "".
    """

    size: int
    prefixes: bytes
    opcode: Opcode
    after: int
    modrm: int
    displacement: tuple[int, int]
    immediate: tuple[int, int]
    relative: bool
    branch: bool
    extended: bool


OPERAND, ADDRESS = 0x66, 0x67
_NOT_BEFORE_VEX = frozenset((0x66, 0xF0, 0xF2, 0xF3))


def numbers(text: str) -> frozenset[int]:
    """``"00-03 0f"`` to its numbers."""
    found: set[int] = set()
    for part in text.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


def applies(row: facts.Spec, bits: int) -> bool:
    """Whether a row of the specs is for code of that size: 64, or 32 for 16- and 32-bit code."""
    return bool(row.get("bits", bits) == bits or (bits == 16 and row.get("bits") == 32))


@cache
def tables(bits: int) -> Tables:
    """The opcode maps for code of 16, 32 or 64 bits."""
    spec = facts.load("isa", "lengths")
    opcodes: dict[Opcode, tuple[Form, ...]] = {}
    for name in MAPS:
        for row in spec[name]:
            if not applies(row, bits):
                continue
            form = Form(row["form"], _modrms(row), row.get("branch", False), numbers(row.get("prefix", "")))
            for code in numbers(row["codes"]):
                opcodes[name, code] = (*opcodes.get((name, code), ()), form)
    prefixes = spec["prefixes"]
    legacy = numbers(f"{prefixes['legacy']} {prefixes['operand']} {prefixes['address']}")
    rex = numbers(prefixes["rex"]) if bits == 64 else frozenset[int]()
    extended = tuple(_extended(spec, row, bits) for row in spec["extended"])
    return Tables(
        frozenset(range(256)) - legacy - rex - {0x0F} - frozenset().union(*(row.before[0] for row in extended)),
        legacy,
        rex,
        opcodes,
        extended,
        tuple(bytes.fromhex(text) for text in prefixes["emulate"]),
    )


def _modrms(row: facts.Spec) -> frozenset[int] | None:
    """The ModRM bytes that a row is for."""
    if "reg" not in row and "mod" not in row:
        return None
    mods = {"memory": (0, 1, 2), "register": (3,)}.get(row.get("mod", ""), (0, 1, 2, 3))
    return frozenset(m << 6 | r << 3 | n for m in mods for r in row.get("reg", range(8)) for n in range(8))


def _extended(spec: facts.Spec, row: facts.Spec, bits: int) -> Extended:
    before = [_before(text) for text in row["before"]]
    if bits != 64 and not row.get("any"):  # with a memory operand it is LES, LDS or BOUND
        before[1] = frozenset(b for b in before[1] if b >= 0xC0)
    named: dict[str, str] = dict(spec["extended_forms"][str(row["map"])])
    forms = dict.fromkeys(range(256), named.pop("other"))
    for form, codes in named.items():
        forms |= dict.fromkeys(numbers(codes), form)
    return Extended(tuple(before), forms)


def _before(text: str) -> frozenset[int]:
    """The values of one byte before an extended opcode: a set, or ``maps N M …``: those whose low N bits are an M."""
    if text.startswith("maps "):
        width, *maps = map(int, text.split()[1:])
        return frozenset(b for b in range(256) if b & ((1 << width) - 1) in maps)
    return numbers(text)


def width(letter: str, bits: int, operand: int, address: int, *, wide: bool) -> int:
    """Bytes of an immediate of the spec's letter; ``operand`` and ``address`` in bytes, ``wide`` with REX.W."""
    if letter == "z":
        return 4 if wide else operand
    if letter == "v":
        return 8 if wide else operand
    if letter == "j":
        return 4 if bits == 64 else operand
    return address if letter == "a" else {"b": 1, "w": 2}[letter]


def natural(bits: int, *, operand: bool = False, address: bool = False) -> tuple[int, int]:
    """Bytes of operands and of addresses, without or with the prefix that changes them."""
    small = (bits == 16) != operand
    if bits == 64:
        return 2 if operand else 4, 4 if address else 8
    return 2 if small else 4, 2 if (bits == 16) != address else 4


def addressed(modrm: int, sib: int, address: int) -> tuple[int, int]:
    """Bytes of SIB (0 or 1) and of displacement that a ModRM byte asks for; ``address`` in bytes."""
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return 0, 0
    if address == 2:
        return 0, (2 if rm == 6 else 0, 1, 2)[mod]
    has_sib = int(rm == 4)
    base = sib & 7 if has_sib else rm
    return has_sib, (4 if base == 5 else 0, 1, 4)[mod]


def parts(code: Code, bits: int, at: int = 0, end: int | None = None) -> Parts | None:
    """The instruction at offset ``at`` of ``code``; None if none begins there that ends before ``end``."""
    stop = len(code) if end is None else min(end, len(code))
    head = bytes(code[at : min(at + _HEAD, stop)])
    if len(head) == _HEAD and head[0] in tables(bits).plain:
        found = _headed(head, bits)
        return found if found is None or at + found.size <= stop else None
    try:
        return _parts(code[at : min(stop, at + MOST)], bits)
    except IndexError:
        return None


@lru_cache(maxsize=1 << 14)
def _headed(head: bytes, bits: int) -> Parts | None:
    """The instruction that begins with an opcode, a ModRM byte and a SIB byte: no more decides of its parts."""
    return _parts(head + bytes(MOST), bits)


def _parts(code: bytes | bytearray, bits: int) -> Parts | None:
    """The same at offset 0; raises IndexError where the instruction is cut off."""
    known = tables(bits)
    at = 0
    rex = 0
    while code[at] in known.legacy or code[at] in known.rex:
        rex = code[at] if code[at] in known.rex else 0  # only just before the opcode does it count
        at += 1
    prefixes = bytes(code[:at])
    legacy = known.legacy.intersection(prefixes) if at else frozenset()
    operand, address = natural(bits, operand=OPERAND in legacy, address=ADDRESS in legacy)
    if not rex and not legacy & _NOT_BEFORE_VEX:
        for extended in known.extended:
            length = len(extended.before)
            # Nearly every instruction fails at the first.
            if code[at] in extended.before[0] and all(
                code[at + i] in values for i, values in enumerate(extended.before)
            ):
                opcode = code[at + length]
                form = Form(extended.forms[opcode], None, branch=False)
                after = at + length + 1
                return _operands(code, bits, prefixes, ("", opcode), after, form, operand, address, wide=False)
    place = "one"
    if code[at] == 0x0F:
        place = {0x38: "0f38", 0x3A: "0f3a"}.get(code[at + 1], "0f")
        at += len(MAPS[place])
    opcode = code[at]
    for form in known.opcodes.get((place, opcode), ()):
        if form.prefixes and not form.prefixes & legacy:
            continue
        if form.modrm is None or code[at + 1] in form.modrm:
            return _operands(code, bits, prefixes, (place, opcode), at + 1, form, operand, address, wide=bool(rex & 8))
    return None


def _operands(
    code: bytes | bytearray,
    bits: int,
    prefixes: bytes,
    opcode: Opcode,
    after: int,
    form: Form,
    operand: int,
    address: int,
    *,
    wide: bool,
) -> Parts | None:
    at, modrm, relative = after, -1, False
    displacement = immediate = (0, 0)
    letters = form.parts
    if letters[:1] in ("m", "r"):
        modrm = code[at]
        at += 1
        if letters[0] == "m":
            sib, size = addressed(modrm, code[at] if modrm & 7 == 4 and modrm < 0xC0 and address != 2 else 0, address)
            displacement = at + sib, size
            relative = bits == 64 and modrm & 0xC7 == 5
            at += sib + size
        letters = letters[1:]
    size = sum(width(letter, bits, operand, address, wide=wide) for letter in letters)
    if size:
        immediate = at, size
        at += size
    if at > len(code):
        raise IndexError
    return Parts(
        at, prefixes, opcode, after, modrm, displacement, immediate, relative, form.branch, extended=not opcode[0]
    )


def emulated(code: Code, bits: int, at: int, end: int) -> int:
    """Bytes of the emulation prefix at an offset, 0 if none stands there (see the spec)."""
    for prefix in tables(bits).emulate:
        if at + len(prefix) <= end and code[at : at + len(prefix)] == prefix:
            return len(prefix)
    return 0
