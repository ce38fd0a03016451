"""Starting states that make sense for a call: arguments, memory, flags, and what to look at afterwards.

May import stand and subject.  A state is made once, in terms of what the guest can see, and used for both runs.
Random parts come from a generator seeded by the subject and the state's number, so that one state can be run
again alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vmipatch.emu.machine.machine import Machine
from vmipatch.validate.subject import REGISTERS, Subject

IF, DF, TF, NT, IOPL = 0x200, 0x400, 0x100, 0x4000, 0x3000
ARITHMETIC = 0x8D5
PAGE = 4096
# Calls whose arguments point at what only the moment itself had, or that want more than registers.
OF_THE_MOMENT = frozenset(
    (
        "IRET",
        "SYSEXIT",
        "UpdateKernelStack",
        "SetCR3",
        "SetGDT",
        "SetIDT",
        "SetLDT",
        "SetTR",
        "Reboot",
        "Shutdown",
        "Halt",
    )
)
Check = Callable[[Any], str]
"""Looks at the personality after a run; what is wrong, or an empty text."""


@dataclass
class State:
    """One starting state on top of a base.

    ``writes``: linear address and bytes, stored before the run · ``warm``: linear addresses whose translation is in
    the TLB before the writes · ``probes``: linear addresses read after the run · ``destination``: EIP where the
    run ends instead of behind the site · ``kernel_words``: words of ``stack`` that are selectors of the kernel ·
    ``before``, ``check``: an effect that only the host can see, set up and looked at (``of_machine``: by the machine
    alone, so also where no hypervisor is) · ``exact_flags``: flags that
    count although the call may change flags · ``cr0``, ``sysenter_cs``, ``segments``, ``debug`` (DR0 to DR3):
    registers to begin with · ``ignore_results``: what comes back is the hypervisor's own, and ``check`` looks at
    it · ``time_results``:
    it is a time, and need only be near · ``possible``: False where this base has no such state.
    """

    registers: dict[str, int]
    flags: int
    stack: tuple[int, ...] = ()
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    warm: list[int] = field(default_factory=list)
    probes: list[int] = field(default_factory=list)
    pending: bool = False
    destination: int | None = None
    kernel_words: list[int] = field(default_factory=list)
    before: Callable[[Any], object] | None = None
    check: Check | None = None
    of_machine: bool = False
    exact_flags: int = 0
    cr0: int | None = None
    sysenter_cs: int | None = None
    debug: tuple[int, ...] = ()
    segments: dict[str, int] = field(default_factory=dict)
    ignore_results: bool = False
    time_results: bool = False
    possible: bool = True
    origin: str = "random"


@dataclass(frozen=True)
class Surroundings:
    """What a base offers to make states of: tables, spare pages (linear, physical), selectors, an entry of a table."""

    gdt: tuple[int, int]
    idt: tuple[int, int]
    ldt: int
    tss: int
    tss_selector: int
    cr0: int
    cr3: int
    cr4: int
    esp: int
    kernel_cs: int
    kernel_ds: int
    user_cs: int
    user_ds: int
    user_page: int
    sysenter_cs: int
    spare: tuple[tuple[int, int], ...]
    gdt_bytes: bytes
    idt_bytes: bytes
    directory: bytes
    page_offset: int
    table_frames: frozenset[int]
    """Frames of the page tables and directories in force."""
    pte: int
    """Linear address (through the direct map) of the page-table entry of the first spare page; 0 if it has none."""

    @property
    def stack(self) -> int:
        """ESP of every state: below where the kernel was."""
        return self.esp - 0x100 & ~3

    @property
    def entry_size(self) -> int:
        """Bytes of a page-table entry."""
        return 8 if self.cr4 & 0x20 else 4


def look_around(machine: Machine, page_offset: int) -> Surroundings:
    """Find out, from a machine that stands at a base in its native form."""
    cpu = machine.cpu
    gdt = cpu.get("gdtr_base"), cpu.get("gdtr_limit")
    user_cs = user_ds = 0
    raw = cpu.read_linear(gdt[0], gdt[1] + 1 & ~7) or b""
    for index in range(8, len(raw), 8):
        access = raw[index + 5]
        flat = raw[index + 6] & 0xF == 0xF and raw[index] == 0xFF
        if access & 0xF8 == 0xF8 and flat and not user_cs:
            user_cs = index | 3
        elif access & 0xFA == 0xF2 and flat and not user_ds:
            user_ds = index | 3
    spare = _spare_pages(machine, page_offset)
    return Surroundings(
        gdt=gdt,
        idt=(cpu.get("idtr_base"), cpu.get("idtr_limit")),
        ldt=cpu.get("ldtr"),
        tss=cpu.get("tr_base"),
        tss_selector=cpu.get("tr"),
        cr0=cpu.get("cr0"),
        cr3=cpu.get("cr3"),
        cr4=cpu.get("cr4"),
        esp=cpu.get("esp"),
        kernel_cs=cpu.get("cs"),
        kernel_ds=cpu.get("ss"),
        user_cs=user_cs,
        user_ds=user_ds,
        user_page=0x08048000,
        sysenter_cs=cpu.get("sysenter_cs"),
        spare=spare,
        gdt_bytes=raw,
        idt_bytes=cpu.read_linear(cpu.get("idtr_base"), min(0x800, cpu.get("idtr_limit") + 1)) or b"",
        directory=b"" if cpu.get("cr4") & 0x20 else machine.memory.read(cpu.get("cr3") & ~0xFFF, PAGE),
        page_offset=page_offset,
        table_frames=frozenset(_tables(machine)),
        pte=_entry_of(machine, spare[0][0], page_offset) if spare else 0,
    )


def _spare_pages(machine: Machine, page_offset: int, count: int = 6) -> tuple[tuple[int, int], ...]:
    """Pages of zeros in the direct map, from its upper end: nobody's."""
    found: list[tuple[int, int]] = []
    zeros = bytes(PAGE)
    top = min(machine.options.ram_bytes, (1 << 32) - page_offset)
    for physical in range(top - PAGE, 0x100000, -PAGE):
        if machine.cpu.translate(page_offset + physical) == physical and machine.memory.read(physical, PAGE) == zeros:
            found.append((page_offset + physical, physical))
            if len(found) == count:
                break
    return tuple(found)


