"""Assembly text to i386 bytes, every line read back before it is believed.

Keystone 0.9.2 is silently wrong in a number of places (it prefixes ``pushf`` with 0x66, truncates far jumps,
accepts ``mov eax, [``, drops ``.section`` and lets ``.incbin`` read files).  So it only ever sees one plain
instruction at a time: labels, branches, data directives and comments are handled here, what it returns is
disassembled by capstone, and text that does not read back as written is an error.

Text is Intel syntax, one instruction a line or several with ``;``; ``#`` starts a comment; ``name:`` a label;
``.byte``, ``.word`` and ``.long`` take plain numbers.  A branch goes to a label of the same text, or to a name
that the caller links (always in its near form, as a :class:`Fixup`).  Imports capstone and keystone when used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vmipatch.errors import AssemblyError
from vmipatch.isa.decode import engine

_LABEL = re.compile(r"([A-Za-z_]\w*):\s*")
_NAME = re.compile(r"[A-Za-z_]\w*")
_MNEMONIC = re.compile(r"[a-z][a-z0-9]*")
_DATA = {".byte": 1, ".word": 2, ".long": 4}
_MAX_TEXT = 64 * 1024

# What keystone gets wrong without saying so, or what does not mean what it says, and the word to use instead.
_WRONG_WORD = {
    "pushf": "pushfd",
    "popf": "popfd",
    "iret": "iretd",
    "pusha": "pushad",
    "popa": "popad",
}
_REFUSED = {
    "lgdt": ".byte 0x0f, 0x01 and the ModRM byte",
    "lidt": ".byte 0x0f, 0x01 and the ModRM byte",
    "sgdt": ".byte 0x0f, 0x01 and the ModRM byte",
    "sidt": ".byte 0x0f, 0x01 and the ModRM byte",
    "ljmp": ".byte 0xea and the far address",
    "lcall": ".byte 0x9a and the far address",
    "nop": ".byte with the encoding of that length",
}
_CONDITION_NAMES = "o no b,c,nae ae,nb,nc e,z ne,nz be,na a,nbe s ns p,pe np,po l,nge ge,nl le,ng g,nle"
_CONDITIONS = {name: code for code, names in enumerate(_CONDITION_NAMES.split()) for name in names.split(",")}
_ALIASES = {
    "sal": "shl",
    "retn": "ret",
    "pushal": "pushad",
    "popal": "popad",
    "pushaw": "pusha",
    "popaw": "popa",
}
_SHORT_ONLY = {"jecxz": 0xE3, "loop": 0xE2, "loope": 0xE1, "loopne": 0xE0}
_GENERAL = "eax ecx edx ebx esp ebp esi edi ax cx dx bx sp bp si di al cl dl bl ah ch dh bh"
_CONTROL = [f"{kind}{n}" for kind in ("cr", "dr", "mm", "xmm") for n in range(8)]
REGISTERS = frozenset([*_GENERAL.split(), *_CONTROL, "cs", "ds", "es", "fs", "gs", "ss"])


@dataclass(frozen=True)
class Fixup:
    """A rel32 (or rel16) field to be linked: ``offset`` in the code, relative to the field's end."""

    offset: int
    size: int
    name: str
    line: int


@dataclass(frozen=True)
class Item:
    """One assembled instruction or data directive. ``offset`` in the code, ``line`` in the caller's file.

    ``target`` is the offset of a branch inside the same text, ``external`` the name of a linked one;
    ``data`` is set for what a directive wrote.
    """

    offset: int
    code: bytes
    line: int
    text: str
    target: int | None = None
    external: str | None = None
    data: bool = False


@dataclass(frozen=True)
class Assembly:
    """The bytes of one text, its labels (name -> offset) and what is left to link."""

    code: bytes
    items: tuple[Item, ...]
    labels: dict[str, int]
    fixups: tuple[Fixup, ...]


