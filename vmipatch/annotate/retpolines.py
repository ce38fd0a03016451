"""``.retpoline_sites``: indirect calls and jumps that go through a thunk for their register (5.16 on, x86-64)."""

from __future__ import annotations

import re
from functools import cache

from vmipatch import facts
from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Thunk
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "retpoline_sites"

REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""By x86's numbers."""

_CS = 0x2E
_CONDITIONS = range(0x80, 0x90)

_FINAL = re.compile(rb"\x2e{0,3}([\x70-\x7f].)?(\x0f\xae\xe8)?\x41?\xff[\xd0-\xd7\xe0-\xe7]", re.DOTALL)
"""The branch itself: CS prefixes (6.18 on), a jump over it, LFENCE, REX.B (emit_indirect and patch_retpoline,
arch/x86/kernel/alternative.c of 5.16 to 7.3)."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every branch to a thunk; ``op`` is ``call rax``, ``jmp r11``, ``jcc r8`` …"""
    return codesites.scan(image, FAMILY, _reader(image), "retpoline-no-branch", final=_FINAL)


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    # To count, no register is wanted, whose thunk only the image's symbols tell: they need not be read for it.
    named = image.reconstructed
    return codesites.count(image, FAMILY, _reader(image, named=named), "retpoline-no-branch", _FINAL)


def _reader(image: Image, *, named: bool = True) -> codesites.Read:
    bits = image.bits
    spec = facts.load("tables", FAMILY)
    stride = spec["stride"]

    @cache
    def first() -> int | None:
        """Where the thunks begin; names are looked up only for a kernel that has sites."""
        if not named:
            return None
        return next((a for name in spec["array"] if (a := image.symbols.lookup(name)) is not None), None)

    known: dict[tuple[int, str, int], tuple[int, str, Detail]] = {}

    def read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
        skip = 1 if body[0] == _CS else 0
        if body[skip] in (branch.CALL, branch.JMP):
            kind, length = "call" if body[skip] == branch.CALL else "jmp", 5 + skip
        elif body[0] == 0x0F and body[1] in _CONDITIONS:
            kind, length = "jcc", 6
        else:
            return None
        if len(body) < length:
            return None
        target = (address + length + int.from_bytes(body[length - 4 : length], "little", signed=True)) & (
            (1 << bits) - 1
        )
        row = known.get((target, kind, length))
        if row is not None:
            return row
        register = None
        array = first()
        if array is not None and not (target - array) % stride and 0 <= target - array < 16 * stride:
            register = (target - array) // stride
        row = known[target, kind, length] = (
            length,
            kind if register is None else f"{kind} {REGISTERS[register]}",
            Thunk(target, register),
        )
        return row

    return read
