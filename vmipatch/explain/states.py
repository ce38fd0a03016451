"""What may stand at the sites that a running kernel rewrites after boot: mcount calls, jump labels, static calls.

Each function lays the expected bytes over a :class:`Ground`.  A state that depends
on a variable is decided by that variable where the dump has it; where it has
not, sites of one variable must agree with each other.  Imports annotate, patch, isa and explain.running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vmipatch import facts
from vmipatch.annotate import Site
from vmipatch.annotate.site import JumpLabel, StaticCall
from vmipatch.explain.ground import Ground
from vmipatch.explain.result import Proved
from vmipatch.explain.running import Running
from vmipatch.isa import branch
from vmipatch.isa.nops import NopTable
from vmipatch.patch import returns

_NEAR = 40
"""Bytes around a trampoline's address in the code that updates it, in which its key's address stands."""


_AGREEING = 4
"""Sites of one key that must call the same function before that is taken for its value."""


@dataclass(slots=True)
class Tally:
    """How many sites of a family are in which state, and on what evidence."""

    states: Counter[str] = field(default_factory=Counter)
    evidence: Counter[str] = field(default_factory=Counter)


def five_byte_nop(nops: NopTable) -> bytes:
    """The nop of one instruction that a kernel with this nop table puts over a call."""
    return bytes.fromhex(facts.load("tables", "mcount")["nops"].get(nops.name, nops.sequences[4].hex()))


def mcount(ground: Ground, sites: Sequence[Site], nop: bytes) -> Tally:
    """Every mcount site holds the nop; all of them their calls where the kernel never got so far as ftrace_init."""
    tally = Tally()
    found, base = ground.found, ground.base
    sample = sites[:: max(1, len(sites) // 256)]
    calls = sum(found[s.address - base] == branch.CALL for s in sample)
    if calls * 2 > len(sample):
        tally.states["call, ftrace not started"] = len(sites)
        return tally
    cause = ground.cause("mcount")
    for site in sites:
        ground.lay(site.address, nop, cause)
    tally.states["nop"] = len(sites)
    return tally


def jump_labels(ground: Ground, sites: Iterable[Site], running: Running | None, nops: NopTable) -> Tally:
    """Branches by the state of their keys."""
    tally = Tally()
    cause = ground.cause("jump_labels")
    five = five_byte_nop(nops)
    groups: dict[int, list[Site]] = {}
    for site in sites:
        assert isinstance(site.detail, JumpLabel)
        groups.setdefault(site.detail.key, []).append(site)
    for key, group in groups.items():
        enabled = key_state(running, key) if running is not None else None
        tally.evidence["key" if enabled is not None else "sites of the key agree"] += len(group)
        if enabled is None:
            votes = Counter(v for s in group if (v := _vote(ground, s, five, nops)) is not None)
            enabled = votes[True] > votes[False]
        for site in group:
            detail = site.detail
            assert isinstance(detail, JumpLabel)
            taken = enabled != detail.likely
            ground.lay(site.address, label_form(site, taken, five, nops), cause)
            tally.states["taken" if taken else "not taken"] += 1
    return tally


def label_form(site: Site, taken: bool, five: bytes, nops: NopTable) -> bytes:
    """The bytes of a jump label in one of its two states."""
    detail = site.detail
    assert isinstance(detail, JumpLabel)
    if not taken:
        return five if site.length == branch.CALL_SIZE else nops.sequences[1]
    if site.length == branch.CALL_SIZE:
        return branch.near(branch.JMP, site.address, detail.target, 32)
    return bytes((branch.JMP_SHORT, (detail.target - site.address - 2) & 0xFF))


def flipped(ground: Ground, sites: Iterable[Site], running: Running) -> list[Proved]:
    """The jump labels that are not as on disk, with the state of their keys."""
    result = []
    for site in sites:
        detail = site.detail
        assert isinstance(detail, JumpLabel)
        at = site.address - ground.base
        now, before = ground.found[at : at + site.length], ground.pristine[at : at + site.length]
        jumps = now[0] in (branch.JMP, branch.JMP_SHORT)
        if now != ground.expected[at : at + site.length] or jumps == (before[0] in (branch.JMP, branch.JMP_SHORT)):
            continue
        raw = running.read(detail.key, 4)
        if raw is not None:
            count = int.from_bytes(raw, "little", signed=True)
            symbol, offset = ground.image.symbols.at(site.address) or (None, None)
            text = f"the key {site.op} at {detail.key:#x} is {count}"
            result.append(Proved(site.address, site.length, "static key", symbol, offset, text))
    return result


def key_state(running: Running, key: int) -> bool | None:
    """Whether a static key is on; None where the dump does not have it, or has it just being switched on.

    While the first user is being counted the count is -1 (kernel/jump_label.c), and not all branches are changed yet.
    """
    data = running.read(key, 4)
    count = -1 if data is None else int.from_bytes(data, "little", signed=True)
    return None if count < 0 else count > 0


def _vote(ground: Ground, site: Site, five: bytes, nops: NopTable) -> bool | None:
    """What a site's own bytes say of its key; None where they are neither state."""
    detail = site.detail
    assert isinstance(detail, JumpLabel)
    at = site.address - ground.base
    now = ground.found[at : at + site.length]
    for taken in (False, True):
        if now == label_form(site, taken, five, nops):
            return taken != detail.likely
    return None


