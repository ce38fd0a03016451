"""The 8042 and the small ports, against IBM's technical references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machineparts import Line, Time

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.keyboard import KeyboardController
from vmipatch.emu.machine.pit import Pit
from vmipatch.emu.machine.ports import REFRESH_NS, DebugPorts, SystemPorts


class Board:
    def __init__(self, bus: Bus, line: Line, time: Time) -> None:
        self.resets = 0
        self.a20 = True
        self.pit = Pit(time.clock, lambda level: None)
        self.system = SystemPorts(time.clock, self.pit, self.reset, self.set_a20)
        self.keyboard = KeyboardController(line, self.reset, self.system.drive_a20, self.system.is_a20)
        self.system.attach(bus)
        self.keyboard.attach(bus)
        self.pit.attach(bus)

    def reset(self) -> None:
        self.resets += 1

    def set_a20(self, enabled: bool) -> None:
        self.a20 = enabled


@pytest.fixture
def board(bus: Bus, line: Line, time: Time) -> Board:
    return Board(bus, line, time)


def command(bus: Bus, value: int) -> int | None:
    bus.port_write(0x64, 1, value)
    return bus.port_read(0x60, 1) if bus.port_read(0x64, 1) & 1 else None


def device(bus: Bus, *values: int) -> list[int]:
    answers = []
    for value in values:
        bus.port_write(0x60, 1, value)
        while bus.port_read(0x64, 1) & 1:
            answers.append(bus.port_read(0x60, 1))
    return answers


def test_self_tests(bus: Bus, board: Board) -> None:
    assert not bus.port_read(0x64, 1) & 4
    assert command(bus, 0xAA) == 0x55
    assert bus.port_read(0x64, 1) & 4
    assert command(bus, 0xAB) == 0x00
    assert command(bus, 0xA9) == 0x01  # no mouse: clock line low


def test_command_byte_and_memory(bus: Bus, board: Board) -> None:
    assert command(bus, 0x60) is None
    bus.port_write(0x60, 1, 0x45)
    assert command(bus, 0x20) == 0x45
    command(bus, 0x65)
    bus.port_write(0x60, 1, 0x99)
    assert command(bus, 0x25) == 0x99


def test_keyboard_commands(bus: Bus, board: Board) -> None:
    assert device(bus, 0xFF) == [0xFA, 0xAA]
    assert device(bus, 0xF2) == [0xFA, 0xAB, 0x41]
    assert device(bus, 0xEE) == [0xEE]
    assert device(bus, 0xED, 0x07) == [0xFA, 0xFA]
    assert board.keyboard.leds == 7
    assert device(bus, 0xF0, 0x00) == [0xFA, 0xFA, 0x41]
    assert device(bus, 0xF0, 0x01) == [0xFA, 0xFA]
    assert device(bus, 0xF0, 0x00) == [0xFA, 0xFA, 0x43]
    assert device(bus, 0x01) == [0xFE]
    assert device(bus, 0xF5) == [0xFA]
    board.keyboard.press(b"\x1e")
    assert not bus.port_read(0x64, 1) & 1
    assert device(bus, 0xF4) == [0xFA]


def test_interrupts_one_byte_at_a_time(bus: Bus, board: Board, line: Line) -> None:
    board.keyboard.press(b"\x1e\x9e")
    assert line.rises == 1
    assert bus.port_read(0x60, 1) == 0x1E
    assert line.rises == 2
    assert bus.port_read(0x60, 1) == 0x9E
    assert not line.level
    assert bus.port_read(0x60, 1) == 0x9E  # the buffer keeps its last byte


def test_disabled_keyboard_keeps_its_bytes(bus: Bus, board: Board, line: Line) -> None:
    command(bus, 0xAD)
    board.keyboard.press(b"\x1e")
    assert not line.level
    command_byte = command(bus, 0x20)
    assert command_byte is not None
    assert command_byte & 0x10
    bus.port_write(0x64, 1, 0xAE)
    assert line.level


def test_no_mouse_loopback_answers_without_the_aux_bit(bus: Bus, board: Board) -> None:
    bus.port_write(0x64, 1, 0xD3)
    bus.port_write(0x60, 1, 0xA5)
    assert bus.port_read(0x64, 1) & 0x21 == 0x01
    assert bus.port_read(0x60, 1) == 0xA5
    bus.port_write(0x64, 1, 0xD4)
    bus.port_write(0x60, 1, 0xF2)
    assert not bus.port_read(0x64, 1) & 1


def test_reset_line(bus: Bus, board: Board) -> None:
    bus.port_write(0x64, 1, 0xFE)
    assert board.resets == 1
    bus.port_write(0x64, 1, 0xFF)  # pulses nothing
    assert board.resets == 1
    bus.port_write(0x64, 1, 0xD1)
    bus.port_write(0x60, 1, 0xDE)
    assert board.resets == 2


def test_a20_from_both_gates(bus: Bus, board: Board) -> None:
    assert bus.port_read(0x92, 1) & 2
    bus.port_write(0x64, 1, 0xD1)
    bus.port_write(0x60, 1, 0xDD)
    assert not board.a20
    assert not bus.port_read(0x92, 1) & 2
    output = command(bus, 0xD0)
    assert output is not None
    assert not output & 2
    bus.port_write(0x92, 1, 2)
    assert board.a20
    bus.port_write(0x64, 1, 0xDD)
    assert not board.a20
    bus.port_write(0x64, 1, 0xDF)
    assert board.a20


def test_port_92_fast_reset_is_an_edge(bus: Bus, board: Board) -> None:
    bus.port_write(0x92, 1, 3)
    bus.port_write(0x92, 1, 3)
    assert board.resets == 1


def test_port_61(bus: Bus, board: Board, time: Time) -> None:
    assert not bus.port_read(0x61, 1) & 0x10
    time.pass_ns(REFRESH_NS)
    assert bus.port_read(0x61, 1) & 0x10
    bus.port_write(0x43, 1, 0xB0)  # channel 2, mode 0
    bus.port_write(0x61, 1, 1)
    bus.port_write(0x42, 1, 100)
    bus.port_write(0x42, 1, 0)
    assert bus.port_read(0x61, 1) & 0x2F == 1
    time.pass_ns(101 * 10**9 // 1_193_182 + 1000)
    assert bus.port_read(0x61, 1) & 0x2F == 0x21


def test_post_code(bus: Bus, board: Board) -> None:
    bus.port_write(0x80, 1, 0x42)
    assert board.system.post_code == 0x42
    assert bus.port_read(0x80, 1) == 0x42


def test_debug_ports(bus: Bus) -> None:
    text = bytearray()
    codes: list[int] = []
    DebugPorts(text.append, codes.append).attach(bus)
    assert bus.port_read(0xE9, 1) == 0xE9
    assert bus.port_read(0x402, 1) == 0xE9
    bus.port_write(0xE9, 1, 65)
    bus.port_write(0x402, 1, 66)
    bus.port_write(0xF4, 1, 0x10)
    bus.port_write(0xF4, 4, 0)
    assert text == b"AB"
    assert codes == [0x21, 1]


@given(st.lists(st.tuples(st.sampled_from([0x60, 0x64, 0x61, 0x92, 0]), st.integers(0, 255)), max_size=100))
def test_any_sequence_is_harmless(steps: list[tuple[int, int]]) -> None:
    bus, line = Bus(), Line()
    board = Board(bus, line, Time())
    for port, value in steps:
        if port:
            bus.port_write(port, 1, value)
        else:
            board.keyboard.press(bytes([value]))
        assert 0 <= bus.port_read((0x60, 0x61, 0x64, 0x92)[value & 3], 1) <= 255
        full = board.keyboard.current is not None
        assert line.level == (full and bool(board.keyboard.config & 1))
        assert len(board.keyboard.queue) <= 4 * len(steps)


def test_output_port_shows_a20_and_a_full_buffer(bus: Bus, board: Board) -> None:
    assert command(bus, 0xD0) == 0xCF & ~0x12 | 0x02
    board.keyboard.press(b"\x1e")
    bus.port_write(0x64, 1, 0xD0)
    assert bus.port_read(0x60, 1) == 0x1E
    assert bus.port_read(0x60, 1) == 0xCF & ~0x12 | 0x12


def test_port_92_drives_a20_and_resets_only_on_bit_0(bus: Bus, board: Board) -> None:
    bus.port_write(0x92, 1, 0)
    assert not board.a20
    bus.port_write(0x92, 1, 2)
    assert board.a20
    assert board.resets == 0
    bus.port_write(0x92, 1, 3)
    assert board.resets == 1


def test_a20_is_open_after_reset(board: Board) -> None:
    board.system.drive_a20(False)
    board.system.reset()
    assert board.a20