@dataclass
class _Part:
    line: int
    text: str
    code: bytes = b""
    mnemonic: str = ""
    label: str | None = None  # of a branch
    data: bool = False
    near: bool = False
    offset: int = 0
    marks: list[str] = field(default_factory=list)  # labels defined just before it


def assemble(
    text: str, *, bits: int = 32, file: str | None = None, section: str | None = None, line: int = 1
) -> Assembly:
    """Assemble; ``line`` is where ``text`` begins in ``file``, ``section`` (a call) goes into errors.

    Raises :class:`AssemblyError`, naming file, section and line, for anything that does not assemble to
    exactly what it says.
    """
    place = _Place(file, section)
    if len(text) > _MAX_TEXT:
        raise place.error(line, "more than 64 KiB of assembly text")
    parts = list(_parts(text, line, place))
    labels: dict[str, _Part] = {}
    for part in parts:
        for mark in part.marks:
            if mark in labels:
                raise place.error(part.line, f"label {mark!r} defined twice")
            labels[mark] = part
        _encode(part, bits, place)
    names = {p.label for p in parts if p.label is not None}
    for part in parts:
        if part.label is not None and part.label not in labels:
            part.near = True
    size = _relax(parts, labels, names, bits, place)
    return _emit(parts, labels, bits, size, place)


