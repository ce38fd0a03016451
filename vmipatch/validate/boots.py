"""Boot by boot: natively, patching itself on the ROM, and statically patched on the ROM.

May import console, stand and the emulator.  Compared are the end, the console's text, which VMI calls were made,
and the final state: control registers and tables as the guest sees them, and what stands at the sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vmipatch.emu.hypervisors.base import native_view
from vmipatch.emu.hypervisors.violation import Violation
from vmipatch.emu.machine.machine import Machine
from vmipatch.validate.console import Known, first_difference
from vmipatch.validate.stand import Setup, build_machine

GOOD_ENDS = ("until", "poweroff")
MOST_COUNTED = 20_000
"""A call made so often is counted no further: each entry that is seen costs microseconds."""
FINAL = ("cr0", "gdtr_limit", "idtr_base", "idtr_limit")
"""What of the final state does not depend on the moment; of CR0 without TS."""
TS = 8
TURNS = 6
"""How often two boots are run again to see whether a call is one of chance: of a call that comes in half of the
boots one time in 4096 shows nothing in as many."""
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
    notes: list[str] = field(default_factory=list)
    """What is not compared, and why."""
    verdict: str = "pass"
    view: dict[str, int] = field(default_factory=dict)
    text: dict[int, bytes] = field(default_factory=dict)
    """Final bytes of the sites asked for, by physical address."""

    @property
    def more_calls(self) -> bool:
        """Whether a call was made more often than is counted."""
        return any(n >= MOST_COUNTED for n in (self.calls | self.early).values())


def native(setup: Setup) -> Boot:
    """The kernel on the bare machine, no ROM in sight."""
    machine = build_machine(setup, hypervisor=False, rom=False)
    return _run(machine, setup, "native", {})


def on_rom(
    setup: Setup,
    kind: str,
    stubs: Mapping[str, int],
    kernel: bytes | None = None,
    sites: Mapping[int, int] = MappingProxyType({}),
) -> Boot:
    """The kernel on the ROM with its hypervisor; ``kernel`` is the patched image of a ``static`` boot.

    ``stubs``: linear addresses of the ROM's calls, whose entries are counted; ``sites``: physical addresses and
    lengths of what is to be looked at in the end.
    """
    machine = build_machine(setup, hypervisor=True, rom=True, kernel=kernel)
    boot = _run(machine, setup, kind, stubs)
    boot.text = {at: machine.memory.read(at, length) for at, length in sites.items()}
    return boot


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
    boot.view = personality.view() if personality.active and paravirtual else native_view(cpu)
    boot.traps, boot.hypercalls = Counter(personality.traps), Counter(personality.hypercalls)
    if paravirtual and kind != "native" and not personality.active:
        boot.problems.append("the kernel did not start the hypervisor: VMI_Init was not called, or said no")
    return boot


Again = Callable[[str, int], Boot]
"""The boot of a kind once more, with its clocks put forward that many times."""


def judge(boots: Iterable[Boot], known: Known, again: Again | None = None) -> None:
    """Fill in problems and verdicts; the first boot is the native one, which nothing can pass without.

    ``known``: the lines of their consoles that differ by nature; ``again`` settles what is the guest's randomness.
    """
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
            after = f" after {boot.instructions} instructions" if boot.reason == "limit" else ""
            boot.problems.append(f"it ends with {boot.reason}{after}, the native one with {first.reason}")
        else:
            boot.problems += _final(first, boot)
        line = first_difference(first.console, boot.console, known)
        if line:
            boot.problems.append(line)
        boot.verdict = "fail" if boot.problems else "pass"
    made = [b for b in others if b.kind in ("self", "static")]
    if shown and len(made) == 2 and not any(b.problems for b in made):
        _same_calls(made[0], made[1], again)
        patched, planned = (b.text for b in made)
        odd = [at for at in planned if patched.get(at) != planned[at]]
        if odd:
            made[1].problems.append(
                f"{len(odd)} sites end up otherwise than the kernel patches them itself: the first, at physical "
                f"{odd[0]:#x}, is {planned[odd[0]].hex()}, and {patched[odd[0]].hex()} there"
            )
        if made[1].problems:
            made[1].verdict = "fail"


def _same_calls(own: Boot, static: Boot, again: Again | None) -> None:
    """The two must make the same calls, but for what the guest's own randomness decides.

    A kernel places stacks and mappings at random, seeded by its clocks, and may or may not have a page table to free
    at the end. So where a call is made in one boot only, both are run again with their clocks put forward: a call that
    the same boot makes with one clock and not with another tells nothing about the patches.
    """
    open_ = set(own.calls) ^ set(static.calls)
    by_chance: dict[str, int] = {}
    for turn in range(1, TURNS + 1):
        for boot in (own, static):
            if not open_ or again is None:
                break
            other = again(boot.kind, turn)
            if other.reason != boot.reason or other.violation is not None:
                static.problems.append(
                    f"with its clocks put forward ({turn}) the {boot.kind} boot ends with {other.reason}"
                )
                return
            for name in sorted(open_):
                if (name in other.calls) != (name in boot.calls):
                    by_chance[name] = turn
                    open_.discard(name)
    if by_chance:
        static.notes.append(
            f"calls of chance, not compared: {', '.join(sorted(by_chance))} (the same boot makes them or not, "
            f"as its clocks stand; seen after {max(by_chance.values())} of {TURNS} turns)"
        )
    if open_:
        static.problems.append(f"calls made in one boot only: {', '.join(sorted(open_))}")


def _final(first: Boot, boot: Boot) -> list[str]:
    found = []
    for name in FINAL:
        mask = 0xFFFF_FFFF & ~(TS if name == "cr0" else 0)
        one, other = first.view.get(name, 0) & mask, boot.view.get(name, 0) & mask
        if one != other:
            found.append(f"at the end the guest's {name} is {other:#x}, natively {one:#x}")
    return found
