"""The unexplained runs of a comparison, with all that helps a person to judge them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from vmipatch.annotate import Site
from vmipatch.explain.ground import Ground
from vmipatch.explain.result import Unexplained
from vmipatch.isa import decode

MOST = 10_000
"""Runs that are told one by one."""

DISASSEMBLED = 200
"""Runs whose instructions are shown."""

_AROUND = 16


def unexplained(ground: Ground, sites: Iterable[Site]) -> tuple[list[Unexplained], int, int]:
    """The first runs, how many runs there are, and how many bytes."""
    result: list[Unexplained] = []
    runs = count = 0
    index: _Sites | None = None
    for address, length in ground.differences():
        runs += 1
        count += length
        if runs > MOST:
            continue
        if index is None:
            index = _Sites(sites)
        result.append(_one(ground, index, address, length, runs <= DISASSEMBLED))
    return result, runs, count


class _Sites:
    """Which site a byte lies in; of several the smallest."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = sorted(sites, key=lambda s: s.address)
        self._starts = [s.address for s in self._sites]

    def at(self, address: int) -> Site | None:
        best = None
        for i in range(bisect_right(self._starts, address) - 1, -1, -1):
            site = self._sites[i]
            if address - site.address > 255:
                break
            if site.end > address and (best is None or site.length < best.length):
                best = site
        return best


def _one(ground: Ground, index: _Sites, address: int, length: int, shown: bool) -> Unexplained:
    at = address - ground.base
    found, expected = ground.found[at : at + length], bytes(ground.expected[at : at + length])
    named = ground.image.symbols.at(address)
    site = index.at(address)
    start = site.address if site is not None else address
    texts: list[tuple[str, ...]] = [(), ()]
    if shown:
        if site is None:
            start = boundary(ground, address, named)
        for i, data in enumerate((ground.found, ground.expected)):
            code = bytes(data[start - ground.base : at + length + _AROUND])
            lines = decode.disassemble(code, ground.image.bits, start)
            texts[i] = tuple(
                x.text for x in lines if x.address + len(x.code) > address and x.address < address + length
            )
    name, offset = named if named is not None else (None, None)
    what = f"{site.family} {site.op}" if site is not None else None
    hint = _hint(ground, site, address, found, expected)
    return Unexplained(address, found, expected, name, offset, what, hint, texts[0], texts[1])


def boundary(ground: Ground, address: int, named: tuple[str, int] | None) -> int:
    """The start of the expected instruction that an address lies in, decoding from its symbol on."""
    start = address - named[1] if named is not None and named[1] <= 1 << 14 else address
    if start < ground.base:
        return address
    position = start
    code = bytes(ground.expected[start - ground.base : address - ground.base + _AROUND])
    for size in decode.lengths(code, ground.image.bits):
        if position + size > address:
            break
        position += size
    return position if position <= address else address


def _hint(ground: Ground, site: Site | None, address: int, found: bytes, expected: bytes) -> str | None:
    """What a run looks like; no evidence stands behind it."""
    if site is not None and site.family == "mcount":
        code = bytes(ground.found[site.address - ground.base : site.address - ground.base + 5])
        if code[:1] == b"\xe8":
            return "looks like ftrace: a call where the nop belongs, but no record of ftrace says so"
        if code[:1] == b"\xcc":
            return "looks like a kprobe, or ftrace half-way: INT3, but nothing in the dump owns it"
    if site is not None and site.family == "jump_labels":
        return "looks like a flipped static key, but the key says otherwise"
    if site is not None and site.family == "static_calls":
        return "looks like an updated static call, but the key says otherwise or is not in the dump"
    if found[:1] == b"\xcc":
        return "looks like a breakpoint (kprobe, gdb): INT3, but nothing in the dump owns it"
    if found[:1] == b"\xe9" or ground.found[address - ground.base] == 0xE9:
        return "looks like an optimised kprobe or a hook: a jump, but nothing in the dump owns it"
    if not any(found):
        return "zeros: a page that the dump left out?"
    return None
