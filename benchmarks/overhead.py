"""What VMI costs: guest instructions of each op, and of a whole run of the example guest, in five forms.

    python benchmarks/overhead.py [--hypervisor NAME ...] [--json]

The forms: the plain native kernel; the mainline form patched natively; the same with its sites left as indirect
calls; on the hypervisor's ROM; and the native code at CPL 1 under the hypervisor without VMI, where each
privileged instruction traps.  Counted are instructions that the guest executes; exits to the hypervisor stand
beside them.  A ``!`` marks native code that does something else at CPL 1 without a trap (the guest's registers,
flags, memory or virtual IF are then wrong), which is why the whole run of that form does not come to its end.
``-``: the mainline form has no site for it that is patched natively, so the call goes through its slot.
The ops are the mainline form's.  Whole runs are of two kernels: the v2 form, whose annotations stand round the native
code and cost nothing where there is no ROM, so that it is also the plain kernel; and the mainline form, whose calls
that no patch covers go through a function pointer everywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmipatch.emu.firmware import option_rom
from vmipatch.emu.hypervisors.base import OK
from vmipatch.rombuild.build import build
from vmipatch.rombuild.hypervisor import names
from vmipatch.validate import boots
from vmipatch.validate.compare import differs
from vmipatch.validate.demonstration import guest
from vmipatch.validate.stand import Base, Setup, Stand, build_machine
from vmipatch.validate.states import Maker, State, Surroundings, look_around
from vmipatch.validate.subject import Subject
from vmipatch.validate.trial import Result, Trial
from vmipatch.validate.validation import Request, open_all, stand_for

STATES = 6
HYPERVISORS = [name for name in names() if name != "native"]
MOMENT = 2_000_000
"""Instructions of the native run after which the kernel is put under the hypervisor without VMI."""
ENTRY = 8
"""Bytes of an entry of .parainstructions."""


@dataclass
class Op:
    """Median instructions a call in each form, exits beside the last two; None where the form does not exist."""

    name: str
    plain: float
    patched: float | None
    indirect: float | None
    rom: float
    rom_exits: float
    trapped: float | None
    traps: float
    wrong: bool


@dataclass
class Whole:
    """A whole run in one form; ``note`` says where it did not come to its end."""

    form: str
    instructions: int
    exits: int
    note: str = ""


class Meter:
    """Runs one state in the forms that there are."""

    def __init__(self, stand: Stand, base: Base, image: Any) -> None:
        self.stand, self.base, self.image = stand, base, image
        self.trial = Trial(stand)
        stand.machine.restore(base.native)
        self.around: Surroundings = look_around(stand.machine, stand.page_offset)
        self.maker = Maker(self.around)

    def states(self, subject: Subject) -> list[State]:
        made = (self.maker.make(subject, n, []) for n in range(4 * STATES))
        return [s for s in made if s.possible and not s.pending][:STATES]

    def natively(self, subject: Subject, states: Sequence[State]) -> list[Result]:
        self.stand.machine.restore(self.base.native)
        return [self.trial.native(subject, state, self.base.native) for state in states]

    def under(self, subject: Subject, states: Sequence[State]) -> tuple[list[Result], list[int]]:
        """Runs under the hypervisor, and the exits of each."""
        personality: Any = self.trial.personality
        results, exits = [], []
        for state in states:
            self.stand.machine.restore(self.base.lowered)
            before = _exits(personality)
            results.append(self.trial.lowered(subject, state, self.base.lowered))
            exits.append(_exits(personality) - before)
        return results, exits

    def op(self, call: Subject, site: Subject | None) -> Op | None:
        states = self.states(call)
        plain = self.natively(call, states)
        good = [i for i, r in enumerate(plain) if r.end in ("done", "halt", "reset", "off")]
        if not good:
            return None
        states, plain = [states[i] for i in good], [plain[i] for i in good]
        back = 0 if call.call.jump or call.call.noreturn else 1  # its return
        rom, rom_exits = self.under(call, states)
        trapped, traps = self.under(replace(call, address=call.reference), states)
        wrong = any(
            differs(call, s, self.around, p, replace(t, traps={}, effect=""), self.base.native.memory) is not None
            for s, p, t in zip(states, plain, trapped, strict=True)
        )
        patched = indirect = None
        if site is not None:
            there = self.states(site)
            patched = _median(self.natively(site, there))
            old = self.image.read(site.address, site.length)
            indirect = _median(self.natively(replace(site, native=old), there))
        return Op(
            name=call.op,
            plain=max(0.0, (_median(plain) or 0) - back),
            patched=patched,
            indirect=indirect,
            rom=(_median(rom) or 0) + back,  # the call to it
            rom_exits=statistics.median(rom_exits),
            trapped=max(0.0, (_median(trapped) or 0) - back),
            traps=statistics.median(traps),
            wrong=wrong,
        )


def _exits(personality: Any) -> int:
    return int(sum(personality.hypercalls.values()) + sum(personality.traps.values()))


def _median(results: Iterable[Result]) -> float | None:
    counts = [r.instructions for r in results if r.end != "fault"]
    return statistics.median(counts) if counts else None


def measure_ops(stand: Stand, subjects: Sequence[Subject], image: Any) -> list[Op]:
    """Every call of the ROM, in the forms that this kernel has of it."""
    sites: dict[str, Subject] = {}
    for subject in subjects:
        if not subject.is_call and len(subject.calls) == 1:
            sites.setdefault(subject.call.name, subject)
    meter = Meter(stand, stand.bases[-1], image)
    found = (meter.op(s, sites.get(s.call.name)) for s in subjects if s.is_call)
    return [op for op in found if op is not None]


def without_patches(kernel: bytes, image: Any) -> bytes:
    """The kernel with a table that names one site only, again and again: the others stay indirect calls."""
    (table,) = (s for s in image.sections if s.name == ".parainstructions")
    data = bytearray(kernel)
    first = data[table.offset : table.offset + ENTRY]
    data[table.offset : table.offset + table.size] = first * (table.size // ENTRY)
    return bytes(data)


def whole_runs(
    setup: Setup, plain: Setup, native: Setup, stubs: dict[str, int], image: Any
) -> tuple[list[Whole], Counter[str]]:
    """Whole runs of both kernels in their forms, and the calls that the mainline one made of the ROM."""
    bare = boots.native(plain)
    patched = boots.native(setup)
    indirect = boots.native(replace(setup, kernel=without_patches(setup.kernel, image)))
    rom = boots.on_rom(setup, "self", {})
    counted = boots.on_rom(setup, "self", stubs)
    runs = [
        Whole("v2: plain native kernel", bare.instructions, 0, _end(bare)),
        _with_rom("v2: calls of the native ROM", native),
        _with_rom("v2: ROM calls", plain),
        Whole("mainline: native-patched", patched.instructions, 0, _end(patched)),
        Whole("mainline: indirect calls", indirect.instructions, 0, _end(indirect)),
        Whole("mainline: ROM calls", rom.instructions, _sum(rom.hypercalls, rom.traps), _end(rom)),
        _without_vmi(plain),
    ]
    return runs, counted.calls


def _with_rom(form: str, setup: Setup) -> Whole:
    boot = boots.on_rom(setup, "self", {})
    return Whole(form, boot.instructions, _sum(boot.hypercalls, boot.traps), _end(boot))


def _sum(*counters: Counter[str]) -> int:
    return sum(sum(c.values()) for c in counters)


def _end(boot: boots.Boot) -> str:
    return "" if boot.reached else f"{boot.reason}: {_last(boot.console)}"


def _last(console: bytes) -> str:
    lines = console.decode("latin-1").split()
    return " ".join(lines[-12:])


def _without_vmi(setup: Setup) -> Whole:
    """The plain kernel, put under the hypervisor in the middle of its run."""
    machine = build_machine(setup, hypervisor=False, rom=False)
    at = MOMENT
    machine.run(limit=at)
    while machine.cpu.get("cpl"):
        at += 1000
        machine.run(limit=at)
    option_rom.place(machine, setup.rom, setup.rom_base)
    personality: Any = machine.personality
    form = "v2: trap and emulate, no VMI"
    if personality.start(0xC0000000 + setup.rom_base) != OK:
        return Whole(form, machine.cpu.instructions, 0, "the init call fails")
    outcome = machine.run(setup.limit, setup.until)
    console = bytes(machine.board.consoles.serial)
    ended = setup.until is not None and setup.until.encode() in console
    note = "" if ended else f"it goes wrong, {outcome.reason}: {_last(console)}"
    return Whole(form, outcome.instructions, _exits(personality), note)


def _ratio(a: float | None, b: float) -> str:
    return "-" if a is None or not b else f"{a / b:.2f}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def table(hypervisor: str, ops: Sequence[Op], runs: Sequence[Whole], calls: Counter[str]) -> str:
    """Per op, weighted by the calls of a run, and whole runs."""
    lines = [
        f"{hypervisor}, vmi-3.0: guest instructions an op",
        f"{'op':<20}{'plain':>7}{'patched':>9}{'indirect':>9}{'ROM':>7}{'exits':>7}{'trapped':>9}{'exits':>7}"
        f"{'ROM/plain':>11}{'calls':>8}",
    ]
    for op in ops:
        mark = "!" if op.wrong else ""
        lines.append(
            f"{op.name:<20}{_cell(op.plain):>7}{_cell(op.patched):>9}{_cell(op.indirect):>9}{_cell(op.rom):>7}"
            f"{_cell(op.rom_exits):>7}{_cell(op.trapped) + mark:>9}{_cell(op.traps):>7}{_ratio(op.rom, op.plain):>11}"
            f"{calls.get(op.name, 0):>8}"
        )
    weighed = [(op, calls[op.name]) for op in ops if calls.get(op.name)]
    total = {
        "plain": sum(op.plain * n for op, n in weighed),
        "ROM": sum(op.rom * n for op, n in weighed),
        "trapped": sum((op.trapped or 0) * n for op, n in weighed),
    }
    exits = sum(op.rom_exits * n for op, n in weighed), sum(op.traps * n for op, n in weighed)
    wrong = sum(n for op, n in weighed if op.wrong)
    lines.append(
        f"the calls of one run: {total['plain']:.0f} plain, {total['ROM']:.0f} on the ROM with {exits[0]:.0f} exits, "
        f"{total['trapped']:.0f} trapped with {exits[1]:.0f} exits, {wrong} of them wrong"
    )
    lines.append(f"\n{'whole run':<32}{'instructions':>14}{'exits':>9}{'ratio':>8}")
    for run in runs:
        ratio = "-" if run.note else _ratio(run.instructions, runs[0].instructions)
        lines.append(f"{run.form:<32}{run.instructions:>14}{run.exits:>9}{ratio:>8}  {run.note}".rstrip())
    return "\n".join(lines)


def measure(hypervisor: str) -> tuple[list[Op], list[Whole], Counter[str]]:
    """Everything for one hypervisor; raises :class:`VmipatchError`."""
    with tempfile.TemporaryDirectory(prefix="vmipatch-") as folder:
        rom = Path(folder) / "rom"
        rom.write_bytes(build(hypervisor, "vmi-3.0").data)
        native_rom = Path(folder) / "native"
        native_rom.write_bytes(build("native", "vmi-3.0").data)
        prepared = open_all(Request(guest("mainline"), rom, memory_mib=16, moments=2))
        plain = open_all(Request(guest("v2"), rom, memory_mib=16))
        native = open_all(Request(guest("v2"), native_rom, memory_mib=16))
    stand, subjects = stand_for(prepared)
    ops = measure_ops(stand, subjects, prepared.image)
    runs, calls = whole_runs(prepared.setup, plain.setup, native.setup, prepared.stubs, prepared.image)
    return ops, runs, calls


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="guest instructions of each op, in five forms")
    parser.add_argument("--hypervisor", action="append", choices=HYPERVISORS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.hypervisor or HYPERVISORS
    if not options.json:
        print_tables(chosen)
        return
    document = {}
    for hypervisor in chosen:
        ops, runs, calls = measure(hypervisor)
        document[hypervisor] = {
            "ops": [vars(op) for op in ops],
            "runs": [vars(run) for run in runs],
            "calls": dict(calls),
        }
    print(json.dumps(document, indent=1))


def print_tables(hypervisors: Iterable[str]) -> None:
    """Measure and print, one hypervisor after the other."""
    for hypervisor in hypervisors:
        print(table(hypervisor, *measure(hypervisor)), flush=True)
        print()


if __name__ == "__main__":
    main()
