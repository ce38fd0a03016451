"""The pass over retpoline sites (``apply_retpolines``, 5.16 on): where no retpoline is wanted, the branch itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmipatch.annotate import Site
from vmipatch.annotate.features import numbers
from vmipatch.annotate.site import Thunk
from vmipatch.isa.nops import NopTable
from vmipatch.patch import relocate
from vmipatch.patch.alternatives import join_nops
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

_LFENCE = b"\x0f\xae\xe8"
_INT3 = b"\xcc"


def plan(text: Text, sites: Iterable[Site], rules: Rules, cpu: Cpu, nops: NopTable) -> Iterator[Patch]:
    """One patch for every site that the kernel rewrites; none where the CPU keeps its retpolines."""
    fence = cpu.has(numbers()["RETPOLINE_LFENCE"])
    if cpu.has(numbers()["RETPOLINE"]) and not fence:
        return
    optimise = rules.section("alternatives")["optimise"]
    int3 = rules.section("retpolines").get("int3", True)
    for site in sites:
        old = text.read(site.address, site.length)
        new = direct(site, old, fence=fence, int3=int3)
        if new is None:
            continue
        if optimise == "instructions":
            new = join_nops(new, text.image.bits, nops)
        elif optimise.startswith("runs"):
            new = relocate.join_runs(new, text.image.bits, nops, branches=optimise == "runs-and-branches")
        text.write(site.address, new)
        reason = "no retpoline, after LFENCE" if fence else "no retpoline"
        yield Patch(site.address, old, new, Cause("retpoline_sites", site.op, reason), site)


def direct(site: Site, old: bytes, *, fence: bool, int3: bool) -> bytes | None:
    """The indirect branch of a site in as many bytes, nops behind it; None where it does not fit.

    ``fence`` puts LFENCE before it; ``int3`` puts INT3 behind a jump, so that nothing
    is speculated into (6.0 on).
    """
    detail = site.detail
    assert isinstance(detail, Thunk)
    if detail.register is None:
        return None
    kind = site.op.split()[0]
    body = b""
    if kind == "jcc":
        # A short jump over the rest, on the opposite condition.
        body += bytes((0x70 + ((old[1] & 0xF) ^ 1), site.length - 2))
    if fence:
        body += _LFENCE
    if detail.register >= 8:
        body += b"\x41"
    body += bytes((0xFF, (0xD0 if kind == "call" else 0xE0) + (detail.register & 7)))
    if len(body) > site.length:
        return None
    if kind != "call" and int3 and len(body) < site.length:
        body += _INT3
    return body + b"\x90" * (site.length - len(body))
