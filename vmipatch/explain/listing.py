"""Instructions for a person to read: text, with the names of what branches go to.

Imports image and isa.
"""

from __future__ import annotations

from typing import NamedTuple

from vmipatch.image import Image
from vmipatch.isa import decode

_NEAR = 1 << 16
"""A symbol further below an address than this does not name it."""

_PREFIXES = {0xF0: "lock", 0x3E: "ds", 0x2E: "cs"}
"""What stands alone where a site is a prefix."""


class Line(NamedTuple):
    """One instruction: its size in bytes, and Intel syntax; ``(bad)`` for a byte that starts none."""

    size: int
    text: str


def listing(image: Image, code: bytes, address: int) -> tuple[Line, ...]:
    """The instructions of ``code`` at a virtual address; what does not decode is shown byte by byte."""
    lines: list[Line] = []
    position = 0
    engine = decode.engine(image.bits)
    while position < len(code):
        for _, size, mnemonic, operands in engine.disasm_lite(code[position:], address + position):
            lines.append(Line(size, f"{mnemonic} {operands}{_target(image, mnemonic, operands)}".rstrip()))
            position += size
        if position < len(code):
            prefix = _PREFIXES.get(code[0]) if len(code) == 1 else None
            lines.append(Line(1, prefix or "(bad)"))
            position += 1
    return tuple(lines)


def _target(image: Image, mnemonic: str, operands: str) -> str:
    """Where a direct branch goes, by name."""
    if not operands.startswith("0x") or (mnemonic[0] != "j" and mnemonic != "call"):
        return ""
    named = image.symbols.at(int(operands, 16))
    if named is None or named[1] >= _NEAR:
        return ""
    return f" <{named[0]}+{named[1]:#x}>" if named[1] else f" <{named[0]}>"
