"""``.ibt_endbr_seal``: ENDBR instructions of functions that no pointer names (5.18 on)."""

from __future__ import annotations

from vmipatch.annotate import codesites
from vmipatch.annotate.site import Detail, Place
from vmipatch.annotate.tables import FamilyScan
from vmipatch.image import Image

FAMILY = "endbr_seal"

ENDBR = {32: bytes.fromhex("F30F1EFB"), 64: bytes.fromhex("F30F1EFA")}
"""ENDBR32 and ENDBR64 (Intel SDM vol. 2)."""


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every ENDBR that the kernel seals."""
    return codesites.scan(image, FAMILY, _reader(image.bits), "endbr-none")


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _reader(image.bits), "endbr-none")


def _reader(bits: int) -> codesites.Read:
    def read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
        return (4, "endbr", Place()) if body[:4] == ENDBR[bits] else None

    return read
