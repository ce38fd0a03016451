"""The explanation: what this kernel must have made of its text by now, and where it is anything else.

Boot's patches come from the one planner; what a running kernel changes later from
explain.late; what tracing and probing change from explain.tracing and explain.probes, on evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

from vmipatch.annotate import Scan, scan
from vmipatch.annotate.family import AT_RUN_TIME
from vmipatch.annotate.site import Sites
from vmipatch.errors import ImageError, UsageError
from vmipatch.explain import chosen, cpudata, fit, padding, probes, runs, thunks, tracing
from vmipatch.explain.ground import Ground
from vmipatch.explain.late import LATE, Data, Live, Tally
from vmipatch.explain.locate import locate
from vmipatch.explain.memory import Memory
from vmipatch.explain.result import Explanation, Proved
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.image.model import Section
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.passes import Boot
from vmipatch.patch.patch import Plan
from vmipatch.patch.planner import boot_plan, refuse_findings
from vmipatch.patch.rules import Rules
from vmipatch.patch.slide import moved
from vmipatch.patch.target import Native

EVIDENCE = ("parainstructions", "altinstructions", "smp_locks", "retpoline_sites", "return_sites")
"""The families that tell of a machine; the planner reads the others where it runs their passes."""


BULK = ("return_sites", "mcount")
"""Families of tens of thousands of sites, nearly all of them alike."""

_WORD = 4


@dataclass(frozen=True)
class Kernel:
    """A kernel as it runs: all that its own text and its modules are explained by."""

    image: Image
    running: Running
    boot: Boot
    data: Data | None
    """The dump's data, where it has the kernel's."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """The layouts that evidence found for the kernel's tables, by family: its modules' tables have the same."""


@dataclass(frozen=True)
class Compared:
    """One stretch of text with what stands where: its ground, the sites in it, how its late families stand."""

    ground: Ground
    sites: Sites
    tallies: dict[str, Tally]
    proved: list[Proved]


def explain(
    image: Image, memory: Memory, *, cpu: Cpu | None = None, kernel: tuple[int, ...] | None = None
) -> Explanation:
    """A cause for every byte of the image's ``.text`` in a memory dump.

    ``cpu`` is used instead of the dump's own ``boot_cpu_data``.  Raises
    :class:`ImageError` where the dump does not have this kernel, with how that was noticed.
    """
    text = text_of(image)
    running = locate(image, memory)
    found = running.read(text.address, text.size)
    if found is None:
        raise ImageError("cut short: it lacks a part of the kernel's text", file=memory.path, address=text.address)
    evidence = [f"kernel found {running.how}" + (f", moved by {running.slide:#x}" if running.slide else "")]
    ground = Ground(image, text.address, bytes(image.data[text.offset : text.offset + text.size]), found)
    boot_scan = scan(image, EVIDENCE, bulk=BULK)
    refuse_findings(image, boot_scan)
    settled = rules_for(image, boot_scan, kernel)
    rules, warnings = settled.rules, list(settled.warnings)
    evidence += settled.told
    native, how = _machine(image, running, ground, boot_scan, cpu, kernel, rules)
    evidence += how
    if memory.missing:
        warnings.append(f"the dump is cut short: its headers name {memory.missing} bytes more than it has")
    nops = rules.nop_table(native.cpu, image.bits)
    seen, how = chosen.seen(running, boot_scan, ground, Boot(image, rules, nops, native))
    evidence += how
    planned = boot_plan(image, boot_scan, native, kernel=kernel, seen=seen)
    for page in chosen.altered_pages(running, seen.its):
        warnings.append(f"the page of thunks at {page:#x} is not as the kernel filled it")
    boot = Boot(image, rules, nops, native, seen.return_thunk, seen.checks, seen.its)
    whole = Kernel(image, running, boot, running if _has_data(running) else None, layouts_of(boot_scan))
    lay_plan(ground, planned)
    _relocate(image, running.slide, ground, planned)
    boot_sites = Sites(planned.sites.get(family) or boot_scan.all_of(family) for family in rules.boot)
    compared = finish(whole, ground, boot_sites)
    said = [f"{name}: {n} sites by {how}" for name, t in compared.tallies.items() for how, n in t.evidence.items()]
    listed, number, count = runs.unexplained(ground, compared.sites)
    return Explanation(
        start=text.address, total=text.size, slide=running.slide, unexplained_bytes=count,
        by_cause=dict(ground.counts().most_common()),
        states={name: dict(t.states) for name, t in compared.tallies.items()},
        evidence=evidence + said,
        unexplained=listed, runs=number, proved=compared.proved,
        warnings=list(dict.fromkeys([*warnings, *planned.warnings])),
        ground=ground, sites=compared.sites, kernel=whole,
    )  # fmt: skip


def finish(kernel: Kernel, ground: Ground, boot_sites: Sites) -> Compared:
    """What a running kernel changes after its boot, over a ground that already has what the boot wrote.

    ``boot_sites`` are the sites of the boot's passes, wherever they are; sites of later changes are read from the
    ground's own image.
    """
    late = scan(ground.image, AT_RUN_TIME, bulk=BULK)
    refuse_findings(ground.image, late)
    here = {family: late.all_of(family).within(ground.base, ground.end) for family in AT_RUN_TIME}
    live = Live(kernel.boot, kernel.data)
    tallies = {family: LATE[family].expect(ground, sites, live) for family, sites in here.items() if sites}
    proved: list[Proved] = []
    if next(ground.differences(), None) is not None:
        inside = boot_sites.within(ground.base, ground.end)
        thunks.prove(ground, kernel.running, [s for s in inside if s.family == "retpoline_sites"])
        padding.prove(ground, kernel.boot, kernel.running.slide)
        jumps = bool(kernel.boot.rules.section("mcount").get("jumps"))
        proved += tracing.prove(ground, kernel.running, here["mcount"], jumps=jumps)
        proved += probes.prove(ground, kernel.running)
    for family, sites in here.items():
        proved += LATE[family].proved(ground, sites, live)
    whole = Sites((*boot_sites.parts, *(late.all_of(family) for family in AT_RUN_TIME)))
    return Compared(ground, whole, tallies, proved)


def layouts_of(found: Scan) -> dict[str, str]:
    """The layouts that evidence found for a kernel's tables, by family."""
    return {t.family: t.layout for t in found.tables if t.layout is not None and not t.sealed}


