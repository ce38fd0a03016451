"""The run loop, its ends and snapshots, with a processor that follows a script."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from machineparts import PlainMemory

from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine
from vmipatch.emu.machine.snapshot import SavedMemory
from vmipatch.errors import EmulatorError

MIB = 1 << 20


class Exit:
    LIMIT, HALT, SHUTDOWN, BREAKPOINT, REQUESTED = 1, 2, 3, 4, 11


class ScriptedCpu:
    """Each instruction is a no-operation unless the script has an action for it."""

    def __init__(self, memory: ScriptedMemory, bus: object) -> None:
        self.bus = bus
        self.instructions = 0
        self.interrupt_line = False
        self.tsc_offset = 0
        self.eflags = 0x202
        self.script: dict[int, Callable[[], None] | str] = {}
        self.taken: list[tuple[int, int]] = []
        self.runs: list[int] = []
        self.exit_wanted = False
        self.halted = False

    def reset(self) -> None:
        self.halted = False

    def nmi(self) -> None:
        """Not used here."""

    def set_a20(self, enabled: bool) -> None:
        """Not used here."""

    def request_exit(self) -> None:
        self.exit_wanted = True

    def save(self) -> tuple[int, bool, int]:
        return self.instructions, self.halted, self.tsc_offset

    def restore(self, state: tuple[int, bool, int]) -> None:
        self.instructions, self.halted, self.tsc_offset = state

    def run(self, until: int) -> int:
        self.runs.append(until)
        while True:
            if self.interrupt_line and self.eflags & 0x200:
                self.halted = False
                self.taken.append((self.instructions, self.bus.acknowledge()))  # type: ignore[attr-defined]
                self.bus.port_write(0x20, 1, 0x20)  # type: ignore[attr-defined]
            if self.exit_wanted:
                self.exit_wanted = False
                return Exit.REQUESTED
            if self.halted:
                return Exit.HALT
            if self.instructions >= until:
                return Exit.LIMIT
            action = self.script.get(self.instructions)
            if action == "shutdown":
                return Exit.SHUTDOWN
            self.instructions += 1
            if action == "hlt":
                self.halted = True
            elif callable(action):
                action()


class ScriptedMemory(PlainMemory):
    def __init__(self, ram_bytes: int) -> None:
        super().__init__(ram_bytes)
        self.dirty: set[int] = set()

    @property
    def used(self) -> int:
        return len(self.store)

    def write_backing(self, offset: int, data: bytes) -> None:
        super().write_backing(offset, data)
        self.dirty |= set(range(offset >> 12, (offset + len(data) + 4095) >> 12))

    def write(self, physical: int, data: bytes) -> None:
        super().write(physical, data)
        page = self.pages[physical >> 12]
        self.dirty.add(page[0] >> 12)

    def read_backing(self, offset: int, length: int) -> bytes:
        return bytes(self.store[offset : offset + length])

    def dirty_pages(self) -> list[int]:
        return sorted(self.dirty)

    def clear_dirty(self) -> None:
        self.dirty.clear()

    def restore_pages(self, saved: SavedMemory, pages: list[int]) -> None:
        self.restored = list(pages)
        for page in pages:
            self.store[page << 12 : (page + 1) << 12] = saved.page(page)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    module = types.ModuleType("vmipatch.emu.cpu")
    module.Cpu, module.Memory, module.Exit = ScriptedCpu, ScriptedMemory, Exit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vmipatch.emu.cpu", module)
    machine = Machine(BoardOptions(ram_bytes=MIB))
    machine.bus.port_write(0x3FB, 1, 3)
    return machine


def start_timer(machine: Machine, ticks: int = 1193, mode: int = 2) -> None:
    out = machine.bus.port_write
    for port, value in (
        (0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0x43, 0x30 | mode << 1),
        (0x40, ticks & 0xFF), (0x40, ticks >> 8),
    ):  # fmt: skip
        out(port, 1, value)


def test_limit(machine: Machine) -> None:
    outcome = machine.run(limit=1000)
    assert (outcome.reason, outcome.instructions, outcome.virtual_ns) == ("limit", 1000, 10_000)
    assert machine.run(limit=1000).reason == "limit"


def test_interrupts_come_at_exact_instructions(machine: Machine) -> None:
    start_timer(machine)
    machine.run(limit=1_000_000)  # 10 ms
    cpu = machine.cpu
    assert [vector for _, vector in cpu.taken] == [8] * 10
    # OUT rises 1193 ticks after the count was loaded at tick 1: 1000.686 us, at the next instruction boundary.
    assert cpu.taken[0][0] == -(-1194 * 10**9 // 1_193_182 // 10)


def test_a_timer_armed_in_the_middle_of_a_run_is_met(machine: Machine) -> None:
    cpu = machine.cpu
    cpu.script[500] = lambda: start_timer(machine, 119)  # 100 us
    machine.run(limit=100_000)
    assert cpu.taken
    assert 10_400 < cpu.taken[0][0] < 10_700


def test_halt_jumps_to_the_next_interrupt(machine: Machine) -> None:
    start_timer(machine, 0xFFFF)
    cpu = machine.cpu
    cpu.script[10] = "hlt"
    outcome = machine.run(limit=2000)
    assert outcome.instructions == 2000
    assert cpu.taken[0][0] == 11
    assert outcome.virtual_ns > 54_000_000
    assert cpu.tsc_offset == (outcome.virtual_ns - 20_000) // 10
    assert machine.exits["halt"] == 1


def test_halt_with_interrupts_off_is_the_end(machine: Machine) -> None:
    machine.cpu.script[10] = "hlt"
    machine.cpu.eflags = 2
    assert machine.run(limit=100).reason == "halt"


def test_halt_from_which_nothing_wakes(machine: Machine) -> None:
    machine.cpu.script[10] = "hlt"
    outcome = machine.run()
    assert (outcome.reason, outcome.instructions) == ("asleep", 11)


def test_halt_with_a_masked_timer_ends_after_ten_minutes(machine: Machine) -> None:
    start_timer(machine, 0xFFFF)
    machine.bus.port_write(0x21, 1, 0xFF)
    machine.cpu.script[10] = "hlt"
    outcome = machine.run()
    assert outcome.reason == "asleep"
    assert 599 < outcome.virtual_ns / 10**9 <= 600


@pytest.mark.parametrize(
    ("port", "size", "value", "reason", "code"),
    [
        (0x604, 2, 0x2000, "poweroff", None),
        (0x64, 1, 0xFE, "reset", None),
        (0xCF9, 1, 6, "reset", None),
        (0x92, 1, 3, "reset", None),
        (0xF4, 1, 7, "debug exit", 15),
    ],
)
def test_ends_by_port(machine: Machine, port: int, size: int, value: int, reason: str, code: int | None) -> None:
    machine.board.power.enable_at(0x600)
    machine.cpu.script[10] = lambda: machine.bus.port_write(port, size, value)
    outcome = machine.run(limit=100)
    assert (outcome.reason, outcome.instructions, outcome.exit_code) == (reason, 11, code)


def test_triple_fault_and_other_exits(machine: Machine) -> None:
    machine.cpu.script[10] = "shutdown"
    outcome = machine.run(limit=100)
    assert (outcome.reason, outcome.instructions) == ("triple fault", 10)
    machine.hooks[Exit.SHUTDOWN] = lambda machine: bool(machine.cpu.script.pop(10)) or True
    assert machine.run(limit=100).reason == "limit"


def test_until_on_the_serial_and_debug_consoles(machine: Machine) -> None:
    for index, byte in enumerate(b"x login: y"):
        machine.cpu.script[10 + index] = lambda byte=byte: machine.bus.port_write(0x3F8, 1, byte)  # type: ignore[misc]
    outcome = machine.run(limit=1000, until="login:")
    assert (outcome.reason, outcome.instructions) == ("until", 18)
    assert bytes(machine.board.consoles.serial) == b"x login:"
    machine.cpu.script[30] = lambda: machine.bus.port_write(0xE9, 1, ord("!"))
    assert machine.run(limit=1000, until="!").reason == "until"
    assert machine.run(limit=1000, until="login:").reason == "limit"


def test_until_on_the_screen(machine: Machine) -> None:
    def draw() -> None:
        machine.memory.write(0xB8000 + 160, b"P\x07a\x07s\x07s\x07")

    machine.cpu.script[10] = draw
    assert machine.run(limit=5_000_000, until="Pass").reason == "until"


def test_deferred_actions_run_at_the_boundary(machine: Machine) -> None:
    seen: list[int] = []
    machine.cpu.script[10] = lambda: machine.defer(lambda m: seen.append(m.cpu.instructions))
    machine.run(limit=100)
    assert seen == [11]


def test_stepping_hook(machine: Machine) -> None:
    seen: list[int] = []
    machine.on_instruction = lambda m: seen.append(m.cpu.instructions)
    machine.run(limit=5)
    assert seen == [0, 1, 2, 3, 4]


def test_snapshot_brings_back_everything(machine: Machine) -> None:
    start_timer(machine)
    machine.run(limit=50_000)
    machine.bus.port_write(0x3F8, 1, 65)
    machine.memory.write(0x5000, b"before")
    base = machine.snapshot()

    def rest() -> tuple[object, ...]:
        machine.cpu.taken.clear()
        machine.memory.write(0x5000, b"after!")
        machine.bus.port_write(0x3F8, 1, 66)
        machine.bus.port_write(0xCF8, 4, 0x80000058)
        machine.bus.port_write(0xCFD, 1, 0x30)
        outcome = machine.run(limit=400_000)
        return outcome, tuple(machine.cpu.taken), machine.clock.next_deadline, bytes(machine.board.consoles.serial)

    first = rest()
    machine.restore(base)
    assert machine.memory.read(0x5000, 6) == b"before"
    assert bytes(machine.board.consoles.serial) == b"A"
    assert machine.board.host_bridge.attributes(0xF0000) == 0
    assert len(machine.memory.restored) < 5
    assert rest() == first
    other = machine.snapshot()
    machine.restore(base)  # not the latest base: what may differ from it is copied, too
    assert machine.memory.read(0x5000, 6) == b"before"
    machine.restore(other)
    assert machine.memory.read(0x5000, 6) == b"after!"


@pytest.mark.parametrize(
    "options",
    [
        BoardOptions(ram_bytes=MIB // 2),
        BoardOptions(ram_bytes=MIB + 1),
        BoardOptions(ram_bytes=4096 * MIB),
        BoardOptions(ns_per_instruction=0),
        BoardOptions(date=datetime(1, 1, 1, tzinfo=UTC)),
        BoardOptions(roms=(b"",)),
    ],
)
def test_boards_that_cannot_be(options: BoardOptions) -> None:
    with pytest.raises(EmulatorError):
        Machine(options)


def test_snapshots_share_what_did_not_change(machine: Machine) -> None:
    machine.memory.write(0x5000, b"one")
    machine.memory.write(0x9000, b"two")
    first = machine.snapshot()
    machine.memory.write(0x5000, b"ONE")
    second = machine.snapshot()
    machine.memory.write(0x9000, bytes(4096))
    third = machine.snapshot()
    assert second.memory.page(9) is first.memory.page(9)
    assert second.memory.page(5) != first.memory.page(5)
    assert third.memory.held == second.memory.held - 1  # a page of zeros is none
    assert list(second.memory.unlike(first.memory)) == [5]
    assert list(first.memory.unlike(third.memory)) == [5, 9]
    for snapshot, texts in ((first, (b"one", b"two")), (third, (b"ONE", bytes(3))), (second, (b"ONE", b"two"))):
        machine.memory.write(0xD000, b"junk")
        machine.restore(snapshot)
        assert (machine.memory.read(0x5000, 3), machine.memory.read(0x9000, 3)) == texts
        assert machine.memory.read(0xD000, 4) == bytes(4)
    machine.restore(first)
    assert len(machine.memory.restored) == 1, "a page that both hold is not copied"
