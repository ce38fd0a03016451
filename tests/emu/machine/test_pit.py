"""The 8254 against Intel's data sheet (231244): mode definitions, read-back, latches, gates."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmipatch.emu.machine.clock import Clock, time_of_tick
from vmipatch.emu.machine.pit import HERTZ, Channel, Pit


class Counter:
    instructions = 0


def loaded(mode: int, count: int, *, gate: bool = True, bcd: bool = False) -> Channel:
    """A channel whose count was written at tick 0, so that it is loaded at tick 1."""
    channel = Channel(gate=gate)
    channel.control(0x30 | mode << 1 | bcd, 0)
    channel.write(count & 0xFF, 0)
    channel.write(count >> 8, 0)
    return channel


def outputs(channel: Channel, first: int, last: int) -> str:
    return "".join("1" if channel.output(tick) else "0" for tick in range(first, last))


def test_mode_0_goes_high_n_plus_1_ticks_after_the_write() -> None:
    channel = loaded(0, 4)
    assert outputs(channel, 0, 9) == "000001111"
    assert [channel.value(tick) for tick in range(1, 7)] == [4, 3, 2, 1, 0, 0xFFFF]


def test_mode_0_first_byte_stops_and_gate_pauses() -> None:
    channel = loaded(0, 4)
    channel.set_gate(False, 3)  # two ticks counted
    assert outputs(channel, 3, 20) == "0" * 17
    assert channel.value(15) == 2
    channel.set_gate(True, 20)
    assert outputs(channel, 20, 24) == "0011"
    channel.write(9, 30)
    assert not channel.output(31)
    assert not channel.output(1000)
    channel.write(0, 1000)
    assert outputs(channel, 1008, 1012) == "0011"


def test_mode_1_one_shot_is_started_by_the_gate_and_restarted() -> None:
    channel = loaded(1, 3, gate=False)
    assert outputs(channel, 0, 10) == "1" * 10
    channel.set_gate(True, 10)
    assert outputs(channel, 10, 16) == "100011"
    channel.set_gate(False, 16)
    channel.set_gate(True, 20)
    channel.set_gate(False, 21)
    channel.set_gate(True, 22)  # triggered again while low
    assert outputs(channel, 23, 28) == "00011"


def test_mode_1_a_new_count_waits_for_the_trigger() -> None:
    channel = loaded(1, 3, gate=False)
    channel.set_gate(True, 0)
    channel.write(6, 2)
    channel.write(0, 2)
    assert outputs(channel, 2, 6) == "0011"
    channel.set_gate(False, 9)
    channel.set_gate(True, 10)
    assert outputs(channel, 11, 18) == "0000001"


def test_mode_2_is_low_for_the_last_tick_of_n() -> None:
    channel = loaded(2, 3)
    assert outputs(channel, 1, 10) == "110110110"
    assert [channel.value(tick) for tick in range(1, 8)] == [3, 2, 1, 3, 2, 1, 3]


def test_mode_2_new_count_takes_effect_after_the_period() -> None:
    channel = loaded(2, 4)
    channel.write(3, 2)
    channel.write(0, 2)
    assert outputs(channel, 1, 12) == "1110" + "110" + "110" + "1"


def test_mode_2_gate_low_holds_high_and_reloads() -> None:
    channel = loaded(2, 4)
    channel.set_gate(False, 3)
    assert outputs(channel, 3, 30) == "1" * 27
    channel.set_gate(True, 30)
    assert outputs(channel, 31, 39) == "11101110"


def test_mode_3_even_and_odd() -> None:
    assert outputs(loaded(3, 4), 1, 9) == "11001100"
    assert outputs(loaded(3, 5), 1, 11) == "1110011100"
    assert [loaded(3, 4).value(tick) for tick in range(1, 6)] == [4, 2, 4, 2, 4]
    # Odd: N-1 is loaded; it counts 4 2 0 while high and 4 2 while low.
    assert [loaded(3, 5).value(tick) for tick in range(1, 7)] == [4, 2, 0, 4, 2, 4]


def test_mode_3_new_count_takes_effect_after_the_half_cycle() -> None:
    channel = loaded(3, 8)
    channel.write(4, 2)
    channel.write(0, 2)
    # The high half of the old count ends at tick 5; the new count is loaded there.
    assert outputs(channel, 1, 5) == "1111"
    assert channel.value(5) == 4


def test_mode_4_strobe_and_mode_5() -> None:
    assert outputs(loaded(4, 3), 0, 10) == "1111011111"
    channel = loaded(5, 3, gate=False)
    assert outputs(channel, 0, 10) == "1" * 10
    channel.set_gate(True, 10)
    assert outputs(channel, 10, 20) == "1111011111"


def test_count_zero_is_the_full_count() -> None:
    channel = loaded(0, 0)
    assert not channel.output(0x10000)
    assert channel.output(0x10001)
    channel = loaded(0, 0, bcd=True)
    assert not channel.output(10_000)
    assert channel.output(10_001)


def test_bcd_counts_in_decimal() -> None:
    channel = loaded(0, 0x1000, bcd=True)
    assert [channel.value(tick) for tick in (1, 2, 3)] == [0x1000, 0x999, 0x998]


def test_latch_holds_until_read_and_ignores_a_second_one() -> None:
    channel = loaded(0, 0x1234)
    channel.latch(1)
    channel.latch(100)
    assert channel.read(200) | channel.read(300) << 8 == 0x1234
    assert channel.read(0x101) == (0x1234 - 0x100) & 0xFF


def test_unlatched_reads_alternate_low_and_high() -> None:
    channel = loaded(0, 0x1234)
    assert [channel.read(1), channel.read(1), channel.read(1)] == [0x34, 0x12, 0x34]


def test_read_back_status() -> None:
    clock = Clock(Counter())
    pit = Pit(clock, lambda level: None)
    pit.port_write(0x43, 1, 0xB6)  # channel 2, both bytes, mode 3
    pit.port_write(0x43, 1, 0xE8)  # read back the status of channel 2
    assert pit.port_read(0x42, 1) == 0x80 | 0x40 | 0x30 | 3 << 1  # OUT high, null count
    pit.set_gate2(True)
    pit.port_write(0x42, 1, 100)
    pit.port_write(0x42, 1, 0)
    clock.skip_to(time_of_tick(10, HERTZ))
    pit.port_write(0x43, 1, 0xC8)  # status and count
    assert pit.port_read(0x42, 1) == 0x80 | 0x30 | 3 << 1
    assert pit.port_read(0x42, 1) == 100 - 2 * 9
    assert pit.port_read(0x42, 1) == 0


def test_one_byte_access_modes() -> None:
    channel = Channel(gate=True)
    channel.control(0x10 | 2 << 1, 0)
    channel.write(0x50, 0)
    assert channel.count == 0x50
    assert [channel.read(1), channel.read(1)] == [0x50, 0x50]
    channel.control(0x20 | 2 << 1, 0)
    channel.write(0x50, 0)
    assert channel.count == 0x5000
    assert channel.read(1) == 0x50


def test_modes_6_and_7_are_2_and_3() -> None:
    channel = Channel(gate=True)
    channel.control(0x30 | 6 << 1, 0)
    assert channel.mode == 2
    channel.control(0x30 | 7 << 1, 0)
    assert channel.mode == 3


@pytest.mark.parametrize("mode", [2, 3])
def test_channel_0_interrupts_at_its_rate(mode: int) -> None:
    counter = Counter()
    clock = Clock(counter)
    rises: list[int] = []
    level = False

    def irq(new: bool) -> None:
        nonlocal level
        if new and not level:
            rises.append(clock.now)
        level = new

    pit = Pit(clock, irq)
    pit.reset()
    pit.port_write(0x43, 1, 0x30 | mode << 1)
    pit.port_write(0x40, 1, 1193 & 0xFF)
    pit.port_write(0x40, 1, 1193 >> 8)
    rises.clear()
    while clock.now < 100_000_000:
        clock.skip_to(clock.next_deadline)
        clock.run_due()
    # 1193 ticks are 999.848 us: 100 rises in 100 ms, each period exact to a nanosecond.
    assert len(rises) == 100
    assert all(abs(b - a - 1193 * 10**9 / HERTZ) < 1 for a, b in pairwise(rises))


@given(
    st.lists(
        st.tuples(st.sampled_from(["w40", "w41", "w42", "w43", "r40", "r42", "gate", "time"]), st.integers(0, 255)),
        max_size=60,
    )
)
def test_any_sequence_is_harmless(steps: list[tuple[str, int]]) -> None:
    clock = Clock(Counter())
    pit = Pit(clock, lambda level: None)
    pit.reset()
    for what, value in steps:
        if what[0] == "w":
            pit.port_write(int(what[1:], 16), 1, value)
        elif what[0] == "r":
            assert 0 <= pit.port_read(int(what[1:], 16), 1) <= 255
        elif what == "gate":
            pit.set_gate2(bool(value & 1))
        else:
            clock.skip_to(clock.now + value * 10_000)
            fired = 0
            while clock.next_deadline <= clock.now and fired < 10_000:
                fired += clock.run_due()
            assert fired < 10_000
        state = pit.save()
        values = [channel.value(pit.ticks) for channel in pit.channels]
        pit.restore(state)
        assert values == [channel.value(pit.ticks) for channel in pit.channels]
        assert all(0 <= value <= 0xFFFF for value in values)


@given(
    st.integers(0, 5),
    st.integers(2, 12),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["up", "down", "count"])), max_size=4),
    st.integers(0, 30),
)
def test_next_change_is_where_the_output_changes(
    mode: int, count: int, events: list[tuple[int, str]], wait: int
) -> None:
    """By brute force: OUT is the same up to the tick before, and different at it."""
    channel = loaded(mode, count)
    now = 0
    for later, what in events:
        now += later
        if what == "count":
            channel.write(count + 1, now)
            channel.write(0, now)
        else:
            channel.set_gate(what == "up", now)
    now += wait
    change = channel.next_change(now)
    levels = outputs(channel, now, now + 64)
    changes = [tick for tick in range(1, 64) if levels[tick] != levels[0]]
    if change is None:
        assert not changes
    elif changes:
        # A wake-up that finds nothing changed is allowed (a pending count is loaded); a missed change is not.
        assert now < change <= now + changes[0]


def test_a_retriggered_one_shot_announces_its_start() -> None:
    channel = loaded(1, 3, gate=False)
    channel.set_gate(True, 10)
    assert channel.next_change(10) == 11
    assert channel.next_change(11) == 14
    assert channel.next_change(14) is None


def test_gate_before_the_count_is_loaded_and_while_nothing_counts() -> None:
    channel = loaded(0, 4)
    channel.set_gate(False, 0)  # the count is loaded at tick 1, and waits there
    assert outputs(channel, 0, 20) == "0" * 20
    assert channel.value(10) == 4
    channel.set_gate(True, 20)
    assert outputs(channel, 20, 26) == "000011"


def test_bcd_digits_of_a_count() -> None:
    assert loaded(0, 0x1234, bcd=True).count == 1234


def test_read_back_of_the_count_alone() -> None:
    clock = Clock(Counter())
    pit = Pit(clock, lambda level: None)
    for port, value in ((0x43, 0x30), (0x40, 0x34), (0x40, 0x12), (0x43, 0xE2)):
        pit.port_write(port, 1, value)  # 0xE2: the status of channel 0, not its count
    assert pit.port_read(0x40, 1) == 0x70
    assert pit.channels[0].latched == ()
    pit.port_write(0x43, 1, 0xD2)  # the count, not the status
    assert pit.channels[0].latched == (0x34, 0x12)
    assert pit.channels[0].latched_status is None
