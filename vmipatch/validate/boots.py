"""Boot by boot: natively, patching itself on the ROM, and statically patched on the ROM.

May import stand and the emulator.  Compared are the end, the console's text and which VMI calls were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmipatch.emu.hypervisors.violation import Violation
from vmipatch.emu.machine.machine import Machine
from vmipatch.validate.stand import Setup, build_machine

OWN_LINE = b"vmi-guest: backend "
"""The one line in which the example guest says what it runs on."""
GOOD_ENDS = ("until", "poweroff")
MOST_COUNTED = 20_000
"""A call made so often is counted no further: each entry that is seen costs microseconds."""
PANIC = (b"Kernel panic", b"FAILED")


@dataclass
class Boot:
    """One boot: ``kind`` is ``native``, ``self`` or ``static``; ``calls`` counts entries into the ROM's stubs after
    VMI_Init, ``early`` those before it, ``traps`` what the guest did outside the interface."""

    kind: str
    reason: str
    reached: bool
    console: bytes
    instructions: int
    calls: Counter[str] = field(default_factory=Counter)
    early: Counter[str] = field(default_factory=Counter)
    traps: Counter[str] = field(default_factory=Counter)
    hypercalls: Counter[str] = field(default_factory=Counter)
    violation: Violation | None = None
    problems: list[str] = field(default_factory=list)
    verdict: str = "pass"

    @property
    def more_calls(self) -> bool:
        """Whether a call was made more often than is counted."""
        return any(n >= MOST_COUNTED for n in (self.calls | self.early).values())


def native(setup: Setup) -> Boot:
    """The kernel on the bare machine, no ROM in sight."""
    machine = build_machine(setup, hypervisor=False, rom=False)
    return _run(machine, setup, "native", {})


def on_rom(setup: Setup, kind: str, stubs: Mapping[str, int], kernel: bytes | None = None) -> Boot:
    """The kernel on the ROM with its hypervisor; ``kernel`` is the patched image of a ``static`` boot.

    ``stubs``: linear addresses of the ROM's calls, whose entries are counted.
    """
    machine = build_machine(setup, hypervisor=True, rom=True, kernel=kernel)
    return _run(machine, setup, kind, stubs)


def _run(machine: Machine, setup: Setup, kind: str, stubs: Mapping[str, int]) -> Boot:
    personality: Any = machine.personality
    boot = Boot(kind, "", False, b"", 0)
    names = {address: name for name, address in stubs.items()}
    cpu = machine.cpu
    paravirtual = setup.hypervisor != "native"

    def entered(_: Machine) -> bool:
        counter = boot.calls if personality.active or not paravirtual else boot.early
        address = cpu.linear_eip
        counter[names[address]] += 1
        if counter[names[address]] >= MOST_COUNTED:
            cpu.remove_breakpoint(address)
        return True

    if names:
        machine.hooks[machine.exit.BREAKPOINT] = entered
        for address in names:
            cpu.add_breakpoint(address)
    outcome = machine.run(setup.limit, setup.until)
    boot.reason, boot.instructions = outcome.reason, outcome.instructions
    boot.console = bytes(machine.board.consoles.serial)
    if setup.until is None:
        boot.reached = outcome.reason == "poweroff"
    else:
        boot.reached = setup.until.encode() in boot.console
    boot.violation = personality.violation
    boot.traps, boot.hypercalls = Counter(personality.traps), Counter(personality.hypercalls)
    if paravirtual and kind != "native" and not personality.active:
        boot.problems.append("the kernel did not start the hypervisor: VMI_Init was not called, or said no")
    return boot


def judge(boots: Iterable[Boot]) -> None:
    """Fill in problems and verdicts; the first boot is the native one, which nothing can pass without."""
    first, *others = boots
    shown = first.reached and first.reason in GOOD_ENDS and not any(word in first.console for word in PANIC)
    if not shown:
        first.problems.append(f"the native kernel does not come to its end: {first.reason}")
        first.verdict = "not shown"
    for boot in others:
        if boot.violation is not None:
            boot.problems.append(f"the hypervisor stopped the guest: {boot.violation}")
        if not shown:
            # There is nothing to compare with.
            boot.verdict = "fail" if boot.violation is not None else "not shown"
            continue
        if boot.reason != first.reason:
            boot.problems.append(f"it ends with {boot.reason}, the native one with {first.reason}")
        line = first_difference(first.console, boot.console)
        if line:
            boot.problems.append(line)
        boot.verdict = "fail" if boot.problems else "pass"
    made = [b for b in others if b.kind in ("self", "static")]
    if shown and len(made) == 2 and not any(b.problems for b in made):
        one, two = (set(b.calls) for b in made)
        if one != two:
            made[1].problems.append(f"calls made in one boot only: {', '.join(sorted(one ^ two))}")
            made[1].verdict = "fail"


def first_difference(one: bytes, other: bytes) -> str:
    """The first line of the consoles that differs, in words; empty if none does."""
    a, b = _lines(one), _lines(other)
    for number, (left, right) in enumerate(zip(a, b, strict=False), 1):
        if left != right:
            return f"console line {number}: {_text(left)!r} natively, {_text(right)!r} here"
    if len(a) != len(b):
        extra = (a if len(a) > len(b) else b)[min(len(a), len(b))]
        return f"the {'native' if len(a) > len(b) else 'patched'} console alone goes on: {_text(extra)!r}"
    return ""


def _lines(console: bytes) -> list[bytes]:
    return [line.rstrip() for line in console.split(b"\n") if not line.startswith(OWN_LINE)]


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
