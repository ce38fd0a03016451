"""``.call_sites``: direct calls, for call depth tracking (6.2 on)."""

from __future__ import annotations

from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Places, Thunk
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "call_sites"


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every direct call that the table names."""
    return codesites.scan(image, FAMILY, _reader(image.bits), "call-no-branch")


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _reader(image.bits), "call-no-branch")


def bulk(image: Image) -> list[Places] | None:
    """The same in bulk; None where an entry makes no sense."""
    leads = bytes((branch.CALL, branch.JMP))
    return codesites.bulk(image, FAMILY, _reader(image.bits), "call-no-branch", leads, branch.CALL_SIZE)


def _reader(bits: int) -> codesites.Read:
    def read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
        target = branch.target_of(body, address, bits)
        if target is None or body[0] == branch.JMP_SHORT:
            return None
        return branch.CALL_SIZE, "call" if body[0] == branch.CALL else "jmp", Thunk(target, None)

    return read
