"""Thunks against Indirect Target Selection: branches of retpoline sites that go to one made while booting.

``emit_its_trampoline`` of arch/x86/kernel/alternative.c (6.15, and stable kernels
of 2025): a site whose branch would lie in the lower half of a cache line keeps its form
and goes to a jump through its register, in memory outside the image.  The
dump proves it: that memory is read.  Imports isa and its sisters in ``explain/``.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmipatch.annotate import Site
from vmipatch.annotate.site import Thunk
from vmipatch.explain.ground import Ground
from vmipatch.explain.running import Running
from vmipatch.patch.passes.returns import ITS_HALF

_LENGTH = 4
_INT3 = 0xCC


def prove(ground: Ground, running: Running, sites: Sequence[Site]) -> int:
    """Expect the branches that lead to such a thunk for the site's own register; how many there are."""
    cause = ground.cause("retpoline_sites")
    proved = 0
    for site in sites:
        at = site.address - ground.base
        now, before = ground.found[at : at + site.length], ground.disk[at : at + site.length]
        detail = site.detail
        if now == ground.expected[at : at + site.length] or not isinstance(detail, Thunk) or detail.register is None:
            continue
        opcode = site.length - _LENGTH
        if now[:opcode] != before[:opcode] or not _in_lower_half(site.address, detail.register):
            continue
        target = site.address + site.length + int.from_bytes(now[opcode:], "little", signed=True)
        if _is_thunk(running, target + running.slide, detail.register, ground.image.bits):
            ground.lay(site.address, now, cause)
            proved += 1
    return proved


def _in_lower_half(address: int, register: int) -> bool:
    """Where the last byte of the indirect branch would lie (``cpu_wants_indirect_its_thunk_at``)."""
    return not (address + 1 + register // 8) & ITS_HALF


def _is_thunk(running: Running, target: int, register: int, bits: int) -> bool:
    """Whether a virtual address of the running kernel holds a jump through the register, and INT3 behind it."""
    code = (b"\x41" if register >= 8 else b"") + bytes((0xFF, 0xE0 + (register & 7)))
    there = running.read_running(target & ((1 << bits) - 1), len(code) + 1)
    return there is not None and there[:-1] == code and there[-1] == _INT3
