"""Static calls: the functions that their keys hold now (kernel/static_call_inline.c, arch/x86/kernel/static_call.c)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vmipatch.annotate import Site
from vmipatch.annotate.site import Sites, StaticCall
from vmipatch.annotate.staticcalls import JCC_LENGTH
from vmipatch.explain.ground import Ground
from vmipatch.explain.late.contract import Data, LateFamily, Live, State, Tally, five_byte_nop, five_byte_nops
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch import evidence
from vmipatch.patch.passes import Boot, callthunks, returns

_NEAR = 40
"""Bytes around a trampoline's address in the code that updates it, in which its key's address stands."""

_AGREEING = 4
"""Sites of one key that must call the same function before that is taken for its value."""

_RETURN0 = "__static_call_return0"
_CONDITIONAL_RETURN = "__static_call_return"
"""Where a conditional tail call goes whose key holds none (arch/x86/kernel/static_call.c, JCC)."""


@dataclass(frozen=True, slots=True)
class CallForms:
    """How a kernel writes static calls: its nop, its returns, and functions that are written out instead of called.

    ``inline`` has by a function's virtual address what its calls become.  ``forced`` is true where the kernel
    writes all sites, but no trampolines, once more after it has chosen its return thunk (``static_call_force_reinit``).
    ``enters`` gives the padding that a call of a function goes to, where calls are counted, else None;
    ``unpatched`` is the thunk that returns go to on disk.
    """

    bits: int
    nop: bytes
    return0: int | None
    inline: Mapping[int, tuple[bytes, ...]]
    thunk: int | None
    its: int | None
    forced: bool = False
    conditional: int | None = None
    enters: Callable[[int], int | None] = lambda function: None
    unpatched: int | None = None

    def of(self, site: Site, function: int, now: bytes, before: bytes) -> bytes:
        """The bytes of a site whose key holds ``function`` (0 for none).

        ``before`` are those on disk: a conditional jump keeps its condition; ``now`` chooses among equal forms.
        """
        detail = site.detail
        assert isinstance(detail, StaticCall)
        if not function:
            if not detail.tail:
                return self.nop
            if len(before) == JCC_LENGTH:
                return self._conditional(site, self.thunk or self.conditional or 0, before)
            late = returns.form_at(site.address, self.thunk, self.its, self.bits)
            # Before the mitigations were chosen the kernel wrote plain returns, and leaves them in trampolines.
            early = now == returns.RET and (site.address == detail.trampoline or not self.forced)
            return now if early else late
        if len(before) == JCC_LENGTH:
            return self._conditional(site, function, before)
        if not detail.tail and (padding := self.enters(function)) is not None:
            # __static_call_transform leads the call away before it looks for functions that it writes out.  Calls that
            # were written before calls are counted stay as they were, unless all are written once more.
            first = branch.near(branch.CALL, site.address, function, self.bits)
            last = branch.near(branch.CALL, site.address, padding, self.bits)
            return now if not self.forced and now in (first, *self.inline.get(function, ())) else last
        if not detail.tail and (forms := self.inline.get(function)):
            return now if now in forms else forms[0]
        opcode = branch.JMP if detail.tail else branch.CALL
        return branch.near(opcode, site.address, function, self.bits)

    def _conditional(self, site: Site, function: int, before: bytes) -> bytes:
        distance = function - site.address - JCC_LENGTH
        return before[:2] + (distance & 0xFFFFFFFF).to_bytes(4, "little")


def call_forms(boot: Boot) -> CallForms:
    """How a kernel writes static calls after this boot."""
    counted = callthunks.thunks_of(boot)

    def enters(function: int) -> int | None:
        return counted.entry(boot.image, function) if counted is not None else None

    inline: dict[int, tuple[bytes, ...]] = {}
    for row in evidence.call_forms(boot.image):
        if (function := boot.lookup(row["function"])) is not None:
            inline[function] = (*inline.get(function, ()), bytes.fromhex(row["code"]))
    return CallForms(
        boot.image.bits, five_byte_nop(boot.nops), boot.lookup(_RETURN0), inline,
        returns.thunk_of(boot), boot.lookup(returns.ITS),
        boot.lookup("static_call_force_reinit") is not None, boot.lookup(_CONDITIONAL_RETURN),
        enters, boot.lookup(returns.DEFAULT),
    )  # fmt: skip


class StaticCalls(LateFamily):
    """Calls and trampolines by what their keys hold."""

    family = "static_calls"

    def expect(self, ground: Ground, sites: Sites, live: Live) -> Tally:
        """See :class:`LateFamily`."""
        return expect(ground, sites, live.data, call_forms(live.boot))

    def states(self, site: Site, boot: Boot) -> tuple[list[State], tuple[str, ...]]:
        """See :class:`LateFamily`."""
        detail = site.detail
        assert isinstance(detail, StaticCall)
        if not detail.tail:
            listed = [State(five, f"{site.op} is none") for five in five_byte_nops(boot)]
            rows = evidence.call_forms(boot.image)
            listed += [State(bytes.fromhex(row["code"]), f"{site.op}: {row['says']}") for row in rows]
            return listed, ("static-call",)
        if site.length == JCC_LENGTH:
            return [], ("static-call",)
        listed = [State(returns.RET, f"{site.op} is none")]
        its = boot.lookup(returns.ITS)
        for name in returns.thunk_names(boot.rules):
            if (thunk := boot.lookup(name)) is not None:
                form = returns.form_at(site.address, thunk, its, boot.image.bits)
                listed.append(State(form, f"{site.op} is none: {name}"))
        return listed, ("static-call",)


def expect(ground: Ground, sites: Sequence[Site], running: Data | None, forms: CallForms) -> Tally:
    """Lay over the ground what each call and trampoline must be by its key."""
    tally = Tally()
    cause = ground.cause(StaticCalls.family)
    keys = _Keys(ground, running, forms)
    laid: list[tuple[int, bytes]] = []
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
        form = forms.of(site, function, now, ground.disk[at : at + site.length])
        if site.address == detail.trampoline and _means(booted, site.address, forms) == function and now == booted:
            form = booted
        laid.append((site.address, form))
        inline = function in forms.inline and not detail.tail
        tally.states["none" if not function else "written out" if inline else "function"] += 1
    ground.lay_all(laid, cause)
    return tally


def _means(code: bytes, address: int, forms: CallForms) -> int | None:
    """The function that a trampoline goes to; 0 where it returns."""
    target = branch.target_of(code, address, forms.bits)
    if code[0] == 0xC3 or (target is not None and target in (forms.thunk, forms.unpatched)):
        return 0
    return target


class _Keys:
    """What static-call keys hold now."""

    def __init__(self, ground: Ground, running: Data | None, forms: CallForms) -> None:
        self._ground = ground
        self._forms = forms
        self._running = running
        self._functions: dict[int, int | None] = {}
        self._agreed: dict[int, int] = {}
        image = ground.image
        # A key of a call that starts as none stands in .bss.
        self._data = [(s.address, s.end) for s in image.sections if s.write and s.alloc and not s.exec]

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
        if forms.return0 is not None and now in forms.inline.get(forms.return0, ()):
            return forms.return0
        if not key:
            return None
        if key in self._agreed:
            return self._agreed[key]
        if key not in self._functions:
            self._functions[key] = int.from_bytes(image.read(key, image.bits // 8), "little")
        return self._functions[key]

    def _by_code(self, running: Data, site: Site, now: bytes) -> int | None:
        """Without symbols: a word whose address stands beside the trampoline's, in code that updates both or in a
        structure (``tracepoint``, ``lsm_static_call``), that held on disk what the trampoline went to there, and that
        holds now what it goes to.

        Of 64-bit addresses the lower half is looked for: in code they are sign-extended immediates.
        """
        image = self._ground.image
        goes, went = (
            _means(now, site.address, self._forms),
            _means(image.read(site.address, 5), site.address, self._forms),
        )
        if goes is None or went is None:
            return None
        high = site.address & ~0xFFFFFFFF
        wanted = (site.address & 0xFFFFFFFF).to_bytes(4, "little")
        for data in self._ground.contents():
            at = data.find(wanted)
            while at >= 0:
                for near in range(max(0, at - _NEAR), min(len(data) - 4, at + _NEAR)):
                    key = high | int.from_bytes(data[near : near + 4], "little")
                    known = any(start <= key <= end - image.bits // 8 for start, end in self._data)
                    if known and _on_disk(image, key) == went and running.pointer(key) == goes:
                        return goes
                at = data.find(wanted, at + 1)
        return None


def _on_disk(image: Image, key: int) -> int:
    """What the word of a key holds in the image; 0 in a section that has no bytes there."""
    section = image.section_at(key)
    size = image.bits // 8
    return 0 if section is None or not section.file_size else int.from_bytes(image.read(key, size), "little")