def _entry_of(machine: Machine, linear: int, page_offset: int) -> int:
    cpu, memory = machine.cpu, machine.memory

    def word(physical: int, size: int) -> int:
        return int.from_bytes(memory.read(physical, size), "little")

    if cpu.get("cr4") & 0x20:
        top = word((cpu.get("cr3") & ~0x1F) + 8 * (linear >> 30), 8)
        entry = word((top & 0xF_FFFF_F000) + 8 * (linear >> 21 & 0x1FF), 8)
        place = (entry & 0xF_FFFF_F000) + 8 * (linear >> 12 & 0x1FF)
    else:
        entry = word((cpu.get("cr3") & ~0xFFF) + 4 * (linear >> 22), 4)
        place = (entry & 0xFFFF_F000) + 4 * (linear >> 12 & 0x3FF)
    return page_offset + place if entry & 0x81 == 1 else 0


def _tables(machine: Machine) -> Iterator[int]:
    """The frames of all that CR3 leads to but the pages themselves."""
    cr3 = machine.cpu.get("cr3")
    wide = bool(machine.cpu.get("cr4") & 0x20)

    def entries(physical: int, count: int) -> Iterator[int]:
        size = 8 if wide else 4
        raw = machine.memory.read(physical, size * count)
        for at in range(0, len(raw), size):
            entry = int.from_bytes(raw[at : at + size], "little")
            if entry & 1:
                yield entry & 0xF_FFFF_FFFF

    yield cr3 >> 12
    directories = [e & ~0xFFF for e in entries(cr3 & ~0x1F, 4)] if wide else [cr3 & ~0xFFF]
    for directory in directories:
        yield directory >> 12
        for entry in entries(directory, 512 if wide else 1024):
            if not entry & 0x80:
                yield entry >> 12


class Maker:
    """Makes states for one base."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around

    def make(self, subject: Subject, number: int, seen: list[Any]) -> State:
        """The state of that number: first those that the native run saw, then random ones."""
        rng = random.Random(f"{subject.op} {subject.address:x} {number}")
        if number < len(seen) and not subject.is_call:
            found = seen[number]
            state = State(dict(found.registers), found.flags, origin=f"seen at instruction {found.at}")
            state.registers["esp"] = self.around.stack
            state.stack = found.stack
            if subject.call.name in OF_THE_MOMENT:
                self._arrange(subject, state, rng, number)
            else:
                # Registers and memory are the run's; what of the results counts is the call's.
                judged = State(dict(state.registers), state.flags)
                self._arrange(subject, judged, rng, number)
                state.ignore_results = judged.ignore_results
                state.time_results = judged.time_results
                if subject.call.name == "GetCycleCounter":
                    state.time_results = state.registers["eax"] & 0xFF != 2
            return state
        registers = {name: rng.getrandbits(32) for name in REGISTERS}
        registers["esp"] = self.around.stack
        # In turn, so that even a few states have interrupts both on and off.
        flags = 2 | rng.getrandbits(12) & ARITHMETIC | (0, IF)[number & 1] | rng.choice((0, 0, 0, DF))
        # With interrupts on, one that waits comes before anything else.
        state = State(registers, flags, pending=rng.random() < (0.1 if flags & IF else 0.4))
        state.stack = tuple(rng.getrandbits(32) for _ in range(16))
        self._arrange(subject, state, rng, number)
        return state

    def _arrange(self, subject: Subject, state: State, rng: random.Random, number: int) -> None:
        from vmipatch.validate import arguments

        arguments.arrange(subject, self.around, state, rng, number)
