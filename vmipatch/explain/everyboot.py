"""Every boot that makes a difference to a site: the states that the legal-patch set has for what the boot writes.

Imports annotate, patch and its sisters in ``explain/``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from vmipatch.annotate import Site
from vmipatch.annotate.site import Alternative
from vmipatch.explain.fields import Fields
from vmipatch.explain.late import Move, State
from vmipatch.image import Image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import PASSES, Boot, Checks, Choice
from vmipatch.patch.passes import its as thunks
from vmipatch.patch.patch import Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

MOST_COMBINED = 4096
"""Boots of one group of sites that are tried; real groups have some hundreds at most."""

_SEEDS = (0xFFFFFFFF, 0x01010101, 0x10101010, 0xA5A5A5A5)
"""Seeds that between them change every byte of a hash and of its negative."""

MANY_CPUS = 2
"""Stands for more than one."""

_Held = tuple[tuple[bytes, str, tuple[int, ...], tuple[Move, ...]], ...]
"""The fields of a group's states: the collector has no work with plain tuples, of which there are a million."""


class _Shape(NamedTuple):
    """What groups of sites have in common that are tried together: passes, in their order, and choices."""

    passes: tuple[str, ...]
    dimensions: tuple[tuple[Choice, ...], ...]


class EveryBoot:
    """The states of groups of boot's sites: what each may be made of, whatever the machine.

    A pass is made for a whole table, and groups share no bytes: all groups that depend on the same choices go through
    a boot together.
    """

    def __init__(self, image: Image, rules: Rules, sites: Sequence[Site]) -> None:
        self.image = image
        self.rules = rules
        self.words = rules.feature_words()[1]
        self._sites = sorted(sites, key=lambda s: s.address)
        self._starts = [s.address for s in self._sites]
        self._walked = {family: (family, *PASSES[family].also(rules)) for family in rules.boot}
        self._alone: dict[str, _Shape] = {}

    def states(self, groups: Sequence[Sequence[Site]]) -> Iterator[tuple[State, ...]]:
        """The states of each group, in ascending order of addresses: its bytes after every boot that changes them."""
        spans = [span(group) for group in groups]
        fields = Fields(self.image, spans)
        members = [self._members(group) for group in groups]
        together: dict[_Shape, list[int]] = {}
        for index, sites in enumerate(members):
            together.setdefault(self._shape(sites), []).append(index)
        tried: list[_Held] = [()] * len(groups)
        for shape, indices in together.items():
            here = [(groups[i], spans[i], members[i]) for i in indices]
            for index, held in zip(indices, self._tried(shape, here, fields), strict=True):
                tried[index] = held
        return (tuple(State(*state) for state in held) for held in tried)

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
        self,
        shape: _Shape,
        several: Sequence[tuple[Sequence[Site], tuple[int, int], Sequence[Site]]],
        fields: Fields,
    ) -> Iterator[_Held]:
        """The states of each of several groups of one shape, which come with their places and members."""
        groups, spans = [group for group, _, _ in several], [place for _, place, _ in several]
        here = self._by_pass(dict.fromkeys(s for _, _, members in several for s in members))
        none: list[tuple[int, ...]] = [()] * len(groups)
        causes, codes, frees = ["on disk"], [Text(self.image).read_spans(spans)], [none]
        still: list[tuple[Move, ...]] = [()] * len(groups)
        moves = [fields.after((), spans, still)]
        for combined in _combinations(shape.dimensions):
            boot = self._boot(combined)
            code, patches = self._run(here, boot, spans)
            causes.append(", ".join(c.says for c in combined if c.says))
            codes.append(code)
            frees.append(self._free(here, boot, boot.checks, code, spans) if boot.checks is not None else none)
            moves.append(fields.after(patches, spans, still))
        rows = (zip(*column, strict=True) for column in zip(codes, frees, moves, strict=True))
        for group, row in zip(groups, zip(*rows, strict=True), strict=True):
            states: dict[tuple[bytes, tuple[int, ...], tuple[Move, ...]], str] = {}
            for key, cause in zip(row, causes, strict=True):
                if key not in states:
                    states[key] = cause or ", ".join(sorted({s.op for s in group}))
            yield tuple((code, cause, free, move) for (code, free, move), cause in states.items())

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
            others, _ = self._run(here, replace(boot, checks=checks._replace(seed=seed)), spans)
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

    def _run(
        self, here: dict[str, list[Site]], boot: Boot, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[bytes], list[Patch]]:
        """What a boot makes of stretches of text, and by which patches."""
        text = Text(self.image)
        patches: list[Patch] = []
        for family, sites in here.items():
            if PASSES[family].applies(boot):
                patches += PASSES[family].patches(text, sites, boot)
        return text.read_spans(spans), patches


def span(group: Sequence[Site]) -> tuple[int, int]:
    """The virtual address and the length of what a group covers."""
    if len(group) == 1:
        return group[0].address, group[0].length
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


def groups_of(sites: Iterable[Site]) -> Iterator[list[Site]]:
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
