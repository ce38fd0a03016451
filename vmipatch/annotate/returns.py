"""``.return_sites``: returns that are jumps to a thunk, so that mitigations can choose their form (5.19 on)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Places, Thunk
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "return_sites"

_CS = 0x2E
"""clang's jumps to thunks have this prefix (-mindirect-branch-cs-prefix)."""

_FINAL = re.compile(rb"\xc3\xcc{4}")
"""A plain return, as apply_returns writes it (arch/x86/kernel/alternative.c of 5.19 to 7.3)."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every jump to the return thunk."""
    read = _reader(image.bits)

    def read_all(bodies: Sequence[bytes], addresses: Sequence[int]) -> list[codesites.Row | None]:
        # Nearly all jump to one place, with the same few rows.
        first = next((read(body, address) for body, address in zip(bodies, addresses, strict=True) if body), None)
        if first is None or not isinstance(first[2], Thunk) or first[0] != branch.CALL_SIZE:
            return [read(body, address) if body else None for body, address in zip(bodies, addresses, strict=True)]
        lead, end = bytes((branch.JMP,)), first[2].target - branch.CALL_SIZE
        jumps = [lead + (end - address & 0xFFFFFFFF).to_bytes(4, "little") for address in addresses]
        return [
            first if body.startswith(jump) else read(body, address) if body else None
            for body, address, jump in zip(bodies, addresses, jumps, strict=True)
        ]

    return codesites.scan(image, FAMILY, read, "return-no-jump", read_all, _FINAL)


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _reader(image.bits), "return-no-jump", _FINAL)


def bulk(image: Image) -> list[Places] | None:
    """The same in bulk; None where an entry makes no sense."""
    return codesites.bulk(image, FAMILY, _reader(image.bits), "return-no-jump", bytes((branch.JMP,)), branch.CALL_SIZE)


def _reader(bits: int) -> codesites.Read:
    known: dict[tuple[int, bool], tuple[int, str, Detail]] = {}

    def read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
        prefix = body[0] == _CS
        if body[prefix] != branch.JMP:
            return None
        target = branch.target_of(body[prefix:], address + prefix, bits)
        if target is None:
            return None
        row = known.get((target, prefix))
        if row is None:
            row = known[target, prefix] = branch.CALL_SIZE + prefix, "return", Thunk(target, None)
        return row

    return read
