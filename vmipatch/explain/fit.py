"""What the text itself says of the machine: number of CPUs, return thunk, CPU features.  For dumps without data."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import replace

from vmipatch.annotate import Scan, Site
from vmipatch.annotate.family import AT_BOOT
from vmipatch.annotate.site import Alternative
from vmipatch.explain.ground import Ground
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import retpolines
from vmipatch.patch.planner import Seen, boot_plan
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
    empty = Cpu("best fit", None, None, None, None, (0,) * most, complete=True)
    used_by = (s.detail.feature for s in found.sites if isinstance(s.detail, Alternative))
    words = dict.fromkeys((f for f in used_by if f < most * 32), False)
    returns = list(_inside(ground, found, "return_sites"))
    jumps = sum(_target(ground, s) is not None for s in returns)
    fixed: dict[int, bool] = {}
    if returns:
        fixed[_bit(rules, "RETHUNK")] = jumps * 4 > len(returns)
    kept = _inside(ground, found, "retpoline_sites")
    if kept:
        fixed[_bit(rules, "RETPOLINE")] = sum(_is_retpoline(ground, s) for s in kept) * 2 > len(kept)
    fixed[_bit(rules, "ALWAYS")] = True
    words |= fixed
    thunk = return_thunk(ground, found)
    groups = _clusters(_inside(ground, found, "altinstructions"))
    others = sorted(
        (s for s in found.sites if s.family not in ("altinstructions", "smp_locks")), key=lambda s: s.address
    )
    starts = [s.address for s in others]

    def right(choice: dict[int, bool], some: list[list[Site]]) -> list[int]:
        """Bytes of each cluster that are as found."""
        members = {id(s) for group in some for s in group}
        near = {id(s) for group in some for s in _touched(group, others, starts)}
        sites = tuple(s for s in found.sites if id(s) in members or id(s) in near)
        native = Native(_with(empty, choice), count)
        # The tables of other families say nothing here: they count as read.
        part = replace(found, sites=sites, families=AT_BOOT)
        planned = boot_plan(image, part, native, kernel=kernel, seen=Seen(thunk))
        laid: dict[int, int] = {}
        for patch in planned.patches:
            for i, byte in enumerate(patch.new):
                laid[patch.address + i] = byte
        spans = [range(group[0].address, max(s.end for s in group)) for group in some]
        base, disk, now = ground.base, ground.disk, ground.found
        return [sum(laid.get(a, disk[a - base]) == now[a - base] for a in span) for span in spans]

    by_feature: dict[int, list[list[Site]]] = {}
    alone: Counter[int] = Counter()
    single = []
    for group in groups:
        used = {s.detail.feature for s in group if isinstance(s.detail, Alternative)}
        for feature in used:
            by_feature.setdefault(feature, []).append(group)
        if len(used) == 1:
            single.append((group, next(iter(used))))
    lone = [group for group, _ in single]
    for (_, feature), off, on in zip(
        single, right(words, lone), right(dict.fromkeys(words, True) | fixed, lone), strict=True
    ):
        alone[feature] += on - off
    for feature, vote in alone.items():
        if feature in words and feature not in fixed:
            words[feature] = vote > 0
    for feature in (f for f in words if f not in fixed and not alone[f]):
        trial = words | {feature: not words[feature]}
        here = by_feature.get(feature, [])
        if here and sum(right(trial, here)) > sum(right(words, here)):
            words = trial
    total = sum(max(s.end for s in g) - g[0].address for g in groups)
    return _with(empty, words), f"{sum(right(words, groups))} of {total} bytes of alternatives agree"


def _bit(rules: Rules, feature: str) -> int:
    """A bit that has its place since the first kernel with such sites."""
    number = rules.bit(feature)
    assert number is not None
    return number


def _is_retpoline(ground: Ground, site: Site) -> bool:
    """Whether a site goes to its thunk as on disk, or to one where calls are counted."""
    at, length = site.address - ground.base, site.length
    now, disk = ground.found[at : at + length], ground.disk[at : at + length]
    if now == disk or now[:-4] != disk[:-4]:
        return now == disk
    target = site.end + int.from_bytes(now[-4:], "little", signed=True)
    starts = (ground.image.symbols.lookup(name) for name in retpolines.COUNTED.values())
    return any(start is not None and start <= target < start + 16 * retpolines.STRIDE for start in starts)


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


def _touched(group: list[Site], others: list[Site], starts: list[int]) -> list[Site]:
    """Sites of other families in the bytes of a cluster, and in the replacements that are copied into it."""
    result = []
    ranges = [(group[0].address, max(s.end for s in group))]
    details = [s.detail for s in group if isinstance(s.detail, Alternative)]
    ranges += [(d.replacement, d.replacement + d.replacement_length) for d in details]
    for start, end in ranges:
        i = bisect_left(starts, start)
        while i < len(others) and starts[i] < end:
            result.append(others[i])
            i += 1
    return result


def _inside(ground: Ground, found: Scan, family: str) -> list[Site]:
    return list(found.all_of(family).within(ground.base, ground.end))


def _target(ground: Ground, site: Site) -> int | None:
    at = site.address - ground.base
    code = bytes(ground.found[at : at + 5])
    return branch.target_of(code, site.address, ground.image.bits) if code[0] == branch.JMP else None
