"""Kprobes at work: breakpoints and jumps in the text, each proved by the ``struct kprobe`` that owns it.

include/linux/kprobes.h: hash node, list, nmissed, addr, symbol_name, offset, two
handlers, opcode.  A registered probe hangs in its hash list: what its ``pprev``
points at points back.  Imports isa and its sisters in ``explain/``.
"""

from __future__ import annotations

from typing import NamedTuple

from vmipatch.explain.ground import Ground
from vmipatch.explain.memory import PAGE
from vmipatch.explain.result import Proved
from vmipatch.explain.running import Running
from vmipatch.isa import branch

INT3 = 0xCC
_JUMP_SIZE = 5
MOST = 4096
"""Addresses that are looked for; a dump with more breakpoints than that has another trouble."""
_BEHIND = 64
"""Words behind a kprobe in which its optimised form keeps the address of its detour."""


class _Layout(NamedTuple):
    """Offsets in struct kprobe, in words: addr; in bytes: opcode."""

    addr: int
    opcode: int


# 3.x to 6.12; the fault and break handlers that stood before the opcode went in 4.19 and 5.14.
_LAYOUTS = {
    32: (_Layout(5, 40), _Layout(5, 44), _Layout(5, 48)),
    64: (_Layout(5, 80), _Layout(5, 88), _Layout(5, 96)),
}


def prove(ground: Ground, running: Running) -> list[Proved]:
    """Expect the breakpoints and jumps that kprobes account for, and say what proves each."""
    places = _places(ground)
    if not places or len(places) > MOST:
        return []
    image = ground.image
    size = image.bits // 8
    mask = (1 << image.bits) - 1
    running_addresses = {(a + running.slide) & mask: a for a in places}
    hits = running.memory.find_words(set(running_addresses), size)
    result = []
    for value, offsets in hits.items():
        address = running_addresses[value]
        for offset in offsets:
            found = _kprobe(ground, running, address, offset)
            if found is None:
                continue
            length, cause, text = found
            at = address - ground.base
            ground.lay(address, bytes(ground.found[at : at + length]), ground.cause(cause))
            named = image.symbols.at(address) or (None, None)
            result.append(Proved(address, length, cause, named[0], named[1], text))
            break
    return result


def _places(ground: Ground) -> list[int]:
    """Where a run of differing bytes begins that can be a probe's: INT3, or a jump of five bytes."""
    result: list[int] = []
    for address, length in ground.differences():
        at = address - ground.base
        if result and address < result[-1] + _JUMP_SIZE and ground.found[result[-1] - ground.base] == branch.JMP:
            continue
        code = ground.found[at]
        if code in (INT3, branch.JMP) and length <= _JUMP_SIZE:
            result.append(address)
        elif at and ground.found[at - 1] == branch.JMP and ground.expected[at - 1] == branch.JMP:
            result.append(address - 1)
    return result


def _kprobe(ground: Ground, running: Running, address: int, offset: int) -> tuple[int, str, str] | None:
    """Length, cause and evidence, if the word at an offset of the dump is the ``addr`` of a registered kprobe."""
    size = ground.image.bits // 8
    original = ground.expected[address - ground.base]
    for layout in _LAYOUTS[ground.image.bits]:
        start = offset - layout.addr * size
        data = running.memory.at(start, _BEHIND * size) if start >= 0 else b""
        if len(data) < layout.opcode + 1 or data[layout.opcode] != original:
            continue
        words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data) - size + 1, size)]
        pprev = words[1]
        back = running.read_running(pprev, size) if pprev and not pprev % size else None
        if back is None:
            continue
        place = int.from_bytes(back, "little")
        # The hash list leads to this very place: by its address where that is known, else by its place in its page.
        if not running.may_be_at(start, place) or place % PAGE != _page_offset(running, start):
            continue
        where = f"the kprobe at {place:#x}, registered in the hash list at {pprev:#x}, keeps the byte {original:02x}"
        if ground.found[address - ground.base] == INT3:
            return 1, "kprobe", where
        at = address - ground.base
        target = branch.target_of(bytes(ground.found[at : at + _JUMP_SIZE]), address, ground.image.bits)
        if target is None:
            return None
        detour = (target + running.slide) & ((1 << ground.image.bits) - 1)
        if detour in words[layout.addr + 1 :] and running.read_running(detour, 1) is not None:
            return _JUMP_SIZE, "optimised kprobe", f"{where}, and its detour is at {detour:#x}"
    return None


def _page_offset(running: Running, offset: int) -> int:
    for regions in (running.memory.physical, running.memory.virtual):
        address = running.memory.addresses_of(regions, offset)
        if address is not None:
            return address % PAGE
    return -1
