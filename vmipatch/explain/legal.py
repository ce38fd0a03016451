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
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from vmipatch.annotate import Scan, Site, scan
from vmipatch.annotate.family import AT_RUN_TIME
from vmipatch.annotate.site import Alternative
from vmipatch.explain.engine import EVIDENCE, text_of
from vmipatch.explain.late import LATE, State
from vmipatch.image import Image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.passes import PASSES, Boot, Checks, Choice, callthunks
from vmipatch.patch.passes import its as thunks
from vmipatch.patch.passes.retpolines import Retpolines
from vmipatch.patch.passes.returns import ITS, Returns
from vmipatch.patch.planner import refuse_findings
from vmipatch.patch.rules import Rules
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

MOST_COMBINED = 4096
"""Boots of one group of sites that are tried; real groups have some hundreds at most."""

_SEEDS = (0xFFFFFFFF, 0x01010101, 0x10101010, 0xA5A5A5A5)
"""Seeds that between them change every byte of a hash and of its negative."""

MANY_CPUS = 2
"""Stands for more than one."""

DOMAINS = {
    "ftrace-call": "E8 to ftrace_caller or ftrace_regs_caller, or to a trampoline that ftrace copies from them into "
    "memory outside the image, or to a direct-call trampoline registered with ftrace",
    "ftrace-jump": "E9 to a direct-call trampoline registered with ftrace to be jumped to",
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
    evidence = scan(image, EVIDENCE)
    refuse_findings(image, evidence)
    yield from within(image, rules_for(image, evidence, kernel).rules, evidence, [(text.address, text.end)])


def within(image: Image, rules: Rules, evidence: Scan, spans: Sequence[tuple[int, int]]) -> Iterator[Legal]:
    """The legal-patch set of stretches of text, each from a virtual address to another, by the rules of an era.

    ``evidence`` has the sites of :data:`EVIDENCE`.
    """
    late = scan(image, AT_RUN_TIME)
    refuse_findings(image, late)
    more = [family for family in rules.boot if family not in EVIDENCE]
    others = scan(image, more)
    refuse_findings(image, others)
    boot = Boot(image, rules, rules.nop_tables(image.bits)[0])
    # The calls of __fentry__ in .call_sites are mcount's, and never counted; the returns of trampolines whose static
    # calls start as none are those calls'.
    late_owned = {s.address for s in late.sites}
    boots = [
        s
        for s in (*evidence.sites, *others.sites)
        if s.address not in late_owned or s.family not in (callthunks.FAMILY, Returns.family)
    ]
    sites = (*boots, *callthunks.paddings(boot))

    def inside(site: Site) -> bool:
        return any(low <= site.address and site.end <= high for low, high in spans)

    yield from _Boots(image, rules, sites).entries(list(_groups(filter(inside, sites))))
    for site in late.sites:
        if inside(site):
            listed, patterns = LATE[site.family].states(site, boot)
            distinct = {State(image.read(site.address, site.length), "on disk").code: "on disk"}
            for state in listed:
                distinct.setdefault(state.code, state.cause)
            states = tuple(State(code, cause) for code, cause in distinct.items())
            yield Legal(site.address, site.length, (site.family,), states, patterns)


_Held = tuple[tuple[bytes, str, tuple[int, ...]], ...]
"""The fields of a group's states: the collector has no work with plain tuples, of which there are a million."""


class _Shape(NamedTuple):
    """What groups of sites have in common that are tried together: passes, in their order, and choices."""

    passes: tuple[str, ...]
    dimensions: tuple[tuple[Choice, ...], ...]


class _Boots:
    """The states of groups of boot's sites: what each may be made of, whatever the machine.

    A pass is made for a whole table, and groups share no bytes: all groups that depend on the same choices go through
    a boot together.
    """

    def __init__(self, image: Image, rules: Rules, sites: Sequence[Site]) -> None:
        self.image = image
        self.rules = rules
        self.its = image.symbols.lookup(ITS) is not None
        self.words = rules.feature_words()[1]
        self._sites = sorted(sites, key=lambda s: s.address)
        self._starts = [s.address for s in self._sites]
        self._walked = {family: (family, *PASSES[family].also(rules)) for family in rules.boot}
        self._alone: dict[str, _Shape] = {}

    def entries(self, groups: Sequence[Sequence[Site]]) -> Iterator[Legal]:
        """The entry of each group: its bytes after every boot that makes a difference to them."""
        together: dict[_Shape, list[int]] = {}
        members: list[Sequence[Site]] = []
        for index, group in enumerate(groups):
            members.append(self._members(group))
            together.setdefault(self._shape(members[-1]), []).append(index)
        tried: list[_Held] = [()] * len(groups)
        for shape, indices in together.items():
            found = self._tried(shape, [groups[i] for i in indices], [members[i] for i in indices])
            for index, held in zip(indices, found, strict=True):
                tried[index] = held
        for group, held in zip(groups, tried, strict=True):
            start, length = _span(group)
            families = (group[0].family,) if len(group) == 1 else tuple(sorted({s.family for s in group}))
            patterns = ("its-thunk",) if self.its and any(s.family == Retpolines.family for s in group) else ()
            yield Legal(start, length, families, tuple(State(*state) for state in held), patterns)

    def _members(self, group: Sequence[Site]) -> Sequence[Site]:
        """The sites of a group and those inside its replacements: earlier passes patch them, and they are copied so."""
        inside: list[Site] = []
        for site in group:
            if isinstance(site.detail, Alternative) and site.detail.replacement_length:
                start = site.detail.replacement
                low, high = (bisect_left(self._starts, at) for at in (start, start + site.detail.replacement_length))
                inside += self._sites[low:high]
        return list(dict.fromkeys((*group, *inside))) if inside or len(group) > 1 else group

    def _shape(self, members: Sequence[Site]) -> _Shape:
        alone = members[0].family if len(members) == 1 and not isinstance(members[0].detail, Alternative) else None
        if alone is not None and alone in self._alone:
            return self._alone[alone]
        here = self._by_pass(members)
        dimensions: list[tuple[Choice, ...]] = []
        for family, sites in here.items():
            for choices in map(tuple, PASSES[family].choices(self.image, sites, self.rules)):
                if choices not in dimensions:
                    dimensions.append(choices)
        shape = _Shape(tuple(here), tuple(dimensions))
        if alone is not None:
            self._alone[alone] = shape
        return shape

    def _by_pass(self, sites: Iterable[Site]) -> dict[str, list[Site]]:
        """What each pass of the boot walks of some sites, for those that walk any."""
        by_family: dict[str, list[Site]] = {}
        for site in sites:
            by_family.setdefault(site.family, []).append(site)
        here = {
            family: [s for one in walked for s in by_family.get(one, ())] for family, walked in self._walked.items()
        }
        return {family: walked for family, walked in here.items() if walked}

    def _tried(
        self, shape: _Shape, groups: Sequence[Sequence[Site]], members: Sequence[Sequence[Site]]
    ) -> Iterator[_Held]:
        """The states of each of several groups of one shape."""
        here = self._by_pass(dict.fromkeys(s for group in members for s in group))
        spans = [_span(group) for group in groups]
        none: list[tuple[int, ...]] = [()] * len(groups)
        causes, codes, frees = ["on disk"], [Text(self.image).read_spans(spans)], [none]
        for combined in _combinations(shape.dimensions):
            boot = self._boot(combined)
            causes.append(", ".join(c.says for c in combined if c.says))
            codes.append(self._run(here, boot, spans))
            frees.append(self._free(here, boot, boot.checks, codes[-1], spans) if boot.checks is not None else none)
        for group, column, free in zip(groups, zip(*codes, strict=True), zip(*frees, strict=True), strict=True):
            states: dict[tuple[bytes, tuple[int, ...]], str] = {}
            for key, cause in zip(zip(column, free, strict=True), causes, strict=True):
                if key not in states:
                    states[key] = cause or ", ".join(sorted({s.op for s in group}))
            yield tuple((code, cause, free) for (code, free), cause in states.items())

    def _free(
        self,
        here: dict[str, list[Site]],
        boot: Boot,
        checks: Checks,
        codes: Sequence[bytes],
        spans: Sequence[tuple[int, int]],
    ) -> list[tuple[int, ...]]:
        """The offsets of bytes that depend on the seed of a boot: any value may stand there."""
        found: list[set[int]] = [set() for _ in codes]
        for seed in _SEEDS:
            others = self._run(here, replace(boot, checks=checks._replace(seed=seed)), spans)
            for offsets, code, other in zip(found, codes, others, strict=True):
                if other != code:
                    offsets.update(i for i, (a, b) in enumerate(zip(code, other, strict=True)) if a != b)
        return [tuple(sorted(offsets)) for offsets in found]

    def _boot(self, choices: Iterable[Choice]) -> Boot:
        words = [0] * self.words
        cpus, thunk, checks = MANY_CPUS, None, None
        nops = self.rules.nop_tables(self.image.bits)[0]
        for choice in choices:
            for feature, on in choice.features:
                words += [0] * ((feature >> 5) + 1 - len(words))
                bit = 1 << (feature & 31)
                words[feature >> 5] = words[feature >> 5] | bit if on else words[feature >> 5] & ~bit
            cpus = choice.cpus or cpus
            nops = choice.nops or nops
            thunk = choice.return_thunk or thunk
            checks = choice.checks or checks
        native = Native(Cpu("any", None, None, None, None, tuple(words)), cpus)
        return Boot(self.image, self.rules, nops, native, thunk, checks, thunks.Thunks.of(self.image))

    def _run(self, here: dict[str, list[Site]], boot: Boot, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """What a boot makes of stretches of text."""
        text = Text(self.image)
        for family, sites in here.items():
            if PASSES[family].applies(boot):
                for _ in PASSES[family].patches(text, sites, boot):
                    pass
        return text.read_spans(spans)


def _span(group: Sequence[Site]) -> tuple[int, int]:
    """The virtual address and the length of what a group covers."""
    start = min(s.address for s in group)
    return start, max(s.end for s in group) - start


def _combinations(dimensions: Sequence[Sequence[Choice]]) -> Iterator[tuple[Choice, ...]]:
    """One choice of each dimension, every way; of too many ways those with all first or all last choices."""
    ways = 1
    for choices in dimensions:
        ways *= len(choices)
    if ways <= MOST_COMBINED:
        yield from product(*dimensions)
        return
    for turn in range(max(map(len, dimensions))):
        yield tuple(choices[min(turn, len(choices) - 1)] for choices in dimensions)


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


def matches(entry: Legal, code: bytes, bits: int, text: tuple[int, int]) -> str | None:
    """The cause under which ``code`` may stand at an entry, or None; patterns by their opcode and domain."""
    for state in entry.states:
        if len(code) != len(state.code):
            continue
        if _masked(state.code, state.free) == _masked(code, state.free):
            return state.cause
        if "its-thunk" in entry.patterns and _branches(state.code):
            free = (*state.free, *range(len(code) - 4, len(code)))
            if _masked(state.code, free) == _masked(code, free):
                return "its-thunk"
    for pattern in entry.patterns:
        if pattern == "static-call" and (code[:1] in (b"\xe8", b"\xe9") or _same_condition(entry, code)):
            return pattern
        if pattern == "runtime-const":
            return pattern
        if pattern == "ftrace-jump" and code[:1] == b"\xe9":
            return pattern
        if pattern == "ftrace-call" and code[:1] == b"\xe8":
            return pattern
    return None


def _branches(code: bytes) -> bool:
    """Whether a site ends in a direct branch of 32 bits."""
    return code[-5:-4] in (b"\xe8", b"\xe9") or (code[-6:-5] == b"\x0f" and code[-5:-4] >= b"\x80")


def _same_condition(entry: Legal, code: bytes) -> bool:
    """Whether a conditional tail call has kept its condition."""
    return code[:1] == b"\x0f" and any(s.code[:2] == code[:2] and len(s.code) == len(code) for s in entry.states)


def _masked(code: bytes, free: Sequence[int]) -> bytes:
    return bytes(0 if i in free else byte for i, byte in enumerate(code)) if free else code


def summary(entries: Iterable[Legal]) -> Counter[str]:
    """How many entries there are of each family."""
    return Counter(family for entry in entries for family in entry.families)


__all__ = ["ANYWHERE", "DOMAINS", "Legal", "State", "legal", "matches", "summary", "within"]
