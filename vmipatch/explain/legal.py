"""The legal-patch set: for every site, every byte string that this kernel may ever hold there, and its cause.

What a hypervisor that guards kernel text needs before the kernel runs.  Boot's
passes are run over each group of sites that share bytes, for every choice of
the CPU features that the group depends on.  States without a bound are patterns,
each with its domain.  Imports annotate, patch and its sisters in ``explain/``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from vmipatch.annotate import Scan, Site, scan
from vmipatch.annotate.features import feature_name, numbers
from vmipatch.annotate.site import Alternative, JumpLabel, RuntimeConst, StaticCall
from vmipatch.explain import states
from vmipatch.explain.engine import BOOT, RUN_TIME, text_of
from vmipatch.image import Image
from vmipatch.isa import nops as nop_tables
from vmipatch.patch import alternatives, endbr, locks, paravirt, retpolines, returns
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.planner import refuse_findings
from vmipatch.patch.rules import Rules, choose
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

MOST_FEATURES = 8
"""Features of one group of sites that are tried in every combination; real groups have four at most."""

THUNKS = (
    "__x86_return_thunk", "its_return_thunk", "retbleed_return_thunk", "srso_return_thunk", "srso_alias_return_thunk",
    "call_depth_return_thunk", "__x86_return_skl",
)  # fmt: skip
"""Functions that x86_return_thunk may point at (arch/x86/kernel/cpu/bugs.c, 5.19 to 6.12)."""

DOMAINS = {
    "ftrace-call": "E8 to ftrace_caller or ftrace_regs_caller, or to a trampoline that ftrace copies from them into "
    "memory outside the image, or to a direct-call trampoline registered with ftrace",
    "static-call": "E8 (a tail call and a trampoline: E9) to any function that the kernel stores in the site's key",
    "runtime-const": "any value: that which the variable named by the table gets while the kernel starts",
    "its-thunk": "E9 or E8 to a thunk of its own for the register, in memory outside the image (INDIRECT_THUNK_ITS)",
}
"""Patterns: states whose target has no bound."""

ANYWHERE = (
    ("kprobe", "CC at the start of any instruction that a kprobe may be set on"),
    ("optimised kprobe", "E9 at such an instruction, to a detour outside the image; only its five bytes change"),
    (
        "breakpoint while patching",
        "CC at the first byte of any site, while the kernel replaces it (text_poke_bp, 3.12 on)",
    ),
)
"""What may stand outside the sites."""


class State(NamedTuple):
    """One byte string that a site may hold, and when."""

    code: bytes
    cause: str


@dataclass(frozen=True, slots=True)
class Legal:
    """``length`` bytes at virtual ``address``: their states, and names of :data:`DOMAINS` that they may match too."""

    address: int
    length: int
    families: tuple[str, ...]
    states: tuple[State, ...]
    patterns: tuple[str, ...]


def legal(image: Image, *, kernel: tuple[int, ...] | None = None) -> Iterator[Legal]:
    """The legal-patch set of ``.text``, boot's sites first; sites that share bytes are one entry.

    Addresses are virtual, as linked: a kernel that KASLR has moved holds its
    absolute fields moved as well.
    """
    text = text_of(image)
    found, late = scan(image, BOOT), scan(image, RUN_TIME)
    for each in (found, late):
        refuse_findings(image, each)
    rules, _ = choose(kernel or image.version, found.tables, image.path)
    maker = _Boot(image, rules, found)
    for group in _groups(s for s in found.sites if text.address <= s.address and s.end <= text.end):
        yield maker.group(group)
    here = [s for s in late.sites if text.address <= s.address and s.end <= text.end]
    yield from _run_time(image, rules, here, maker)


class _Boot:
    """The states of groups of boot's sites."""

    def __init__(self, image: Image, rules: Rules, found: Scan) -> None:
        self.image = image
        self.rules = rules
        self.nops = _nop_tables(rules, image.bits)
        self.its = image.symbols.lookup("its_return_thunk")
        self.thunks = {name: a for name in THUNKS if (a := image.symbols.lookup(name)) is not None}
        self.words = rules.feature_words()[1]
        self._outside = sorted((s for s in found.sites), key=lambda s: s.address)
        self._starts = [s.address for s in self._outside]
        self._known = numbers()

    def group(self, group: Sequence[Site]) -> Legal:
        start, end = group[0].address, max(s.end for s in group)
        members = list(group)
        for site in group:
            if isinstance(site.detail, Alternative):
                members += self._within(site.detail.replacement, site.detail.replacement_length)
        members = list(dict.fromkeys(members))
        families = {s.family for s in members}
        features = sorted({s.detail.feature for s in members if isinstance(s.detail, Alternative)})
        choices: list[tuple[bool, ...]]
        if len(features) <= MOST_FEATURES:
            choices = list(product((False, True), repeat=len(features)))
        else:
            choices = [(value,) * len(features) for value in (False, True)]
        found: dict[bytes, str] = {self.image.read(start, end - start): "on disk"}
        thunks: list[tuple[str, int | None]] = [("", None)]
        if "return_sites" in families:
            thunks = [("returns", None), *((f"returns through {n}", a) for n, a in self.thunks.items())]
        modes: list[tuple[str, tuple[str, ...]]] = [("", ())]
        if "retpoline_sites" in families:
            modes = [("retpoline", ("RETPOLINE",)), ("no retpoline", ()), ("LFENCE", ("RETPOLINE_LFENCE",))]
        counts = (1, 2) if "smp_locks" in families else (2,)
        tables = self.nops if families & {"altinstructions", "parainstructions"} else self.nops[:1]
        for choice, (thunk_name, thunk), (mode, extra), count, nops in product(choices, thunks, modes, counts, tables):
            cpu = self._cpu(features, choice, extra, thunk is not None)
            code = self._run(members, Native(cpu, count), thunk, nops, start, end)
            says = [("" if on else "no ") + feature_name(f) for f, on in zip(features, choice, strict=True)]
            says += [x for x in (thunk_name, mode, "one CPU" if count == 1 else "") if x]
            found.setdefault(code, ", ".join(says) or ", ".join(sorted({s.op for s in group})))
        patterns = ("its-thunk",) if "retpoline_sites" in families and self.its is not None else ()
        listed = tuple(State(code, cause) for code, cause in found.items())
        return Legal(start, end - start, tuple(sorted({s.family for s in group})), listed, patterns)

    def _within(self, start: int, length: int) -> list[Site]:
        """Sites inside a replacement: earlier passes patch them, and it is copied as they leave it."""
        i = bisect_left(self._starts, start)
        result = []
        while i < len(self._outside) and self._starts[i] < start + length:
            result.append(self._outside[i])
            i += 1
        return result

    def _cpu(self, features: Sequence[int], choice: Sequence[bool], extra: Iterable[str], thunk: bool) -> Cpu:
        words = [0] * max(self.words, *(f // 32 + 1 for f in (*features, 0)))
        chosen = [f for f, on in zip(features, choice, strict=True) if on]
        chosen += [self._known[name] for name in extra]
        if thunk:
            chosen.append(self._known["RETHUNK"])
        for feature in chosen:
            words[feature >> 5] |= 1 << (feature & 31)
        return Cpu("any", None, None, None, None, tuple(words))

    def _run(
        self,
        members: Sequence[Site],
        native: Native,
        thunk: int | None,
        nops: nop_tables.NopTable,
        start: int,
        end: int,
    ) -> bytes:
        text = Text(self.image)
        rules = self.rules
        for family in rules.boot:
            sites = [s for s in members if s.family == family]
            if not sites:
                continue
            if family == "parainstructions":
                list(paravirt.plan(text, sites, rules, nops))
            elif family == "altinstructions":
                list(alternatives.plan(text, sites, rules, native, nops))
            elif family == "smp_locks":
                list(locks.plan(text, sites, rules, native))
            elif family == "retpoline_sites":
                list(retpolines.plan(text, sites, rules, native.cpu, nops))
            elif family == "return_sites":
                list(returns.plan(text, sites, thunk, self.its))
            elif family == "endbr_seal":
                list(endbr.plan(text, sites, rules))
        return text.read(start, end - start)


def _nop_tables(rules: Rules, bits: int) -> list[nop_tables.NopTable]:
    """Every nop table that the kernel may choose, on whatever CPU."""
    names = [row["table"] for row in rules.spec["nops"] if row.get("bits", bits) == bits]
    return [nop_tables.table(name) for name in dict.fromkeys(names)]


def _groups(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """Sites that share bytes, together, in table order within a group; groups by address."""
    kept = list(sites)
    order = {id(s): i for i, s in enumerate(kept)}
    group: list[Site] = []
    end = -1
    for site in sorted(kept, key=lambda s: (s.address, -s.length)):
        if group and site.address >= end:
            yield sorted(group, key=lambda s: order[id(s)]) if len(group) > 1 else group
            group = []
            end = -1
        group.append(site)
        end = max(end, site.end)
    if group:
        yield sorted(group, key=lambda s: order[id(s)]) if len(group) > 1 else group


def _run_time(image: Image, rules: Rules, sites: Sequence[Site], maker: _Boot) -> Iterator[Legal]:
    nops = maker.nops
    fives = list(dict.fromkeys(states.five_byte_nop(table) for table in nops))
    spec = rules.section("static_calls")
    return0 = tuple(bytes.fromhex(x) for x in spec.get("return0", ["2E2E2E31C0"]))
    for site in sites:
        disk = State(image.read(site.address, site.length), "on disk")
        detail = site.detail
        listed = [disk]
        patterns: tuple[str, ...] = ()
        if isinstance(detail, JumpLabel):
            for taken in (False, True):
                name = f"{site.op} is {'on' if taken != detail.likely else 'off'}"
                for table, five in ((t, states.five_byte_nop(t)) for t in nops):
                    listed.append(State(states.label_form(site, taken, five, table), name))
        elif isinstance(detail, StaticCall):
            patterns = ("static-call",)
            if detail.tail:
                listed.append(State(returns.RET, f"{site.op} is none"))
                for name, thunk in maker.thunks.items():
                    form = returns.form_at(site.address, thunk, maker.its, image.bits)
                    listed.append(State(form, f"{site.op} is none: {name}"))
            else:
                listed += [State(five, f"{site.op} is none") for five in fives]
                listed += [State(code, f"{site.op} returns 0") for code in return0]
        elif isinstance(detail, RuntimeConst):
            patterns = ("runtime-const",)
        else:
            listed += [State(five, "not traced") for five in fives]
            patterns = ("ftrace-call",)
        distinct = {state.code: state for state in reversed(listed)}
        yield Legal(site.address, site.length, (site.family,), tuple(reversed(distinct.values())), patterns)


def matches(entry: Legal, code: bytes, bits: int, text: tuple[int, int]) -> str | None:
    """The cause under which ``code`` may stand at an entry, or None; patterns by their opcode and domain."""
    for state in entry.states:
        if state.code == code:
            return state.cause
    for pattern in entry.patterns:
        if pattern == "static-call" and code[:1] in (b"\xe8", b"\xe9"):
            return pattern
        if pattern == "runtime-const":
            return pattern
        if pattern == "ftrace-call" and code[:1] == b"\xe8":
            return pattern
    return None


def summary(entries: Iterable[Legal]) -> Counter[str]:
    """How many entries there are of each family."""
    return Counter(family for entry in entries for family in entry.families)


__all__ = ["ANYWHERE", "DOMAINS", "Legal", "State", "legal", "matches", "summary"]
