"""The one planner: what would this kernel's own patcher write, on this CPU, with this many of them, on this ROM?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from vmipatch.annotate import Scan, Site
from vmipatch.annotate import scan as read_tables
from vmipatch.annotate.family import AT_BOOT
from vmipatch.annotate.parainstructions import UNKNOWN
from vmipatch.annotate.site import Alternative
from vmipatch.errors import PatchError, TableError, UsageError
from vmipatch.image import Image
from vmipatch.patch import afterburn, rom, sealing, slide
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.passes import NO_FEATURES, PASSES, Boot, Checks, Pass, its
from vmipatch.patch.passes.onrom import ParavirtOnRom
from vmipatch.patch.patch import Patch, Plan, Run
from vmipatch.patch.rules import Rules, Version, eras
from vmipatch.patch.target import Native, OnRom, Target
from vmipatch.patch.text import Text

LAST_WITH_VMI = (2, 6, 36)
"""Linux 2.6.37 removed its VMI back end (Documentation/feature-removal-schedule.txt)."""

KEEPING = ("altinstructions", "return_sites")
"""The families because of whose sites something must stay as it is on disk, where the tables stay."""


ALTERNATIVES = "altinstructions"
PARAVIRT = "parainstructions"

FIVE_LEVELS = "LA57"
"""Not the kernel's own code but its decompressor goes over to five levels, by CPUID and its command line."""


class Seen(NamedTuple):
    """What a dump shows of a boot that nothing else tells.

    ``return_thunk`` is the virtual address, as linked, that ``x86_return_thunk`` holds; ``checks`` how indirect calls
    are checked; ``its`` the thunks against Indirect Target Selection, by a way to find their pages.
    """

    return_thunk: int | None = None
    checks: Checks | None = None
    its: its.Thunks | None = None


NOTHING = Seen()


def plan(
    image: Image,
    scan: Scan,
    target: Target,
    *,
    kernel: Version | None = None,
    seal: bool = False,
    skip_unknown: bool = False,
) -> Plan:
    """What to write into an image: patches in the order in which the kernel makes them.

    With ``seal`` that is the text which the kernel leaves after its boot on the target, and the tables emptied so that
    it does not patch again.  Without, it is what the kernel's own patcher may find there when it boots: sites that it
    takes for a fault once they are rewritten stay as they are, and :attr:`Plan.left` counts them.

    ``kernel`` is the version to go by where the image carries no banner, or to
    go by instead of it.  VMI and afterburn sites hold their native sequence on
    disk: for bare hardware there is nothing to write to them.  Sites of families that ``scan`` has not read are
    read where a pass needs them.

    Paravirt sites of which nobody knows what they do are refused, or with ``skip_unknown`` left as they are.

    Raises :class:`TableError` for the first thing that the scan found wrong with
    a table, :class:`PatchError` for a site that cannot be patched, and
    :class:`UsageError` for feature words that cannot be this kernel's.
    """
    unknown = _unknown(image, scan, skip=skip_unknown)
    planned = _planned(image, scan, target, kernel, whole=seal, skip_unknown=bool(unknown))
    if not seal:
        homeless = slide.homeless(image, planned)
        if homeless:
            planned = _planned(image, scan, target, kernel, whole=False, kept=homeless, skip_unknown=bool(unknown))
    planned = replace(planned, skipped=tuple(unknown))
    return _sealed(image, scan, planned, target) if seal else planned


def _unknown(image: Image, scan: Scan, *, skip: bool) -> list[Site]:
    """The paravirt sites that do what nobody knows; :class:`PatchError` unless they are to be skipped."""
    sites = _sites(image, scan, PARAVIRT)
    found = [site for site in sites if site.op == UNKNOWN]
    if found and not skip:
        raise PatchError(
            f"nobody knows what {len(found)} of {len(sites)} paravirt sites do: --skip-unknown leaves them alone",
            file=image.path, section=found[0].table, address=found[0].address,
        )  # fmt: skip
    return found


def boot_plan(image: Image, scan: Scan, native: Native, *, kernel: Version | None = None, seen: Seen = NOTHING) -> Plan:
    """The text that the kernel leaves after its boot: all its passes, whatever may be written into an image.

    ``seen`` is what is known of that boot.  Raises as :func:`plan` does.
    """
    return _planned(image, scan, native, kernel, whole=True, seen=seen)


