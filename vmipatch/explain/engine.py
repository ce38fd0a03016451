"""The explanation: what this kernel must have made of its text by now, and where it is anything else.

Boot's patches come from the one planner; what a running kernel changes later from
explain.states; what tracing and probing change from explain.tracing and explain.probes, on evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vmipatch.annotate import Scan, Site, scan
from vmipatch.errors import ImageError, UsageError
from vmipatch.explain import cpudata, fit, probes, runs, states, thunks, tracing
from vmipatch.explain.ground import Ground
from vmipatch.explain.locate import locate
from vmipatch.explain.memory import Memory
from vmipatch.explain.result import Explanation, Proved
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.image.model import Section
from vmipatch.isa import nops as nop_tables
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.patch import Plan
from vmipatch.patch.planner import Boot, plan, refuse_findings
from vmipatch.patch.rules import Rules, choose
from vmipatch.patch.slide import moved
from vmipatch.patch.target import Native

BOOT = (
    "parainstructions", "altinstructions", "smp_locks", "retpoline_sites", "return_sites", "endbr_seal",
)  # fmt: skip
RUN_TIME = ("mcount", "jump_labels", "static_calls", "runtime_consts")

_MOVED_BY = frozenset(("altinstructions", "parainstructions"))
"""Families whose sites can hold a field that KASLR changes; the others hold relative branches and prefixes."""


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
    boot_scan, late = scan(image, BOOT), scan(image, RUN_TIME)
    for found_scan in (boot_scan, late):
        refuse_findings(image, found_scan)
    rules, warnings = choose(kernel or image.version, boot_scan.tables, image.path)
    native, how = _machine(image, running, ground, boot_scan, cpu, kernel, rules)
    evidence += how
    if memory.missing:
        warnings.append(f"the dump is cut short: its headers name {memory.missing} bytes more than it has")
    boot = _thunks(image, running, boot_scan, ground)
    planned = plan(image, boot_scan, native, kernel=kernel, boot=boot)
    lay_plan(ground, planned)
    _relocate(image, running.slide, ground, planned)
    nops = nop_tables.table(planned.nops) if planned.nops else rules.nop_table(native.cpu, image.bits)
    here = [s for s in late.sites if text.address <= s.address and s.end <= text.end]
    inside = [s for s in boot_scan.sites if text.address <= s.address and s.end <= text.end]
    data = running if _has_data(running) else None
    tallies = {
        "mcount": states.mcount(ground, _of(here, "mcount"), states.five_byte_nop(nops)),
        "jump_labels": states.jump_labels(ground, _of(here, "jump_labels"), data, nops),
        "static_calls": states.static_calls(
            ground, _of(here, "static_calls"), data, call_forms(image, rules, native.cpu, boot, nops)
        ),
    }
    if constants := _of(here, "runtime_consts"):
        tallies["runtime_consts"] = states.runtime_consts(ground, constants, data)
    proved = _run_time_evidence(ground, running, here, inside)
    if data is not None:
        proved += states.flipped(ground, _of(here, "jump_labels"), data)
    said = [f"{name}: {n} sites by {how}" for name, t in tallies.items() for how, n in t.evidence.items()]
    everything = [*boot_scan.sites, *late.sites]
    listed, number, count = runs.unexplained(ground, everything)
    return Explanation(
        start=text.address, total=text.size, slide=running.slide, unexplained_bytes=count,
        by_cause=dict(ground.counts().most_common()),
        states={name: dict(t.states) for name, t in tallies.items()},
        evidence=evidence + said,
        unexplained=listed, runs=number, proved=proved,
        warnings=list(dict.fromkeys([*warnings, *planned.warnings])),
        ground=ground, sites=tuple(everything),
    )  # fmt: skip


def text_of(image: Image) -> Section:
    """``[_text, _etext)``: x86's linker script makes the section ``.text`` begin and end there."""
    if image.container == "module":
        raise UsageError("a module's memory cannot be explained without its kernel's", file=image.path)
    section = image.section(".text")
    if section is None or not section.file_size:
        raise ImageError("the image has no .text section", file=image.path)
    return section


def _of(sites: Sequence[Site], family: str) -> list[Site]:
    return [s for s in sites if s.family == family]


def _has_data(running: Running) -> bool:
    data = running.image.section(".data")
    return data is not None and running.read(data.address, 4) is not None and running.read(data.end - 4, 4) is not None


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
    said = [f"CPUs: {'one' if cpus == 1 else 'several'}, as {locked} lock prefixes say"]
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
    best, share = fit.features(image, ground, found, rules, cpus, kernel)
    return Native(best, cpus), [f"features: best fit to the text, {share}", *said]


def _thunks(image: Image, running: Running, found: Scan, ground: Ground) -> Boot:
    """What returns were made of: ``x86_return_thunk`` where the dump has it, else what most of them jump to."""
    its = image.symbols.lookup("its_return_thunk")
    address = image.symbols.lookup("x86_return_thunk")
    thunk = running.pointer(address) if address is not None else None
    return Boot(thunk or fit.return_thunk(ground, found), its)


def lay_plan(ground: Ground, planned: Plan) -> None:
    """Expect what the planner says that boot wrote."""
    for patch in planned.patches:
        if ground.base <= patch.address < ground.end:
            ground.lay(patch.address, patch.new, ground.cause(patch.cause.family))


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
    tied = Plan(
        tuple(p for p in planned.patches if p.cause.family in _MOVED_BY and ground.base <= p.address < ground.end)
    )
    for fields, width, value in (
        (table.absolute32, 4, slide), (table.absolute64, 8, slide), (table.inverse32, 4, -slide),
    ):  # fmt: skip
        inside = [f for f in fields if ground.base <= f < ground.end]
        ground.relocate_pristine(inside, width, value)
        lost, gained = moved(tied, fields, width)
        now = set(inside) - lost | {f for f in gained if ground.base <= f < ground.end}
        ground.add(sorted(now), width, value)


def call_forms(image: Image, rules: Rules, cpu: Cpu, boot: Boot, nops: nop_tables.NopTable) -> states.CallForms:
    """How this kernel writes static calls on that CPU."""
    from vmipatch.patch import returns

    spec = rules.section("static_calls")
    forms = tuple(bytes.fromhex(x) for x in spec.get("return0", ["2E2E2E31C0"]))
    thunk = boot.return_thunk if returns.wants_thunk(cpu) else None
    return0 = image.symbols.lookup("__static_call_return0")
    return states.CallForms(image.bits, states.five_byte_nop(nops), return0, forms, thunk, boot.its_thunk)


def _run_time_evidence(
    ground: Ground, running: Running, sites: Sequence[Site], boot_sites: Sequence[Site]
) -> list[Proved]:
    """What tracing and probing wrote, and branches to thunks made while booting, where the dump proves it."""
    if next(ground.differences(), None) is None:
        return []
    thunks.prove(ground, running, _of(boot_sites, "retpoline_sites"))
    return tracing.prove(ground, running, _of(sites, "mcount")) + probes.prove(ground, running)