@dataclass(frozen=True, slots=True)
class CallForms:
    """How a kernel writes static calls: its nop, what calls of ``__static_call_return0`` become, and its returns."""

    bits: int
    nop: bytes
    return0: int | None
    return0_forms: tuple[bytes, ...]
    thunk: int | None
    its: int | None

    def of(self, site: Site, function: int, now: bytes) -> bytes:
        """The bytes of a site whose key holds ``function`` (0 for none); ``now`` chooses among equal forms."""
        detail = site.detail
        assert isinstance(detail, StaticCall)
        if not function:
            if not detail.tail:
                return self.nop
            # Before the mitigations were chosen the kernel wrote plain returns, and 6.1 leaves them.
            late = returns.form_at(site.address, self.thunk, self.its, self.bits)
            return now if now == returns.RET else late
        if function == self.return0 and not detail.tail:
            return now if now in self.return0_forms else self.return0_forms[0]
        opcode = branch.JMP if detail.tail else branch.CALL
        return branch.near(opcode, site.address, function, self.bits)


def static_calls(ground: Ground, sites: Iterable[Site], running: Running | None, forms: CallForms) -> Tally:
    """Calls and trampolines by what their keys hold."""
    tally = Tally()
    cause = ground.cause("static_calls")
    sites = list(sites)
    keys = _Keys(ground, running, forms)
    if running is None:
        keys.agree(sites)
    for site in sites:
        detail = site.detail
        assert isinstance(detail, StaticCall)
        at = site.address - ground.base
        now = bytes(ground.found[at : at + site.length])
        booted = bytes(ground.expected[at : at + site.length])
        function = keys.function(site, detail, now, booted)
        if function is None:
            # Nothing tells what the key holds: the site must be as boot left it.
            tally.evidence["none: as on disk"] += 1
            continue
        tally.evidence["key" if running is not None else "key as on disk, or a form without a target"] += 1
        form = forms.of(site, function, now)
        if site.address == detail.trampoline and _means(booted, site.address, forms) == function and now == booted:
            form = booted
        ground.lay(site.address, form, cause)
        tally.states["none" if not function else "return 0" if function == forms.return0 else "function"] += 1
    return tally


def runtime_consts(ground: Ground, sites: Iterable[Site], running: Running | None) -> Tally:
    """Immediates by the variables that they stand for; without the dump's data all of one variable must agree."""
    tally = Tally()
    cause = ground.cause("runtime_consts")
    groups: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.op, site.length), []).append(site)
    for (name, length), group in groups.items():
        address = ground.image.symbols.lookup(name)
        value = running.read(address, length) if running is not None and address is not None else None
        tally.evidence["variable" if value is not None else "sites of the variable agree"] += len(group)
        if value is None:
            votes = Counter(bytes(ground.found[s.address - ground.base : s.end - ground.base]) for s in group)
            value = votes.most_common(1)[0][0]
        for site in group:
            ground.lay(site.address, value, cause)
        tally.states[f"{name} = {int.from_bytes(value, 'little'):#x}"] += len(group)
    return tally


