"""``.ibt_endbr_seal``: ENDBR instructions of functions that no pointer names (5.18 on)."""

from __future__ import annotations

from vmipatch import facts
from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Place
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image

FAMILY = "endbr_seal"

ENDBR = {32: bytes.fromhex("F30F1EFB"), 64: bytes.fromhex("F30F1EFA")}
"""ENDBR32 and ENDBR64 (Intel SDM vol. 2)."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every ENDBR that the kernel seals (``endbr``), and every one that was sealed in the file (``sealed``)."""
    return codesites.scan(image, FAMILY, _reader(image), "endbr-none")


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _reader(image), "endbr-none")


def _reader(image: Image) -> codesites.Read:
    ops = {ENDBR[image.bits]: "endbr"}
    # Where the table is looked for by content a poison is no evidence: the older one is an ordinary nop.
    if not image.reconstructed:
        ops |= {bytes.fromhex(row["poison"]): "sealed" for row in facts.load("tables", FAMILY)["poison"]}

    def read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
        op = ops.get(body[:4])
        return None if op is None else (4, op, Place())

    return read
