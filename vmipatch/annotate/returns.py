"""``.return_sites``: returns that are jumps to a thunk, so that mitigations can choose their form (5.19 on)."""

from __future__ import annotations

from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Thunk
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "return_sites"

_CS = 0x2E
"""clang's jumps to thunks have this prefix (-mindirect-branch-cs-prefix)."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every jump to the return thunk."""
    return codesites.scan(image, FAMILY, _reader(image.bits), "return-no-jump")


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _reader(image.bits), "return-no-jump")


def bulk(image: Image) -> list[codesites.Places] | None:
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
