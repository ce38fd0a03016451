"""The MC146818 against Motorola's data sheet."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machineparts import Line, Time

from vmipatch.emu.machine.rtc import Rtc

SECOND = 10**9
PIE, AIE, UIE = 0x40, 0x20, 0x10


def make(time: Time, line: Line, date: datetime | None = None) -> Rtc:
    return Rtc(time.clock, line, 64 << 20, date or datetime(2020, 2, 28, 23, 59, 58, tzinfo=UTC))


def get(rtc: Rtc, index: int) -> int:
    rtc.port_write(0x70, 1, index)
    return rtc.port_read(0x71, 1)


def put(rtc: Rtc, index: int, value: int) -> None:
    rtc.port_write(0x70, 1, index)
    rtc.port_write(0x71, 1, value)


def test_the_date_in_bcd_and_over_midnight_of_a_leap_year(time: Time, line: Line) -> None:
    rtc = make(time, line)
    assert [get(rtc, index) for index in (0, 2, 4, 7, 8, 9, 0x32)] == [
        0x58, 0x59, 0x23, 0x28, 0x02, 0x20, 0x20,
    ]  # fmt: skip
    assert get(rtc, 6) == 6  # a Friday; Sunday is 1
    time.pass_ns(2 * SECOND)
    assert [get(rtc, index) for index in (0, 2, 4, 7, 8)] == [0, 0, 0, 0x29, 2]


@pytest.mark.parametrize(
    ("mode", "hour", "expected"),
    [
        (0x02, 23, 0x23), (0x06, 23, 23), (0x00, 23, 0x91), (0x04, 23, 0x8B), (0x00, 0, 0x12),
        (0x00, 12, 0x92), (0x04, 1, 1),
    ],
)  # fmt: skip
def test_hour_formats(time: Time, line: Line, mode: int, hour: int, expected: int) -> None:
    rtc = make(time, line, datetime(2020, 1, 1, hour, tzinfo=UTC))
    put(rtc, 0x0B, mode)
    assert get(rtc, 4) == expected
    put(rtc, 4, expected)
    assert get(rtc, 4) == expected


def test_update_in_progress_starts_244_us_before_the_second(time: Time, line: Line) -> None:
    rtc = make(time, line)
    time.pass_ns(SECOND - 244_001)
    assert get(rtc, 0x0A) == 0x26
    time.pass_ns(1)
    assert get(rtc, 0x0A) == 0xA6
    time.pass_ns(244_000)
    assert get(rtc, 0x0A) == 0x26


def test_periodic_interrupt_rate_and_flags(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0B, 0x02 | PIE)  # rate 6: 1024 Hz
    count = 0
    for _ in range(1000):
        time.pass_ns(10**5)
        if line.level:
            assert get(rtc, 0x0C) & 0xC0 == 0xC0
            assert not line.level
            count += 1
    assert count == 102  # 100 ms


def test_the_line_stays_until_register_c_is_read(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0B, 0x02 | UIE)
    time.pass_ns(3 * SECOND)
    assert line.level
    assert line.rises == 1
    assert get(rtc, 0x0C) & 0x90 == 0x90
    assert get(rtc, 0x0C) == 0
    time.pass_ns(SECOND)
    assert line.rises == 2


def test_flags_are_set_without_enables(time: Time, line: Line) -> None:
    rtc = make(time, line)
    get(rtc, 0x0C)
    time.pass_ns(SECOND)
    assert get(rtc, 0x0C) == 0x50  # periodic and update, no IRQF
    assert line.rises == 0


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x10, 0xC0, 0xC0), 12),
        ((0x00, 0x01, 0xC0), 62),
        ((0xFF, 0xFF, 0x00), 2),
        ((0x05, 0x30, 0x12), 45007),
    ],
)
def test_alarm(time: Time, line: Line, alarm: tuple[int, int, int], seconds: int) -> None:
    """The alarm bytes with 'don't care' codes C0-FF; from 23:59:58."""
    rtc = make(time, line)
    for index, value in zip((1, 3, 5), alarm, strict=True):
        put(rtc, index, value)
    put(rtc, 0x0B, 0x02 | AIE)
    time.pass_ns(seconds * SECOND - 1)
    assert not line.level
    time.pass_ns(1)
    assert line.level
    assert get(rtc, 0x0C) & 0xA0 == 0xA0


