"""The test stand: one machine with the kernel and the ROM, and states of it to start from, each in two forms.

May import emu, patch's results, rombuild and the other parts of this package.  The kernel is booted on the bare
machine with the ROM in place but no hypervisor behind it, so it stays native (and leaves room for the hole).  At
chosen moments of that run the machine is kept twice: as it is, at CPL 0, and as the hypervisor's init call leaves
it.  Both forms are thus one state.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from vmipatch.emu.firmware import option_rom
from vmipatch.emu.firmware.boot import BootOptions, boot
from vmipatch.emu.hypervisors import create
from vmipatch.emu.hypervisors.base import OK
from vmipatch.emu.hypervisors.violation import Violation
from vmipatch.emu.machine.board import MEBIBYTE, BoardOptions
from vmipatch.emu.machine.machine import Machine, Outcome
from vmipatch.emu.machine.rtc import DEFAULT_DATE
from vmipatch.emu.machine.snapshot import Snapshot
from vmipatch.errors import EmulatorError
from vmipatch.validate import reference
from vmipatch.validate.subject import REGISTERS, Subject

AREAS = (0xD8000, 0xC8000)
"""Physical addresses for the native code that stubs are compared with, wherever the ROM is not."""
AREA = 0x8000
BACK = 0x7FF0
"""In that area: where a call returns to."""
STACK_WORDS = 16
SPARE = 4
"""Moments to choose from for each one wanted, where no site tells the kernel's."""
SEEN_PER_SITE = 3
MOST_BREAKPOINTS = 1000
SHIFT_DATE, SHIFT_NS = timedelta(seconds=86_477), 1_234_567
"""Of the date and of the time since power-on: odd enough that no counter of the guest's comes round to the same."""
EVERY_VECTOR = frozenset(range(256))


@dataclass(frozen=True)
class Setup:
    """What is booted, and how."""

    kernel: bytes
    file: str
    rom: bytes
    rom_base: int
    hypervisor: str
    append: str = ""
    initrd: bytes | None = None
    memory_mib: int = 64
    until: str | None = "vmi-guest: done"
    limit: int = 2_000_000_000
    shift: int = 0
    """How far the clocks are put forward at power-on: so many times ``SHIFT_DATE`` and ``SHIFT_NS``."""


@dataclass(frozen=True)
class Seen:
    """A site as the native run met it: instruction count, registers, EFLAGS, the words on the stack."""

    at: int
    registers: dict[str, int]
    flags: int
    stack: tuple[int, ...]


@dataclass
class Base:
    """One moment of the native run, in both forms; ``instructions`` since power-on."""

    instructions: int
    native: Snapshot
    lowered: Snapshot


@dataclass
class Stand:
    """The machine, the moments, and what the native run saw at each site."""

    setup: Setup
    machine: Machine
    page_offset: int
    bases: list[Base] = field(default_factory=list)
    seen: dict[int, list[Seen]] = field(default_factory=dict)
    native_run: Outcome | None = None
    rejected_bases: list[str] = field(default_factory=list)
    stubs: dict[str, int] = field(default_factory=dict)
    references: dict[str, int] = field(default_factory=dict)

    @property
    def rom(self) -> int:
        """The linear address of the ROM."""
        return (self.page_offset + self.setup.rom_base) & 0xFFFFFFFF

    @property
    def back(self) -> int:
        """The linear address that a call returns to."""
        return (self.page_offset + area(self.setup) + BACK) & 0xFFFFFFFF


def area(setup: Setup) -> int:
    """The physical address of the native code."""
    first, last = setup.rom_base, setup.rom_base + len(setup.rom)
    return next(at for at in AREAS if last <= at or first >= at + AREA)


def build_machine(setup: Setup, *, hypervisor: bool, rom: bool, kernel: bytes | None = None) -> Machine:
    """A machine about to enter the kernel; ``hypervisor``: it can be found by the guest."""
    date = DEFAULT_DATE + setup.shift * SHIFT_DATE
    machine = Machine(BoardOptions(ram_bytes=setup.memory_mib * MEBIBYTE, vga=True, date=date))
    machine.sleep_until(setup.shift * SHIFT_NS)
    personality: Any = create(setup.hypervisor)
    personality.attach(machine, found=hypervisor)
    options = BootOptions(
        append=setup.append, initrd=setup.initrd, rom=setup.rom if rom else None, rom_base=setup.rom_base
    )
    boot(machine, setup.kernel if kernel is None else kernel, options, setup.file)
    machine.board.consoles.serial.clear()  # what the ROM's own init printed is not the kernel's
    return machine