def _means(code: bytes, address: int, forms: CallForms) -> int | None:
    """The function that a trampoline goes to; 0 where it returns."""
    target = branch.target_of(code, address, forms.bits)
    if code[0] == 0xC3 or (target is not None and target == forms.thunk):
        return 0
    return target


class _Keys:
    """What static-call keys hold now."""

    def __init__(self, ground: Ground, running: Running | None, forms: CallForms) -> None:
        self._ground = ground
        self._forms = forms
        self._running = running
        self._functions: dict[int, int | None] = {}
        self._agreed: dict[int, int] = {}
        image = ground.image
        self._data = [(s.address, s.end) for s in image.sections if s.write and s.file_size and not s.exec]

    def agree(self, sites: Sequence[Site]) -> None:
        """Without the dump's data: what the sites of one key call, if it is a function and most of them agree."""
        image = self._ground.image
        votes: dict[int, Counter[int]] = {}
        for site in sites:
            detail = site.detail
            assert isinstance(detail, StaticCall)
            at = site.address - self._ground.base
            target = branch.target_of(self._ground.found[at : at + site.length], site.address, image.bits)
            if detail.key and target is not None and site.address != detail.trampoline:
                votes.setdefault(detail.key, Counter())[target] += 1
        for key, counted in votes.items():
            target, count = counted.most_common(1)[0]
            named = image.symbols.at(target)
            if count >= _AGREEING and count * 10 >= counted.total() * 9 and named is not None and named[1] == 0:
                self._agreed[key] = target

    def function(self, site: Site, detail: StaticCall, now: bytes, booted: bytes) -> int | None:
        """The function that the site's key holds, as linked; None where nothing tells."""
        running = self._running
        key = detail.key
        if not key and not site.op.startswith("0x"):
            key = self._ground.image.symbols.lookup("__SCK__" + site.op) or 0
        if running is None:
            return self._unchanged(key, now)
        if key:
            if key not in self._functions:
                self._functions[key] = running.pointer(key)
            return self._functions[key]
        if now == booted:
            return None
        return self._by_code(running, site, now)

    def _unchanged(self, key: int, now: bytes) -> int | None:
        """Without the dump's data: none or "return 0" where the site says so, else what the key holds on disk."""
        forms, image = self._forms, self._ground.image
        if now in (forms.nop, returns.RET):
            return 0
        if now in forms.return0_forms:
            return forms.return0
        if not key:
            return None
        if key in self._agreed:
            return self._agreed[key]
        if key not in self._functions:
            self._functions[key] = int.from_bytes(image.read(key, image.bits // 8), "little")
        return self._functions[key]

    def _by_code(self, running: Running, site: Site, now: bytes) -> int | None:
        """Without symbols: a word whose address stands beside the trampoline's, in code that updates both or in a
        ``struct tracepoint``, that held on disk what the trampoline went to there, and that holds now what it
        goes to."""
        image = running.image
        goes, went = (
            _means(now, site.address, self._forms),
            _means(image.read(site.address, 5), site.address, self._forms),
        )
        if goes is None or went is None or image.bits != 32:
            return None
        wanted = site.address.to_bytes(4, "little")
        for data in self._ground.contents():
            at = data.find(wanted)
            while at >= 0:
                for near in range(max(0, at - _NEAR), min(len(data) - 4, at + _NEAR)):
                    key = int.from_bytes(data[near : near + 4], "little")
                    if any(low <= key <= high - 4 for low, high in self._data):
                        before = int.from_bytes(image.read(key, 4), "little")
                        if before == went and running.pointer(key) == goes:
                            return goes
                at = data.find(wanted, at + 1)
        return None