def _planned(
    image: Image,
    scan: Scan,
    target: Target,
    kernel: Version | None,
    *,
    whole: bool,
    kept: frozenset[int] = frozenset(),
    skip_unknown: bool = False,
    seen: Seen = NOTHING,
) -> Plan:
    refuse_findings(image, scan)
    text = Text(image)
    patches: list[Patch] = []
    on_rom = target.rom if isinstance(target, OnRom) else None
    native = target.native if isinstance(target, OnRom) else target
    if on_rom is not None:
        patches += rom.plan_vmi(text, scan.of("vmi"), on_rom)
        patches += afterburn.plan(text, scan.of("afterburn"), on_rom)
    if not any(scan.of(family) for family in AT_BOOT):
        if on_rom is not None and not patches:
            raise PatchError("no site of this image can call a ROM", file=image.path)
        return Plan(tuple(patches))
    settled = rules_for(image, scan, kernel)
    rules, warnings = settled.rules, list(settled.warnings)
    cpu = native.cpu if native is not None else NO_FEATURES
    if native is not None:
        _check_features(native, rules, warnings)
    passes: Mapping[str, Pass] = PASSES
    if on_rom is not None:
        _has_back_end(image, kernel or image.version)
        instead = ParavirtOnRom(on_rom)
        passes = {**PASSES, instead.family: instead}
    nops = rules.nop_table(cpu, image.bits)
    if native is not None and cpu.vendor is None and rules.nops_need_identity(image.bits):
        warnings.append(
            f"this kernel pads with nops chosen by the CPU's vendor, family and model, which feature words "
            f"do not say: the {nops.name} table is assumed (name them in the features file, or use --cpu)"
        )
    boot = Boot(image, rules, nops, native, seen.return_thunk, seen.checks, seen.its or its.Thunks.of(image))
    order = rules.boot if whole else rules.passes
    if not whole:
        kept = kept.union(*(passes[family].kept(_sites(image, scan, family)) for family in KEEPING))
    looked_at: dict[str, Sequence[Site]] = {}
    runs: list[Run] = []
    left: dict[str, int] = {}
    for family in rules.boot:
        one = passes[family]
        if (native is None and one.needs_cpu) or not one.applies(boot):
            continue
        if family not in order:
            left[family] = sum(t.count for t in scan.tables if t.family == family)
            continue
        if len(scan.in_bulk(family)) == 1 and not one.also(rules) and not kept:
            places = scan.in_bulk(family)[0]
            codes = one.codes(text, places, boot)
            if codes is not None:
                looked_at[family] = places
                runs.append(Run(len(patches), family, places.addresses, codes))
                text.write_table(places.addresses, codes)
                continue
        sites = _sites(image, scan, family)
        looked_at[family] = tuple(sites)
        for other in one.also(rules):
            sites = sites + _sites(image, scan, other)
        if kept:
            sites = [s for s in sites if s.address not in kept]
            left[family] = sum(s.address in kept for s in looked_at[family])
        if skip_unknown:
            sites = [s for s in sites if s.family != PARAVIRT or s.op != UNKNOWN]
        patches += one.patches(text, sites, boot)
    left = {family: count for family, count in left.items() if count}
    return Plan(tuple(patches), tuple(warnings), rules.name, nops.name, looked_at, left, tuple(runs))


def _sites(image: Image, scan: Scan, family: str) -> list[Site]:
    """The sites of a family: those of the scan, or read now where the scan did not read that family.

    Raises :class:`TableError` for the first thing that is wrong with its table.
    """
    if family in scan.families:
        return scan.of(family)
    more = read_tables(image, [family])
    refuse_findings(image, more)
    return list(more.sites)


def refuse_findings(image: Image, scan: Scan) -> None:
    """A table that is wrong somewhere is not patched by: the first finding is the error."""
    for finding in scan.findings:
        if finding.severity == "error":
            raise TableError(finding.message, file=image.path, section=finding.section, address=finding.address)


def _sealed(image: Image, scan: Scan, planned: Plan, target: Target) -> Plan:
    """The plan with the tables emptied after it, and a warning where that ties the image to its target."""
    warnings = list(planned.warnings)
    native = target.native if isinstance(target, OnRom) else target
    if native is not None and native.cpus == 1 and any(p.cause.family == "smp_locks" for p in planned.patches):
        warnings.append("sealed for one CPU: LOCK prefixes are gone, a second CPU would race; boot with one only")
    if native is None:
        warnings.append("sealed without a CPU: alternatives and LOCK prefixes stay as they are on disk")
    else:
        warnings.append("sealed for this CPU's features: on a CPU that lacks one of them the kernel may fault")
    rules = next((era for era in eras() if era.name == planned.rules), None)
    five = rules.bit(FIVE_LEVELS) if rules is not None else None
    asked = any(
        isinstance(s.detail, Alternative) and s.detail.feature == five for s in planned.sites.get(ALTERNATIVES, ())
    )
    if native is not None and five is not None and asked and not native.cpu.has(five):
        warnings.append("sealed for four levels of paging: a CPU with five must be booted with no5lvl")
    # A table that the kernel does not walk on this target needs no emptying.
    walked = [f for f in rules.boot if f in planned.sites or not PASSES[f].silent] if rules is not None else []
    return replace(
        planned,
        patches=planned.patches + tuple(sealing.plan(image, scan, walked, on_rom=isinstance(target, OnRom))),
        warnings=tuple(warnings),
    )


def _check_features(target: Native, rules: Rules, warnings: list[str]) -> None:
    least, most = rules.feature_words()
    words = len(target.cpu.words)
    if not least <= words <= most:
        raise UsageError(
            f"{target.cpu.name}: {words} feature words, but kernels of {rules.name} have {least} to {most}",
        )
    if target.cpus < 1:
        raise UsageError(f"{target.cpus} CPUs: there is at least one")
    if not target.cpu.complete:
        warnings.append(
            f"{target.cpu.name}: the synthetic feature bits of this kernel are not measured; "
            "give --features from the running kernel to be exact"
        )


def _has_back_end(image: Image, version: Version | None) -> None:
    if image.bits != 32 or (version is not None and version[:3] > LAST_WITH_VMI):
        shown = ".".join(map(str, version or ()))
        raise PatchError(
            f"a {image.bits}-bit Linux {shown} has no VMI back end (i386, 2.6.21 to 2.6.36): no ROM can be called",
            file=image.path,
        )
