"""The pass over return sites (``apply_returns``, 5.19 on): a return, or a jump to the mitigations' thunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmipatch.annotate import Site
from vmipatch.annotate.features import numbers
from vmipatch.isa import branch
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.text import Text

RET = b"\xc3\xcc\xcc\xcc\xcc"
"""A return, and INT3 so that nothing behind it is speculated into."""

ITS_HALF = 0x20
"""Indirect Target Selection strikes branches in the lower half of a cache line: this bit of their address is clear."""


def wants_thunk(cpu: Cpu) -> bool:
    """Whether returns stay jumps to a thunk on this CPU (X86_FEATURE_RETHUNK)."""
    return cpu.has(numbers()["RETHUNK"])


def form_at(address: int, thunk: int | None, its: int | None, bits: int) -> bytes:
    """The five bytes of a return at a virtual address; ``thunk`` None means a plain return.

    ``its`` is the address of the thunk against Indirect Target Selection, which is used
    only where that can happen (``cpu_wants_rethunk_at``).
    """
    if thunk is None or (thunk == its and address & ITS_HALF):
        return RET
    return branch.near(branch.JMP, address, thunk, bits)


def plan(text: Text, sites: Iterable[Site], thunk: int | None, its: int | None) -> Iterator[Patch]:
    """One patch a site; ``thunk`` is what ``x86_return_thunk`` holds, or None without X86_FEATURE_RETHUNK."""
    bits = text.image.bits
    named = text.image.symbols.at(thunk) if thunk is not None else None
    name = named[0] if named is not None and named[1] == 0 else f"{thunk or 0:#x}"
    plain = Cause("return_sites", "return", "a return")
    jump = Cause("return_sites", "return", f"a jump to {name}")
    for site in sites:
        new = form_at(site.address, thunk, its, bits)
        old = text.read(site.address, site.length)
        if old[0] != branch.JMP:
            continue
        text.write(site.address, new)
        yield Patch(site.address, old, new, plain if new is RET else jump, site)
