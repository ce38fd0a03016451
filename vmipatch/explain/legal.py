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

from vmipatch.annotate import Scan, Site, scan
from vmipatch.annotate.family import AT_RUN_TIME
from vmipatch.annotate.site import Alternative
from vmipatch.explain.engine import EVIDENCE, text_of
from vmipatch.explain.late import LATE, State
from vmipatch.image import Image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.passes import PASSES, Boot, Choice, callthunks
from vmipatch.patch.passes import its as thunks
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

    maker = _Boots(image, rules, sites)
    for group in _groups(s for s in sites if inside(s)):
        yield maker.group(group)
    for site in late.sites:
        if inside(site):
            listed, patterns = LATE[site.family].states(site, boot)
            distinct = {State(image.read(site.address, site.length), "on disk").code: "on disk"}
            for state in listed:
                distinct.setdefault(state.code, state.cause)
            states = tuple(State(code, cause) for code, cause in distinct.items())
            yield Legal(site.address, site.length, (site.family,), states, patterns)


class _Boots:
    """The states of groups of boot's sites: what each may be made of, whatever the machine."""

    def __init__(self, image: Image, rules: Rules, sites: Sequence[Site]) -> None:
        self.image = image
        self.rules = rules
        self.its = image.symbols.lookup(ITS) is not None
        self.words = rules.feature_words()[1]
        self._sites = sorted(sites, key=lambda s: s.address)
        self._starts = [s.address for s in self._sites]
        self._counting: list[tuple[str, Boot]] | None = None

    def group(self, group: Sequence[Site]) -> Legal:
        """Sites that share bytes: their bytes after every boot that makes a difference to them."""
        if len(group) == 1 and group[0].family == callthunks.FAMILY:
            return self._call(group[0])
        start, end = min(s.address for s in group), max(s.end for s in group)
        members = list(group)
        for site in group:
            if isinstance(site.detail, Alternative):
                members += self._within(site.detail.replacement, site.detail.replacement_length)
        members = list(dict.fromkeys(members))
        here = {
            family: [s for s in members if s.family in (family, *PASSES[family].also(self.rules))]
            for family in self.rules.boot
        }
        here = {family: sites for family, sites in here.items() if sites}
        dimensions: list[list[Choice]] = []
        for family, sites in here.items():
            for choices in PASSES[family].choices(self.image, sites, self.rules):
                if choices not in dimensions:
                    dimensions.append(choices)
        found: dict[tuple[bytes, tuple[int, ...]], str] = {(self.image.read(start, end - start), ()): "on disk"}
        for combined in _combinations(dimensions):
            boot = self._boot(combined)
            code = self._run(here, boot, start, end)
            says = ", ".join(c.says for c in combined if c.says)
            free = self._free(here, boot, code, start) if boot.checks is not None else ()
            found.setdefault((code, free), says or ", ".join(sorted({s.op for s in group})))
        patterns = ("its-thunk",) if "retpoline_sites" in here and self.its else ()
        listed = tuple(State(code, cause, free) for (code, free), cause in found.items())
        return Legal(start, end - start, tuple(sorted({s.family for s in group})), listed, patterns)

    def _call(self, site: Site) -> Legal:
        """A site that only call depth tracking writes, of which there are some hundred thousand."""
        if self._counting is None:
            choices = PASSES[site.family].choices(self.image, [site], self.rules)
            self._counting = [(c.says, self._boot((c,))) for c in choices[0]] if choices else []
        found = {self.image.read(site.address, site.length): "on disk"}
        for says, boot in self._counting:
            found.setdefault(self._run({site.family: [site]}, boot, site.address, site.end), says)
        states = tuple(State(code, cause) for code, cause in found.items())
        return Legal(site.address, site.length, (site.family,), states, ())

    def _free(self, here: dict[str, list[Site]], boot: Boot, code: bytes, start: int) -> tuple[int, ...]:
        """The offsets of bytes that depend on the seed of a boot: any value may stand there."""
        assert boot.checks is not None
        found: set[int] = set()
        for seed in _SEEDS:
            other = self._run(here, replace(boot, checks=boot.checks._replace(seed=seed)), start, start + len(code))
            found |= {i for i, (a, b) in enumerate(zip(code, other, strict=True)) if a != b}
        return tuple(sorted(found))

    def _within(self, start: int, length: int) -> list[Site]:
        """Sites inside a replacement: earlier passes patch them, and it is copied as they leave it."""
        low, high = bisect_left(self._starts, start), bisect_left(self._starts, start + length)
        return self._sites[low:high]

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

    def _run(self, here: dict[str, list[Site]], boot: Boot, start: int, end: int) -> bytes:
        text = Text(self.image)
        for family, sites in here.items():
            if PASSES[family].applies(boot):
                for _ in PASSES[family].patches(text, sites, boot):
                    pass
        return text.read(start, end - start)


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
