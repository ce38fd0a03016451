"""Checks of indirect calls (kCFI): the hash in front of every function that has one, and the callers that ask for it.

``.cfi_sites`` names the preambles (6.2 on, kernels built with clang and CONFIG_FINEIBT).  The callers
have no table of their own: each stands in front of a site of ``.retpoline_sites``, and the kernel finds them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from vmipatch.annotate import codesites, retpolines
from vmipatch.annotate.endbr import ENDBR
from vmipatch.annotate.site import Detail, Hash, HashCheck, Site
from vmipatch.annotate.tables import FamilyScan, find_tables, load_format
from vmipatch.errors import AddressError
from vmipatch.image import Image

FAMILY = "cfi_sites"

LOAD = 5
"""Bytes of the instruction that holds a function's hash: ``mov`` of 32 bits into one of the first eight registers."""

CALLER = 14
"""Bytes of a caller: ``mov r10d, -hash`` (6), ``add r10d, [r11-15]`` (4), a jump over the trap (2), the trap (2)."""

BEFORE = 16
"""FineIBT's preamble begins so many bytes before its function: padding shorter than that cannot hold it."""

MOST = 256
"""The kernel's padding before functions is shorter than that (CONFIG_FUNCTION_PADDING_CFI)."""

_MOV = range(0xB8, 0xC0)
_MOV_R10D = b"\x41\xba"
_SAMPLE = 512


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every ``preamble`` up to its function's ENDBR, and every ``caller`` with its branch."""
    tables, loads, findings = codesites.scan(image, FAMILY, _read, "cfi-no-hash")
    offset = offset_of(image)
    if offset is None:
        return tables, [], findings
    sites = [_whole(image, load, offset) for load in loads]
    return tables, sites + list(_callers(image)), findings


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    return codesites.count(image, FAMILY, _read, "cfi-no-hash")


def _read(body: bytes, address: int) -> tuple[int, str, Detail] | None:
    if len(body) < LOAD or body[0] not in _MOV:
        return None
    return LOAD, "preamble", Hash(int.from_bytes(body[1:LOAD], "little"), body[0] - _MOV.start, address)


@lru_cache(maxsize=4)
def offset_of(image: Image) -> int | None:
    """How far behind its ``__cfi_`` symbol a function begins (CFI_OFFSET): where most of a sample have their ENDBR.

    None where there are no such symbols.
    """
    votes: Counter[int] = Counter()
    endbr = ENDBR[image.bits]
    for table in find_tables(image, load_format(FAMILY)):
        found = [address for _, address in codesites.addresses(table, image.bits)]
        for address in found[:: max(1, len(found) // _SAMPLE)]:
            try:
                at = image.read(address, MOST).find(endbr)
            except AddressError:
                continue
            if at >= BEFORE:
                votes[at] += 1
    return votes.most_common(1)[0][0] if votes else None


def _whole(image: Image, load: Site, offset: int) -> Site:
    """A preamble with all of its padding, and the ENDBR behind it."""
    detail = load.detail
    assert isinstance(detail, Hash)
    function = load.address + offset
    try:
        endbr = image.read(function, 4) == ENDBR[image.bits]
    except AddressError:
        return load
    return load._replace(length=offset + 4 if endbr else offset, detail=detail._replace(function=function))


def _callers(image: Image) -> Iterator[Site]:
    for site in retpolines.scan(image)[1]:
        try:
            code = image.read(site.address - CALLER, 6)
        except AddressError:
            continue
        value = -int.from_bytes(code[2:], "little") & 0xFFFFFFFF
        if code[:2] == _MOV_R10D and value:
            detail = HashCheck(value, site.op.split()[0])
            yield site._replace(
                family=FAMILY, address=site.address - CALLER, length=CALLER + site.length, op="caller", detail=detail
            )
