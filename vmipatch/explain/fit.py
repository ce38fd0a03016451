"""What the text itself says of the machine: number of CPUs, return thunk, CPU features.  For dumps without data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from vmipatch.annotate import Scan, Site
from vmipatch.annotate.features import numbers
from vmipatch.annotate.site import Alternative
from vmipatch.explain.ground import Ground
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.planner import Boot, plan
from vmipatch.patch.rules import Rules
from vmipatch.patch.target import Native

_LOCK = 0xF0


def cpus(ground: Ground, found: Scan, rules: Rules) -> tuple[int, int]:
    """One CPU or two (meaning more), by what most LOCK prefixes have become; and how many say so."""
    byte = rules.section("locks").get("byte", 0x3E)
    votes: Counter[int] = Counter()
    for site in found.sites:
        if site.family == "smp_locks" and ground.base <= site.address < ground.end:
            votes[ground.found[site.address - ground.base]] += 1
    return (1, votes[byte]) if votes[byte] > votes[_LOCK] else (2, votes[_LOCK])


def return_thunk(ground: Ground, found: Scan) -> int | None:
    """The function that most return sites jump to; None where they do not."""
    targets: Counter[int | None] = Counter()
    for site in _inside(ground, found, "return_sites"):
        targets[_target(ground, site)] += 1
    targets.pop(None, None)
    return targets.most_common(1)[0][0] if targets else None


def features(
    image: Image, ground: Ground, found: Scan, rules: Rules, count: int, kernel: tuple[int, ...] | None
) -> tuple[Cpu, str]:
    """The features under which most alternatives are as they are found, and how many those are.

    Sites that depend on one feature vote for it; then each feature that is
    still open, or that others depend on too, is tried both ways.
    """
    _, most = rules.feature_words()
    known = numbers()
    empty = Cpu("best fit", None, None, None, None, (0,) * most, complete=True)
    words = dict.fromkeys((f for s in found.sites if isinstance(s.detail, Alternative) and (f := s.detail.feature) < most * 32), False)
    returns = list(_inside(ground, found, "return_sites"))
    jumps = sum(ground.found[s.address - ground.base] == branch.JMP for s in returns)
    words[known["RETHUNK"]] = jumps * 4 > len(returns) > 0
    kept = [s for s in _inside(ground, found, "retpoline_sites")]
    same = sum(ground.found[s.address - ground.base : s.end - ground.base] == ground.disk[s.address - ground.base : s.end - ground.base] for s in kept)
    words[known["RETPOLINE"]] = bool(kept) and same * 2 > len(kept)
    thunk = Boot(return_thunk(ground, found), image.symbols.lookup("its_return_thunk"))
    groups = _clusters([s for s in found.sites if s.family == "altinstructions" and ground.base <= s.address < ground.end])
    wanted = {s.address for group in groups for s in group}
    part = replace(found, sites=tuple(s for s in found.sites if s.family != "smp_locks" and _touches(s, wanted, groups)))

    def right(choice: dict[int, bool]) -> dict[int, int]:
        """Bytes of each cluster that are as found, by the cluster's first address."""
        planned = plan(image, part, Native(_with(empty, choice), count), kernel=kernel, boot=thunk)
        laid: dict[int, int] = {}
        for patch in planned.patches:
            for i, byte in enumerate(patch.new):
                laid[patch.address + i] = byte
        result = {}
        for group in groups:
            start, end = group[0].address, max(s.end for s in group)
            result[start] = sum(
                laid.get(a, ground.disk[a - ground.base]) == ground.found[a - ground.base] for a in range(start, end)
            )
        return result

    off, on = right(words), right({f: f not in (known["RETHUNK"], known["RETPOLINE"]) or v for f, v in words.items()})
    votes: Counter[int] = Counter()
    for group in groups:
        used = {s.detail.feature for s in group if isinstance(s.detail, Alternative)}
        if len(used) == 1:
            votes[used.pop()] += on[group[0].address] - off[group[0].address]
    fixed = (known["RETHUNK"], known["RETPOLINE"])
    for feature, vote in votes.items():
        if feature in words and feature not in fixed:
            words[feature] = vote > 0
    best = sum(right(words).values())
    open_features = [f for f in words if f not in fixed and not votes[f]]
    for feature in open_features:
        trial = words | {feature: not words[feature]}
        score = sum(right(trial).values())
        if score > best:
            words, best = trial, score
    total = sum(max(s.end for s in g) - g[0].address for g in groups)
    return _with(empty, words), f"{best} of {total} bytes of alternatives agree"


def _with(cpu: Cpu, choice: dict[int, bool]) -> Cpu:
    words = list(cpu.words)
    for feature, on in choice.items():
        if on and feature >> 5 < len(words):
            words[feature >> 5] |= 1 << (feature & 31)
    return replace(cpu, words=tuple(words))


def _clusters(sites: list[Site]) -> list[list[Site]]:
    """Sites that share bytes, together; by address."""
    groups: list[list[Site]] = []
    end = -1
    for site in sorted(sites, key=lambda s: s.address):
        if site.address < end:
            groups[-1].append(site)
        else:
            groups.append([site])
        end = max(end, site.end)
    return groups


def _touches(site: Site, wanted: set[int], groups: list[list[Site]]) -> bool:
    return site.family == "altinstructions" or site.address in wanted or site.family == "parainstructions"


def _inside(ground: Ground, found: Scan, family: str) -> list[Site]:
    return [s for s in found.sites if s.family == family and ground.base <= s.address and s.end <= ground.end]


def _target(ground: Ground, site: Site) -> int | None:
    at = site.address - ground.base
    code = bytes(ground.found[at : at + 5])
    return branch.target_of(code, site.address, ground.image.bits) if code[0] == branch.JMP else None
