"""Padding that counts calls (call depth tracking), in front of functions that no table names.

The kernel writes it for whatever a static call is led to, and leaves it when the call goes
elsewhere later.  It is the same code at every function, and nothing enters it but calls of that
function.  Imports patch.passes and its sisters in ``explain/``.
"""

from __future__ import annotations

from vmipatch.explain.ground import Ground
from vmipatch.patch.passes import Boot, callthunks


def prove(ground: Ground, boot: Boot, slide: int) -> int:
    """Expect that code where it stands and may; how many functions have it."""
    how = callthunks.thunks_of(boot)
    if how is None:
        return 0
    cause = ground.cause(callthunks.FAMILY)
    proved = 0
    for site in callthunks.paddings(boot):
        at = site.address - ground.base
        if at < 0 or site.end > ground.end:
            continue
        now = ground.found[at : at + site.length]
        if now != ground.expected[at : at + site.length] and now == code_at(boot, how, site.address, slide):
            ground.lay(site.address, now, cause)
            proved += 1
    return proved


def code_at(boot: Boot, how: callthunks.Thunks, address: int, slide: int) -> bytes:
    """The counting code at a virtual address as linked, of a kernel that was moved."""
    code = bytearray(how.code_at(address))
    table = boot.image.relocations
    if not slide or table is None:
        return bytes(code)
    start = how.template.address
    for fields, value in ((table.absolute32, slide), (table.inverse32, -slide)):
        for at in (f - start for f in fields if start <= f <= start + len(code) - 4):
            field = int.from_bytes(code[at : at + 4], "little") + value
            code[at : at + 4] = (field & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(code)