def text_of(image: Image) -> Section:
    """``[_text, _etext)``: x86's linker script makes the section ``.text`` begin and end there."""
    if image.container == "module":
        raise UsageError("a module's memory cannot be explained without its kernel's", file=image.path)
    section = image.section(".text")
    if section is None or not section.file_size:
        raise ImageError("the image has no .text section", file=image.path)
    return section


def _has_data(running: Running) -> bool:
    """Whether the dump has the kernel's data; in an image whose sections nobody named, the largest that is written."""
    image = running.image
    written = [s for s in image.sections if s.alloc and s.write and not s.exec and s.file_size >= _WORD]
    data = image.section(".data") or max(written, key=lambda s: s.file_size, default=None)
    if data is None:
        return False
    return all(running.read(address, _WORD) is not None for address in (data.address, data.end - _WORD))


def _machine(
    image: Image,
    running: Running,
    ground: Ground,
    found: Scan,
    cpu: Cpu | None,
    kernel: tuple[int, ...] | None,
    rules: Rules,
) -> tuple[Native, list[str]]:
    """The CPU and the number of CPUs, and where each is known from."""
    cpus, locked = fit.cpus(ground, found, rules)
    said = [f"CPUs: {'one' if cpus == 1 else 'several'}, as {locked} lock prefixes say"] if locked else []
    if cpu is not None:
        return Native(cpu, cpus), [f"features: {cpu.name}", *said]
    address = image.symbols.lookup("boot_cpu_data")
    data = running.read(address, cpudata.SIZE) if address is not None else None
    known = cpudata.parse(data, image.version or ()) if data is not None else None
    if known is not None:
        least, most = rules.feature_words()
        if not least <= len(known.words) <= most:
            known = replace(known, words=known.words[:most] + (0,) * (least - len(known.words)))
        return Native(known, cpus), [
            f"features: boot_cpu_data of the dump, {known.vendor} family {known.family}",
            *said,
        ]
    best, share = fit.features(image, ground, scan(image, EVIDENCE), rules, cpus, kernel)
    return Native(best, cpus), [f"features: best fit to the text, {share}", *said]


def lay_plan(ground: Ground, planned: Plan) -> None:
    """Expect what the planner says that boot wrote."""
    done = 0
    for run in (*planned.runs, None):
        stop = len(planned.patches) if run is None else run.after
        for family, patches in groupby(planned.patches[done:stop], key=attrgetter("cause.family")):
            ground.lay_all(((patch.address, patch.new) for patch in patches), ground.cause(family))
        if run is not None:
            ground.lay_all(zip(run.addresses, run.codes, strict=True), ground.cause(run.family))
        done = stop


def _relocate(image: Image, slide: int, ground: Ground, planned: Plan) -> None:
    """Move the fields that KASLR moves: those of the text on disk, and those that boot's patches left or brought."""
    if not slide:
        return
    table = image.relocations
    if table is None:
        raise ImageError(
            f"the running kernel was moved by {slide:#x}, and the image has no relocation table: give its bzImage",
            file=image.path,
        )
    here = Plan(tuple(p for p in planned.patches if ground.base <= p.address < ground.end), runs=planned.runs)
    for fields, width, value in (
        (table.absolute32, 4, slide), (table.absolute64, 8, slide), (table.inverse32, 4, -slide),
    ):  # fmt: skip
        inside = [f for f in fields if ground.base <= f < ground.end]
        ground.relocate_pristine(inside, width, value)
        lost, gained = moved(here, fields, width)
        now = set(inside) - lost | {f for f in gained if ground.base <= f < ground.end}
        ground.add(sorted(now), width, value)