def prepare(setup: Setup, page_offset: int, subjects: Sequence[Subject], abi: str, moments: int) -> Stand:
    """Boot twice: once to see the sites and the end, once to keep the moments.

    Raises :class:`EmulatorError` where the kernel does not come to its end natively.
    """
    with_rom = setup.hypervisor != "native"
    first = _with_reference(build_machine(setup, hypervisor=False, rom=with_rom), setup, abi)
    stand = Stand(setup, first, page_offset)
    stand.native_run = _watch(stand, first, subjects)
    if stand.native_run.reason not in ("until", "poweroff") or not _reached(first, setup.until):
        goal = "a power-off" if setup.until is None else repr(setup.until)
        raise EmulatorError(
            f"the kernel does not come to {goal} on the bare machine: {stand.native_run.reason} after "
            f"{stand.native_run.instructions} instructions",
            file=setup.file,
        )
    chosen = _moments(stand, moments)
    del first
    stand.machine = machine = _with_reference(build_machine(setup, hypervisor=False, rom=with_rom), setup, abi)
    gc.collect()  # the first machine and its hypervisor hold each other, and megabytes
    for at in chosen:
        if len(stand.bases) < moments:
            _keep(stand, machine, at)
    return stand


def _moments(stand: Stand, count: int) -> list[int]:
    """Instruction counts to keep the machine at: where sites were met, else all through the run.

    Of the latter more than are wanted, since the kernel may not be what runs there.
    """
    hits = sorted({s.at for many in stand.seen.values() for s in many})
    if hits:
        return sorted({hits[i * (len(hits) - 1) // max(1, count - 1)] for i in range(count)})
    end = stand.native_run.instructions if stand.native_run is not None else 0
    return [end * n // (SPARE * count + 1) for n in range(SPARE, SPARE * (count + 1))][: SPARE * count]


def _reached(machine: Machine, until: str | None) -> bool:
    return until is None or until.encode() in bytes(machine.board.consoles.serial)


def _with_reference(machine: Machine, setup: Setup, abi: str) -> Machine:
    code, _ = reference.blob(abi)
    bridge = machine.board.host_bridge
    at = area(setup)
    bridge.set_attributes(at, at + AREA, 3)
    machine.memory.write(at, code)
    return machine


def _watch(stand: Stand, machine: Machine, subjects: Sequence[Subject]) -> Outcome:
    """Run to the end, noting registers and stack the first times that each site is met at CPL 0."""
    cpu = machine.cpu
    wanted = [s.address for s in subjects if not s.is_call][:MOST_BREAKPOINTS]
    for address in wanted:
        cpu.add_breakpoint(address)

    def note(_: Machine) -> bool:
        address = cpu.linear_eip
        many = stand.seen.setdefault(address, [])
        if cpu.get("cpl") == 0 and cpu.get("cr0") >> 31:
            esp = cpu.get("esp")
            raw = cpu.read_linear(esp, 4 * STACK_WORDS)
            if raw is not None:
                registers = {name: cpu.get(name) for name in REGISTERS}
                many.append(Seen(cpu.instructions, registers, cpu.eflags, struct.unpack(f"<{STACK_WORDS}I", raw)))
        if len(many) >= SEEN_PER_SITE:
            cpu.remove_breakpoint(address)
        return True

    machine.hooks[machine.exit.BREAKPOINT] = note
    outcome = machine.run(stand.setup.limit, stand.setup.until)
    for address in wanted:
        cpu.remove_breakpoint(address)
    return outcome


def _keep(stand: Stand, machine: Machine, at: int) -> None:
    """Run on to an instruction, and keep the machine there in both forms."""
    machine.run(limit=at)
    personality: Any = machine.personality
    if machine.cpu.get("cpl") or not machine.cpu.get("cr0") >> 31:
        stand.rejected_bases.append(f"at instruction {at}: not the kernel")
        return
    plain = machine.snapshot()
    if stand.setup.hypervisor == "native":
        # Only now: a guest that had met it would have begun to use it.
        option_rom.place(machine, stand.setup.rom, stand.setup.rom_base)
    # Every fault and interrupt of the native form ends a trial, too.
    personality.set_hooks(EVERY_VECTOR)
    native = machine.snapshot()
    machine.restore(plain)
    lowered = native
    if stand.setup.hypervisor != "native":
        try:
            result = personality.start(stand.rom)
        except Violation as violation:
            result = str(violation)
        if result != OK:
            stand.rejected_bases.append(f"at instruction {at}: the init call says {result}")
            machine.restore(plain)
            return
        lowered = machine.snapshot()
        machine.restore(plain)
    stand.bases.append(Base(at, native, lowered))


def places(stand: Stand, stubs: Mapping[str, int], abi: str) -> None:
    """Fill in where the ROM's stubs (linear addresses) and the native code are, as the kernel sees them."""
    stand.stubs = dict(stubs)
    _, offsets = reference.blob(abi)
    at = stand.page_offset + area(stand.setup)
    stand.references = {name: (at + offset) & 0xFFFFFFFF for name, offset in offsets.items()}


def read_file(path: Path) -> bytes:
    """A file's bytes; raises :class:`EmulatorError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise EmulatorError(f"cannot be read: {error.strerror or error}", file=path) from error
