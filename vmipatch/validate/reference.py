"""The native code of every call of an ABI, as bytes to lie in a ROM area: what a stub is compared with.

May import rombuild.  Where the native ROM has a stub it is that one; where it answers NONE, the ABI's own
native text (specs/abi), or a plain return where a call does nothing on the bare machine.
"""

from __future__ import annotations

from functools import cache

from vmipatch.isa.assemble import assemble
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild.build import build

HEADER = 0x20
RETURN = b"\xc3"


@cache
def blob(abi: str) -> tuple[bytes, dict[str, int]]:
    """The bytes, and where in them each call's native code begins; no guest takes them for a ROM."""
    built = build("native", abi) if _has_native(abi) else None
    out = bytearray(built.data if built else b"")
    out[:HEADER] = bytes(min(HEADER, len(out)))
    calls = abis.load(abi).calls
    places = {s.name: s.offset for s in built.symbols if s.name in calls} if built else {}
    for call in calls.values():
        if call.name not in places and not call.init and not call.get_relocation:
            places[call.name] = len(out)
            drop = b"\x8d\x64\x24\x04" if call.jump and abis.load(abi).slot_size is not None else b""
            code = assemble(call.asm).code if call.asm else b""
            out += drop + code + RETURN
    return bytes(out), places


def _has_native(abi: str) -> bool:
    only = abis.load(abi).only
    return not only or "native" in only