def test_an_alarm_that_never_matches(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 1, 0x75)
    put(rtc, 0x0B, 0x02 | AIE)
    time.pass_ns(90_000 * SECOND)
    assert line.rises == 0


def test_set_freezes_the_time_and_clears_uie(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0B, 0x82 | UIE)
    assert get(rtc, 0x0B) == 0x82
    put(rtc, 0, 0x30)
    put(rtc, 9, 0x99)
    time.pass_ns(10 * SECOND)
    assert get(rtc, 0) == 0x30
    put(rtc, 0x0B, 0x02)
    time.pass_ns(SECOND)
    assert get(rtc, 0) == 0x31
    assert get(rtc, 9) == 0x99


def test_reset_clears_enables_not_time(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0B, 0x02 | PIE | AIE | UIE)
    time.pass_ns(SECOND)
    rtc.reset()
    assert get(rtc, 0x0B) == 0x02
    assert not line.level
    assert get(rtc, 0) == 0x59


def test_memory_size_bytes(time: Time, line: Line) -> None:
    rtc = make(time, line)
    assert get(rtc, 0x15) | get(rtc, 0x16) << 8 == 640
    assert get(rtc, 0x30) | get(rtc, 0x31) << 8 == 63 * 1024
    assert get(rtc, 0x34) | get(rtc, 0x35) << 8 == 48 * 16  # 64 KiB units above 16 MiB


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, 3 * SECOND)), max_size=30))
def test_any_register_values_are_harmless(steps: list[tuple[int, int, int]]) -> None:
    time, line = Time(), Line()
    rtc = make(time, line)
    for index, value, wait in steps:
        put(rtc, index, value)
        time.clock.skip_to(time.clock.now + wait)
        time.clock.run_due()
        assert 0 <= get(rtc, index) <= 255
        state = rtc.save()
        rtc.restore(state)
        assert rtc.save() == state


def test_register_a_keeps_what_was_written_but_not_uip(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0A, 0xAF)
    assert get(rtc, 0x0A) == 0x2F
    put(rtc, 0x0A, 0x70)  # divider held in reset: the time stands
    time.pass_ns(SECOND - 1000)
    assert not get(rtc, 0x0A) & 0x80


def test_writing_the_time_keeps_the_phase_of_the_second(time: Time, line: Line) -> None:
    rtc = make(time, line)
    time.pass_ns(SECOND + SECOND // 2)
    put(rtc, 0, 0x10)
    time.pass_ns(SECOND // 2)
    assert get(rtc, 0) == 0x11


def test_no_update_in_progress_while_set(time: Time, line: Line) -> None:
    rtc = make(time, line)
    put(rtc, 0x0B, 0x82)
    time.pass_ns(SECOND - 1000)
    assert get(rtc, 0x0A) == 0x26


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (4, 4096), (6, 1024), (15, 2)])
def test_periodic_rates(time: Time, line: Line, rate: int, hertz: int) -> None:
    """Data sheet, table "Periodic interrupt rate", with a 32,768 Hz crystal."""
    rtc = make(time, line)
    put(rtc, 0x0A, 0x20 | rate)
    put(rtc, 0x0B, 0x02 | PIE)
    get(rtc, 0x0C)
    count = 0
    for _ in range(2 * hertz):
        time.pass_ns(SECOND // hertz)
        count += bool(get(rtc, 0x0C) & 0x40)
    assert 2 * hertz - 2 <= count <= 2 * hertz