def number(text: str) -> int:
    """A decimal or 0x number, with an optional sign; raises ValueError."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if not re.fullmatch(r"0x[0-9a-f]+|[0-9]+", digits):
        raise ValueError(text)
    return sign * int(digits, 0)


@dataclass(frozen=True)
class _Place:
    file: str | None
    section: str | None

    def error(self, line: int, message: str) -> AssemblyError:
        return AssemblyError(message, file=self.file, section=self.section, line=line)


def _parts(text: str, first: int, place: _Place) -> Iterable[_Part]:
    marks: list[str] = []
    line = first
    for line, raw in enumerate(text.split("\n"), first):
        for piece in raw.split("#", 1)[0].split(";"):
            rest = piece.strip()
            while (found := _LABEL.match(rest)) and found[1].lower() not in REGISTERS:
                marks.append(found[1])
                rest = rest[found.end() :]
            if rest:
                yield _Part(line, " ".join(rest.split()), marks=marks)
                marks = []
    if marks:
        yield _Part(line, "", marks=marks)


def _encode(part: _Part, bits: int, place: _Place) -> None:
    """Fill in the bytes of everything but branches to labels."""
    if not part.text:
        return
    word, _, rest = part.text.partition(" ")
    word, rest = word.lower(), rest.strip()
    if word.startswith("."):
        part.code, part.data = _directive(word, rest, part.line, place), True
        return
    part.mnemonic = word
    branch = word in ("jmp", "call") or word in _SHORT_ONLY or (word[0] == "j" and word[1:] in _CONDITIONS)
    if branch and _NAME.fullmatch(rest) and rest.lower() not in REGISTERS:
        part.label = rest
        part.near = word == "call"
        return
    if branch and rest and (rest[0].isdigit() or rest[0] == "-"):
        raise place.error(part.line, f"{part.text!r}: a branch goes to a label, not to a number")
    try:
        part.code = instruction(part.text.lower(), bits)
    except AssemblyError as error:
        raise place.error(part.line, error.message) from None


def _directive(word: str, rest: str, line: int, place: _Place) -> bytes:
    size = _DATA.get(word)
    if size is None:
        raise place.error(line, f"directive {word} is not allowed: there are .byte, .word and .long")
    out = b""
    for piece in rest.lower().split(","):
        try:
            value = number(piece.strip())
        except ValueError:
            raise place.error(line, f"{word} takes plain numbers, not {piece.strip()!r}") from None
        if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
            raise place.error(line, f"{value:#x} does not fit {word}")
        out += (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return out


def _branch_size(part: _Part, bits: int) -> int:
    if not part.near:
        return 2
    wide = bits // 8
    return 1 + wide if part.mnemonic in ("jmp", "call") else 2 + wide


def _relax(parts: list[_Part], labels: dict[str, _Part], names: set[str], bits: int, place: _Place) -> int:
    """Place the parts; branches begin short and grow until all reach. Returns the size."""
    while True:
        offset = 0
        for part in parts:
            part.offset = offset
            offset += _branch_size(part, bits) if part.label is not None else len(part.code)
        grown = False
        for part in parts:
            if part.label is None:
                continue
            if part.near:
                if part.mnemonic in _SHORT_ONLY:
                    raise place.error(part.line, f"{part.text!r}: the target is out of reach")
                continue
            if not -128 <= labels[part.label].offset - (part.offset + 2) <= 127:
                part.near = grown = True
        if not grown:
            return offset


def _emit(parts: list[_Part], labels: dict[str, _Part], bits: int, size: int, place: _Place) -> Assembly:
    items: list[Item] = []
    fixups: list[Fixup] = []
    wide = bits // 8
    for part in parts:
        if not part.text:
            continue
        if part.label is None:
            items.append(Item(part.offset, part.code, part.line, part.text, data=part.data))
            continue
        target = labels[part.label].offset if part.label in labels else None
        if part.near:
            opcode = {"jmp": b"\xe9", "call": b"\xe8"}.get(part.mnemonic)
            if opcode is None:
                opcode = bytes([0x0F, 0x80 + _CONDITIONS[part.mnemonic[1:]]])
            end = part.offset + len(opcode) + wide
            if target is None:
                fixups.append(Fixup(part.offset + len(opcode), wide, part.label, part.line))
                relative = 0
            else:
                relative = target - end
            code = opcode + relative.to_bytes(wide, "little", signed=True)
        else:
            assert target is not None
            op = _SHORT_ONLY.get(part.mnemonic)
            if op is None:
                op = 0xEB if part.mnemonic == "jmp" else 0x70 + _CONDITIONS[part.mnemonic[1:]]
            code = bytes([op]) + (target - part.offset - 2).to_bytes(1, "little", signed=True)
        external = part.label if target is None else None
        items.append(Item(part.offset, code, part.line, part.text, target, external))
    code = b"".join(item.code for item in items)
    if len(code) != size:
        raise place.error(parts[0].line, "branches do not settle")
    return Assembly(code, tuple(items), {name: p.offset for name, p in labels.items()}, tuple(fixups))


@cache
def instruction(text: str, bits: int = 32) -> bytes:
    """The bytes of one instruction (lower case, no label); raises :class:`AssemblyError` without a place."""
    words = text.split()
    mnemonic = words[1] if len(words) > 1 and words[0] in ("rep", "repe", "repne", "lock") else words[0]
    if not _MNEMONIC.fullmatch(mnemonic) or not text.isascii() or '"' in text or "'" in text:
        raise AssemblyError(f"{text!r} is not an instruction")
    if bits == 32 and mnemonic in _WRONG_WORD:
        raise AssemblyError(f"{text!r} would be the 16-bit form: write {_WRONG_WORD[mnemonic]}")
    if mnemonic in _REFUSED and not (mnemonic == "nop" and len(words) == 1):
        raise AssemblyError(f"{text!r} cannot be trusted to the assembler: write {_REFUSED[mnemonic]}")
    if text.count("[") != text.count("]"):
        raise AssemblyError(f"{text!r}: unbalanced bracket")
    code = _keystone(text, bits)
    if not code:
        raise AssemblyError(f"{text!r} assembles to nothing")
    if 0x66 in code[:3] and not _other_size(text, bits) and code[0] in (0x66, 0x67, 0xF0, 0xF2, 0xF3):
        # capstone prints push cs alike with and without the prefix, but the stack is another.
        raise AssemblyError(f"{text!r} assembles to {code.hex()}, with an operand size it does not say: use .byte")
    seen = read_back(code, bits)
    if seen is None or canonical(seen) != canonical(text):
        raise AssemblyError(f"{text!r} assembles to {code.hex()}, which reads back as {seen or 'no instruction'!r}")
    return code


def _other_size(text: str, bits: int) -> bool:
    """Whether an operand is of the size that the 0x66 prefix selects."""
    if bits == 32:
        return bool(re.search(r"\b(word|[abcd]x|[sb]p|[sd]i|xmm\d)\b", text))
    return bool(re.search(r"\b(dword|e[abcd]x|e[sb]p|e[sd]i|xmm\d)\b", text)) or text in ("pushad", "popad")


def read_back(code: bytes, bits: int = 32) -> str | None:
    """capstone's text for ``code``, if it is exactly one instruction."""
    found = list(engine(bits).disasm_lite(code, 0x1000))
    if len(found) != 1 or found[0][1] != len(code):
        return None
    return f"{found[0][2]} {found[0][3]}".strip()


