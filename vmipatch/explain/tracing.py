"""ftrace at work: calls at mcount sites, each proved by the kernel's own record of that site.

``struct dyn_ftrace`` (include/linux/ftrace.h): the site's address and flags, in
pages of records sorted by address.  Imports annotate.site, isa and its sisters in ``explain/``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from vmipatch.annotate import Site
from vmipatch.explain.ground import Ground
from vmipatch.explain.result import Proved
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.isa import branch

# FTRACE_FL_* of 3.19 to 7.3: the upper bits have stayed; newer ones took bits from the count, which never gets so far.
_ENABLED, _REGS_EN, _TRAMP_EN, _DIRECT_EN = 1 << 31, 1 << 29, 1 << 27, 1 << 23
_COUNT = (1 << 19) - 1
LENGTH = 5
"""Bytes of a call."""
CALLBACKS = ("ftrace_call", "ftrace_regs_call")
"""The calls inside ftrace_caller and ftrace_regs_caller (arch/x86/kernel/ftrace_64.S), of ftrace_stub on disk."""
_SEARCHES = 4
"""Passes over the dump for one site's record each: with it the whole block of records is found, of which there are
few.  After that one pass looks for all that are left."""
_MOST_LEFT = 1 << 14
_MOST_RECORDS = 1 << 16
_COMPARED = 24
"""Bytes of a trampoline that must be those of ftrace_caller, from which the kernel copies it."""


def callbacks(image: Image) -> list[int]:
    """The virtual addresses of :data:`CALLBACKS` that an image has."""
    found = [image.symbols.lookup(name) for name in CALLBACKS] if image.container != "module" else []
    return [address for address in found if address is not None]


def prove(ground: Ground, running: Running, sites: Sequence[Site], *, jumps: bool = False) -> list[Proved]:
    """Expect the calls that ftrace's records account for, and say what proves each.

    With ``jumps`` (6.19 on) a direct trampoline may be jumped to.
    """
    opcodes = (branch.CALL, branch.JMP) if jumps else (branch.CALL,)
    changed = [s for s in sites if _calls(ground, s, opcodes)]
    if not changed:
        return []
    records = _Records(running, sorted(s.address for s in sites), [s.address for s in changed])
    callers = {name: running.image.symbols.lookup(name) for name in ("ftrace_caller", "ftrace_regs_caller")}
    result = []
    cause = ground.cause("ftrace")
    for site in changed:
        flags = records.flags(site.address)
        at = site.address - ground.base
        code = bytes(ground.found[at : at + LENGTH])
        if flags is None or not flags & _ENABLED or not flags & _COUNT:
            continue
        why = _accounts(ground, running, site.address, code, flags, callers)
        if why is None:
            continue
        ground.lay(site.address, code, cause)
        named = ground.image.symbols.at(site.address) or (None, None)
        result.append(
            Proved(site.address, LENGTH, "ftrace", named[0], named[1], f"its dyn_ftrace record ({flags:#x}): {why}")
        )
    if result:
        result += _callbacks(ground, running, cause)
    return result


def _calls(ground: Ground, site: Site, opcodes: Sequence[int]) -> bool:
    at = site.address - ground.base
    return ground.found[at] in opcodes and ground.found[at : at + LENGTH] != ground.expected[at : at + LENGTH]


def _accounts(
    ground: Ground, running: Running, address: int, code: bytes, flags: int, callers: dict[str, int | None]
) -> str | None:
    """Why the flags of a record call for this very target; None where they do not."""
    target = branch.target_of(code, address, ground.image.bits)
    name = "ftrace_regs_caller" if flags & _REGS_EN else "ftrace_caller"
    if target is None or (code[0] == branch.JMP and not flags & _DIRECT_EN):
        return None
    if target == callers[name] and not flags & (_TRAMP_EN | _DIRECT_EN):
        return f"enabled, calls {name}"
    if ground.base <= target < ground.end or not flags & (_TRAMP_EN | _DIRECT_EN):
        return None
    there = running.read_running((target + running.slide) & ((1 << ground.image.bits) - 1), _COMPARED)
    if there is None or not any(there):
        return None
    if flags & _DIRECT_EN:
        verb = "jumps to" if code[0] == branch.JMP else "calls"
        return f"enabled, {verb} a direct trampoline at {target:#x}"
    for caller in callers.values():
        if caller is not None and running.read(caller, _COMPARED) == there:
            return f"enabled, calls a trampoline at {target:#x}, a copy of ftrace_caller"
    return None


def _callbacks(ground: Ground, running: Running, cause: int) -> list[Proved]:
    """The calls inside ftrace_caller: to what ``ftrace_trace_function`` holds, which held ``ftrace_stub`` on disk."""
    image = ground.image
    stub = image.symbols.lookup("ftrace_stub")
    result = []
    for name in CALLBACKS:
        address = image.symbols.lookup(name)
        if address is None or stub is None or not ground.base <= address < ground.end - LENGTH:
            continue
        at = address - ground.base
        code = bytes(ground.found[at : at + LENGTH])
        target = branch.target_of(code, address, image.bits) if code[0] == branch.CALL else None
        if target is None or code == ground.expected[at : at + LENGTH]:
            continue
        variable = _variable(running, stub, target)
        if variable is not None:
            ground.lay(address, code, cause)
            named = image.symbols.at(target)
            what = named[0] if named is not None and named[1] == 0 else f"{target:#x}"
            text = f"calls {what}, as the variable at {variable:#x} says that held ftrace_stub on disk"
            result.append(Proved(address, LENGTH, "ftrace", name, 0, text))
    return result


def _variable(running: Running, before: int, now: int) -> int | None:
    """A variable that held one function on disk and holds another now."""
    image = running.image
    size = image.bits // 8
    known = image.symbols.lookup("ftrace_trace_function")
    if known is not None:
        return known if running.pointer(known) == now else None
    pattern = before.to_bytes(size, "little")
    for section in image.sections:
        if not section.write or section.exec or not section.file_size:
            continue
        data = bytes(image.data[section.offset : section.offset + section.file_size])
        at = data.find(pattern)
        while at >= 0:
            address = section.address + at
            if not address % size and running.pointer(address) == now:
                return address
            at = data.find(pattern, at + 1)
    return None


class _Records:
    """ftrace's records, found by the addresses that they begin with."""

    def __init__(self, running: Running, addresses: list[int], wanted: list[int]) -> None:
        """``addresses`` are those of all sites, in order; ``wanted`` those that will be asked for."""
        self._running = running
        self._addresses = addresses
        self._wanted = wanted
        self._size = running.image.bits // 8
        self._stride = 2 * self._size
        self._flags: dict[int, int] = {}
        self._searches = 0

    def flags(self, address: int) -> int | None:
        """The flags of a site's record; None where the dump has no record of it."""
        if address not in self._flags and self._searches < _SEARCHES:
            self._searches += 1
            value = self._running_address(address).to_bytes(self._size, "little")
            self._take(address, self._running.memory.find(value, 256))
            if self._searches == _SEARCHES:
                left = [a for a in self._wanted if a not in self._flags][:_MOST_LEFT]
                values = {self._running_address(a): a for a in left}
                for found, offsets in self._running.memory.find_words(set(values), self._size).items():
                    self._take(values[found], offsets)
        return self._flags.get(address)

    def _take(self, address: int, offsets: Iterable[int]) -> None:
        """The block of records around the first of these offsets at which there is one."""
        if address not in self._flags:
            place = next((x for x in offsets if self._is_record(x, address)), None)
            if place is not None:
                self._block(place, address)

    def _running_address(self, address: int) -> int:
        return (address + self._running.slide) & ((1 << self._running.image.bits) - 1)

    def _is_record(self, offset: int, address: int) -> bool:
        """Whether the records before or behind are those of the neighbouring sites."""
        i = bisect_left(self._addresses, address)
        for step in (-1, 1):
            j = i + step
            if 0 <= j < len(self._addresses) and self._word(offset + step * self._stride) == self._addresses[j]:
                return True
        return False

    def _word(self, offset: int) -> int:
        data = self._running.memory.at(offset, self._size) if offset >= 0 else b""
        return self._running.linked(int.from_bytes(data, "little"))

    def _block(self, offset: int, address: int) -> None:
        """Take the whole block of records around one, as far as its addresses are those of sites in order."""
        i = bisect_left(self._addresses, address)
        for step in (-1, 1):
            at, j = offset, i
            for _ in range(_MOST_RECORDS):
                if not 0 <= j < len(self._addresses) or at < 0:
                    break
                data = self._running.memory.at(at, self._stride)
                if len(data) < self._stride:
                    break
                if self._running.linked(int.from_bytes(data[: self._size], "little")) != self._addresses[j]:
                    break
                self._flags[self._addresses[j]] = int.from_bytes(data[self._size : self._size + 4], "little")
                at, j = at + step * self._stride, j + step
