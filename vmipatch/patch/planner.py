"""The one planner: what would this kernel's own patcher write, on this CPU, with this many of them, on this ROM?"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from vmipatch.annotate import Scan, Site
from vmipatch.errors import PatchError, TableError, UsageError
from vmipatch.image import Image
from vmipatch.patch import afterburn, alternatives, endbr, locks, paravirt, retpolines, returns, rom, seal
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.patch import Patch, Plan
from vmipatch.patch.rules import Rules, Version, choose
from vmipatch.patch.target import Native, OnRom, Target
from vmipatch.patch.text import Text

PATCHED_BY_KERNEL = ("parainstructions", "altinstructions", "smp_locks")


class Boot(NamedTuple):
    """What decides how returns are rewritten at boot: virtual addresses as linked, None where there is none.

    ``return_thunk`` is what ``x86_return_thunk`` holds; ``its_thunk`` the address of ``its_return_thunk``.
    """

    return_thunk: int | None
    its_thunk: int | None


NO_FEATURES = Cpu("any", None, None, None, None, ())
"""Stands for a CPU of which nothing is known."""

LAST_WITH_VMI = (2, 6, 36)
"""Linux 2.6.37 removed its VMI back end (Documentation/feature-removal-schedule.txt)."""


def plan(image: Image, scan: Scan, target: Target, *, kernel: Version | None = None, boot: Boot | None = None) -> Plan:
    """Every patch in the order in which the kernel makes them.

    With ``boot`` also those of the passes that a kernel runs at boot over returns,
    retpolines and ENDBR instructions.  They are not for writing into an image: the
    kernel complains of a site that it finds rewritten already.

    ``kernel`` is the version to go by where the image carries no banner, or to
    go by instead of it.  VMI and afterburn sites hold their native sequence on
    disk: for bare hardware there is nothing to write to them.

    Raises :class:`TableError` for the first thing that the scan found wrong with
    a table, :class:`PatchError` for a site that cannot be patched, and
    :class:`UsageError` for feature words that cannot be this kernel's.
    """
    refuse_findings(image, scan)
    text = Text(image)
    patches: list[Patch] = []
    on_rom = target.rom if isinstance(target, OnRom) else None
    native = target.native if isinstance(target, OnRom) else target
    if on_rom is not None:
        patches += rom.plan_vmi(text, _of(scan, "vmi"), on_rom)
        patches += afterburn.plan(text, _of(scan, "afterburn"), on_rom)
    if not {s.family for s in scan.sites} & set(PATCHED_BY_KERNEL):
        if on_rom is not None and not patches:
            raise PatchError("no site of this image can call a ROM", file=image.path)
        return Plan(tuple(patches))
    rules, warnings = choose(kernel or image.version, scan.tables, image.path)
    cpu = native.cpu if native is not None else NO_FEATURES
    if native is not None:
        _check_features(native, rules, warnings)
    if on_rom is not None:
        _has_back_end(image, kernel or image.version)
    nops = rules.nop_table(cpu, image.bits)
    if native is not None and cpu.vendor is None and rules.nops_need_identity(image.bits):
        warnings.append(
            f"this kernel pads with nops chosen by the CPU's vendor, family and model, which feature words "
            f"do not say: the {nops.name} table is assumed (name them in the features file, or use --cpu)"
        )
    for family in rules.passes if boot is None else rules.boot:
        sites = _of(scan, family)
        if family == "parainstructions" and on_rom is not None:
            patches += rom.plan_paravirt(text, sites, on_rom, nops)
        elif family == "parainstructions":
            patches += paravirt.plan(text, sites, rules, nops)
        elif native is not None and family == "altinstructions":
            patches += alternatives.plan(text, sites, rules, native, nops)
        elif native is not None and family == "smp_locks":
            patches += locks.plan(text, sites, rules, native)
        elif native is not None and boot is not None and family == "retpoline_sites":
            patches += retpolines.plan(text, sites, rules, cpu, nops)
        elif native is not None and boot is not None and family == "return_sites":
            thunk = boot.return_thunk if returns.wants_thunk(cpu) else None
            patches += returns.plan(text, sites, thunk, boot.its_thunk)
        elif boot is not None and family == "endbr_seal":
            patches += endbr.plan(text, sites, rules)
    return Plan(tuple(patches), tuple(warnings), rules.name, nops.name)


def refuse_findings(image: Image, scan: Scan) -> None:
    """A table that is wrong somewhere is not patched by: the first finding is the error."""
    for finding in scan.findings:
        if finding.severity == "error":
            raise TableError(finding.message, file=image.path, section=finding.section, address=finding.address)


def sealed(image: Image, scan: Scan, planned: Plan, target: Target) -> Plan:
    """The plan with the tables emptied after it, and a warning where that ties the image to its target."""
    warnings = list(planned.warnings)
    native = target.native if isinstance(target, OnRom) else target
    if native is not None and native.cpus == 1 and any(p.cause.family == "smp_locks" for p in planned.patches):
        warnings.append("sealed for one CPU: LOCK prefixes are gone, a second CPU would race; boot with one only")
    if native is None:
        warnings.append("sealed without a CPU: alternatives and LOCK prefixes stay as they are on disk")
    else:
        warnings.append("sealed for this CPU's features: on a CPU that lacks one of them the kernel may fault")
    return replace(
        planned,
        patches=planned.patches + tuple(seal.plan(image, scan, on_rom=isinstance(target, OnRom))),
        warnings=tuple(warnings),
    )


def _of(scan: Scan, family: str) -> list[Site]:
    return [s for s in scan.sites if s.family == family]


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