def canonical(text: str) -> tuple[str, ...]:
    """Instruction text in a form in which two spellings of one instruction are equal."""
    text = text.lower().replace("\t", " ").strip()
    words = text.split(" ", 1)
    prefixes = []
    while words[0] in ("rep", "repe", "repz", "repne", "repnz", "lock") and len(words) > 1:
        prefixes.append({"repz": "repe", "repnz": "repne"}.get(words[0], words[0]))
        words = words[1].split(" ", 1)
    mnemonic = words[0]
    if mnemonic[0] == "j" and mnemonic[1:] in _CONDITIONS:
        mnemonic = f"j#{_CONDITIONS[mnemonic[1:]]}"
    for stem in ("set", "cmov"):
        if mnemonic.startswith(stem) and mnemonic[len(stem) :] in _CONDITIONS:
            mnemonic = f"{stem}#{_CONDITIONS[mnemonic[len(stem) :]]}"
    mnemonic = _ALIASES.get(mnemonic, mnemonic)
    operands = [_operand(o) for o in words[1].split(",")] if len(words) > 1 else []
    if mnemonic in ("lea", "invlpg"):  # no access through them: a size says nothing
        operands = [re.sub(r"^(byte|word|dword|qword)", "", o) for o in operands]
    sized = any(o in REGISTERS for o in operands) and mnemonic not in ("movzx", "movsx")
    if sized:  # the register gives the size
        operands = [re.sub(r"^(byte|word|dword|qword)\[", "[", o) for o in operands]
    if mnemonic in ("test", "xchg"):  # symmetric
        operands.sort()
    return (*prefixes, mnemonic, *operands)


def _operand(text: str) -> str:
    text = text.strip()
    match = re.fullmatch(r"(?:(byte|word|dword|qword) )?(?:ptr )?\s*(?:([c-gs]s):)?\s*\[(.*)\]", text)
    if match is None:
        try:
            return str(number(text) & 0xFFFFFFFF)
        except ValueError:
            return text
    size, segment, inner = match[1] or "", match[2] or "", match[3]
    registers: list[str] = []
    displacement = 0
    for sign, term in re.findall(r"([+-]?)\s*([^+-]+)", inner):
        term = term.replace(" ", "")
        try:
            displacement += -number(term) if sign == "-" else number(term)
        except ValueError:
            registers.append(sign.replace("+", "") + (term.removesuffix("*1")))
    return f"{size}[{segment}:{'+'.join(sorted(registers))}+{displacement & 0xFFFFFFFF}]"


@cache
def _assembler(bits: int) -> Any:
    import keystone

    mode = keystone.KS_MODE_32 if bits == 32 else keystone.KS_MODE_16
    return keystone.Ks(keystone.KS_ARCH_X86, mode)


def _keystone(text: str, bits: int) -> bytes:
    import keystone

    try:
        encoding, _ = _assembler(bits).asm(text, 0x1000)
    except keystone.KsError as error:
        reason = str(error).split(" (KS_ERR")[0]
        raise AssemblyError(f"{text!r} does not assemble: {reason}") from None
    return bytes(encoding or b"")
