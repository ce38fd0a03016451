"""The 16550A against National's PC16550D data sheet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machineparts import Line

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.uart import Uart

OUT2 = 8


@pytest.fixture
def sent() -> bytearray:
    return bytearray()


@pytest.fixture
def uart(bus: Bus, line: Line, sent: bytearray) -> Uart:
    uart = Uart(line, sent.append)
    uart.attach(bus, 0x3F8)
    uart.port_write(0x3FB, 1, 0x03)
    uart.port_write(0x3FC, 1, OUT2)
    return uart


def test_reset_values(bus: Bus, line: Line) -> None:
    uart = Uart(line)
    uart.attach(bus, 0x3F8)
    assert [bus.port_read(0x3F8 + register, 1) for register in (1, 2, 3, 4, 5)] == [0, 1, 0, 0, 0x60]


def test_divisor_latch(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FB, 1, 0x83)
    bus.port_write(0x3F8, 2, 0x1234)
    assert bus.port_read(0x3F8, 2) == 0x1234
    bus.port_write(0x3FB, 1, 0x03)
    assert uart.divisor == 0x1234
    assert bus.port_read(0x3F9, 1) == 0


def test_sending(bus: Bus, uart: Uart, sent: bytearray) -> None:
    for byte in b"hello":
        bus.port_write(0x3F8, 1, byte)
    assert sent == b"hello"
    bus.port_write(0x3FB, 1, 0x02)  # seven data bits
    bus.port_write(0x3F8, 1, 0xC1)
    assert sent[-1] == 0x41


def test_transmitter_interrupt(bus: Bus, uart: Uart, line: Line) -> None:
    bus.port_write(0x3F9, 1, 2)
    assert line.level
    assert bus.port_read(0x3FA, 1) == 0x02
    assert bus.port_read(0x3FA, 1) == 0x01  # reading IIR resets this cause
    assert not line.level
    rises = line.rises
    bus.port_write(0x3F8, 1, 65)
    bus.port_write(0x3F8, 1, 66)
    assert line.rises == rises + 2  # each byte makes an edge for the 8259


def test_out2_gates_the_line(bus: Bus, uart: Uart, line: Line) -> None:
    bus.port_write(0x3F9, 1, 2)
    bus.port_write(0x3FC, 1, 0)
    assert not line.level
    bus.port_write(0x3FC, 1, OUT2)
    assert line.level


def test_receiving_without_fifo(bus: Bus, uart: Uart, line: Line) -> None:
    bus.port_write(0x3F9, 1, 1)
    uart.receive(b"ab")
    assert line.level
    assert bus.port_read(0x3FD, 1) & 1
    assert bus.port_read(0x3FA, 1) == 4
    assert bus.port_read(0x3F8, 1) == ord("a")
    assert line.rises == 2
    assert bus.port_read(0x3F8, 1) == ord("b")
    assert not line.level
    assert not bus.port_read(0x3FD, 1) & 1


def test_fifo_trigger_levels_and_timeout(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3F9, 1, 1)
    bus.port_write(0x3FA, 1, 0xC7)  # FIFO on, cleared, trigger at 14
    assert bus.port_read(0x3FA, 1) == 0xC1
    uart.receive(bytes(13))
    assert bus.port_read(0x3FA, 1) == 0xCC
    uart.receive(bytes(1))
    assert bus.port_read(0x3FA, 1) == 0xC4
    uart.receive(bytes(10))
    assert len(uart.fifo) == 16
    assert len(uart.waiting) == 8
    bus.port_write(0x3FA, 1, 0xC3)
    assert len(uart.fifo) == 8


def test_loopback(bus: Bus, uart: Uart, sent: bytearray, line: Line) -> None:
    bus.port_write(0x3FC, 1, 0x10 | 0x0A)  # loop, RTS and OUT2
    assert bus.port_read(0x3FE, 1) & 0xF0 == 0x90  # CTS from RTS, DCD from OUT2
    bus.port_write(0x3F8, 1, 0x5A)
    assert sent == b""
    assert bus.port_read(0x3FD, 1) & 1
    assert bus.port_read(0x3F8, 1) == 0x5A
    bus.port_write(0x3F8, 1, 1)
    bus.port_write(0x3F8, 1, 2)
    assert bus.port_read(0x3FD, 1) & 2  # overrun
    assert not bus.port_read(0x3FD, 1) & 2  # cleared by the read


def test_modem_status_deltas(bus: Bus, uart: Uart) -> None:
    bus.port_read(0x3FE, 1)
    bus.port_write(0x3FC, 1, 0x10)
    assert bus.port_read(0x3FE, 1) == 0x0B  # CTS, DSR and DCD fell
    bus.port_write(0x3FC, 1, 0x14)
    assert bus.port_read(0x3FE, 1) == 0x40
    bus.port_write(0x3FC, 1, 0x10)
    assert bus.port_read(0x3FE, 1) == 0x04  # trailing edge of RI


def test_line_status_has_the_highest_priority(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3F9, 1, 0x0F)
    bus.port_write(0x3FC, 1, 0x18)
    for byte in (1, 2):
        bus.port_write(0x3F8, 1, byte)
    assert bus.port_read(0x3FA, 1) == 6
    bus.port_read(0x3FD, 1)
    assert bus.port_read(0x3FA, 1) == 4
    bus.port_read(0x3F8, 1)
    assert bus.port_read(0x3FA, 1) == 2
    assert bus.port_read(0x3FA, 1) == 0
    bus.port_read(0x3FE, 1)
    assert bus.port_read(0x3FA, 1) == 1


def test_scratch(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FF, 1, 0xA5)
    assert bus.port_read(0x3FF, 1) == 0xA5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 255)), max_size=100))
def test_any_sequence_is_harmless(steps: list[tuple[int, int]]) -> None:
    bus, line = Bus(), Line()
    uart = Uart(line)
    uart.attach(bus, 0x3F8)
    for what, value in steps:
        if what < 8:
            bus.port_write(0x3F8 + what, 1, value)
        elif what == 8:
            uart.receive(bytes([value]))
        assert 0 <= bus.port_read(0x3F8 + (value & 7), 1) <= 255
        assert len(uart.fifo) <= 16
        assert line.level == (uart._cause() != 1 and bool(uart.mcr & 8) and not uart.mcr & 16)


def test_loopback_sends_as_many_bits_as_a_word_has(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FC, 1, 0x18)
    for word_length, expected in ((0, 0x1F), (1, 0x3F), (2, 0x7F), (3, 0xFF)):
        bus.port_write(0x3FB, 1, word_length)
        bus.port_write(0x3F8, 1, 0xFF)
        assert bus.port_read(0x3F8, 1) == expected


def test_the_receiver_buffer_keeps_its_byte_without_fifo(bus: Bus, uart: Uart) -> None:
    uart.receive(b"x")
    assert [bus.port_read(0x3F8, 1), bus.port_read(0x3F8, 1)] == [ord("x"), ord("x")]
    bus.port_write(0x3FA, 1, 1)
    assert bus.port_read(0x3F8, 1) == 0


def test_only_a_transmitter_reset_or_a_change_of_mode_asks_for_bytes(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FA, 1, 1)
    bus.port_write(0x3F9, 1, 2)
    bus.port_read(0x3FA, 1)
    bus.port_write(0x3FA, 1, 0x41)
    assert bus.port_read(0x3FA, 1) == 0xC1
    bus.port_write(0x3FA, 1, 5)
    assert bus.port_read(0x3FA, 1) == 0xC2
    bus.port_write(0x3FA, 1, 0)
    assert bus.port_read(0x3FA, 1) == 0x02


def test_only_a_rising_enable_asks_for_bytes(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3F9, 1, 2)
    bus.port_read(0x3FA, 1)
    bus.port_write(0x3F9, 1, 3)
    assert bus.port_read(0x3FA, 1) == 1


def test_fifo_keeps_its_bytes_unless_reset(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FA, 1, 1)
    uart.receive(b"abc")
    bus.port_write(0x3FA, 1, 0x41)
    assert bus.port_read(0x3F8, 1) == ord("a")
    bus.port_write(0x3FA, 1, 0x43)
    assert not bus.port_read(0x3FD, 1) & 1


def test_the_divisor_hides_two_registers_only(bus: Bus, uart: Uart) -> None:
    bus.port_write(0x3FB, 1, 0x83)
    bus.port_write(0x3FA, 1, 1)
    assert uart.divisor == 12
    assert uart.fcr == 1
