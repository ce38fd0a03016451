"""The guest on the bare machine of the emulator: what it prints, how it ends, what its options do."""

from __future__ import annotations

import pytest
from guestmachine import BACKEND, DONE, FORMS, Boot, elf, expected

# What the guest is for; each must be a line of its console.
SUBJECTS = """
before VMI_Init: interrupt mask
before VMI_Init: page fault fixed up
descriptor tables
descriptor entries
control registers
CPUID
MSRs
time stamp
exceptions fixed up
interrupt mask
tick by IRQ 0, halting
pending tick
outside of the interface
watchpoint
breakpoint
mapping
accessed and dirty
write protection
lazy updates
large page
mapped page table
address space
late kernel table
ports
ports by strings
local APIC
state of a second processor
one-shot alarm
tick by the local timer
cycle counters
wall clock
kernel thread
ring 3: system calls
ring 3: pages on demand
ring 3: children
ring 3: copies on write
ring 3: cli
ring 3: an invalid opcode
ring 3: a division by zero
ring 3: rights to ports
ring 3: segments of its own
ring 3: FPU
ring 3: preemption
memory given back
""".strip().splitlines()


@pytest.mark.parametrize("form", FORMS)
def test_native_console(form: str) -> None:
    boot = Boot(elf(form))
    assert boot.run() == "poweroff"
    assert boot.lines == expected(form)
    assert boot.lines[-1] == DONE
    assert {f"{subject}: ok" for subject in SUBJECTS} <= set(boot.lines)
    assert boot.backend.startswith("native, ring 0, features ")
    # The line comes where VMI_Init would have been.
    assert [line.startswith(BACKEND) for line in boot.console].index(True) == 3
    assert boot.machine.cpu.instructions < 16_000_000


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_the_same(form: str) -> None:
    first, second = Boot(elf(form)), Boot(elf(form))
    assert first.run() == second.run()
    assert first.machine.cpu.instructions == second.machine.cpu.instructions
    assert first.console == second.console


@pytest.mark.parametrize("form", FORMS)
def test_a_check_that_fails_ends_the_run(form: str) -> None:
    """A machine with too little memory: the guest says so and leaves by the debug exit port."""
    boot = Boot(elf(form), memory=8)
    assert boot.run() == "debug exit"
    assert boot.lines == ["vmi-guest: start", "memory: FAILED: KiB above 1 MiB is 1c00, expected 3c00"]
    assert boot.machine.outcome().exit_code == 3  # QEMU's isa-debug-exit: 1 was written


@pytest.mark.parametrize(
    ("append", "gone"),
    [("vmi=disable_pse", 1 << 3), ("vmi=disable_pge", 1 << 13), ("vmi=disable_sep", 1 << 11), ("vmi=disable_timer", 0)],
)
def test_options_take_features_away(append: str, gone: int) -> None:
    plain, without = Boot(elf("mainline")), Boot(elf("mainline"), append=f"other={append} {append}")
    assert plain.run() == without.run() == "poweroff"
    assert without.lines == plain.lines
    features = [int(boot.backend.rpartition(" ")[2], 16) for boot in (plain, without)]
    assert features[0] & gone == gone
    assert features[1] == features[0] & ~gone
