"""Virtual time and the bus."""

from __future__ import annotations

import pytest

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import NEVER, Clock, ticks_at, time_of_tick


class Counter:
    instructions = 0


def test_time_is_instructions_and_what_was_skipped() -> None:
    counter = Counter()
    clock = Clock(counter, 10)
    counter.instructions = 7
    assert clock.now == 70
    assert clock.skip_to(1000) == 930
    assert clock.now == 1000
    assert clock.skip_to(500) == 0
    # 1001 ns is not reached by the instruction that ends at 1000.
    assert clock.instruction_at(1000) == 7
    assert clock.instruction_at(1001) == 8
    assert clock.instruction_at(1010) == 8


def test_timers_fire_in_order_of_deadline_then_of_making() -> None:
    counter = Counter()
    clock = Clock(counter, 1)
    log: list[str] = []
    late, first, second = (clock.timer(name, lambda name=name: log.append(name)) for name in "abc")
    late.arm(30)
    first.arm(20)
    second.arm(20)
    counter.instructions = 19
    assert clock.run_due() == 0
    counter.instructions = 30
    assert clock.run_due() == 3
    assert log == ["b", "c", "a"]
    assert clock.next_deadline == NEVER


def test_an_earlier_deadline_is_told_only_while_running() -> None:
    clock = Clock(Counter(), 1)
    told: list[int] = []
    clock.on_sooner = lambda: told.append(clock.horizon)
    timer, other = clock.timer("a", list), clock.timer("b", list)
    timer.arm(100)
    assert told == []
    clock.horizon = 100
    other.arm(200)
    assert told == []
    other.arm(50)
    assert told == [50]
    other.disarm()
    assert clock.next_deadline == 100


def test_save_and_restore_bring_back_time_and_deadlines() -> None:
    clock = Clock(Counter(), 10)
    timer = clock.timer("a", list)
    clock.skip_to(500)
    timer.arm(900)
    state = clock.save()
    timer.disarm()
    clock.skip_to(5000)
    clock.restore(state)
    assert (clock.now, clock.next_deadline) == (500, 900)


@pytest.mark.parametrize("hertz", [1_193_182, 3_579_545, 32_768, 1, 1024])
def test_time_of_tick_is_the_first_nanosecond_of_the_tick(hertz: int) -> None:
    for tick in (1, 2, 3, 1000, 12345, 10**9):
        at = time_of_tick(tick, hertz)
        assert ticks_at(at, hertz) == tick
        assert ticks_at(at - 1, hertz) == tick - 1


def test_holes_read_as_ones_and_swallow_writes() -> None:
    bus = Bus()
    assert [bus.port_read(0x1234, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert [bus.memory_read(0xE0000000, size) for size in (1, 2, 4, 8)] == [
        0xFF,
        0xFFFF,
        0xFFFFFFFF,
        0xFFFFFFFFFFFFFFFF,
    ]
    bus.port_write(0x1234, 4, 1)
    bus.memory_write(0xE0000000, 4, 1)
    assert bus.unclaimed_memory == 5
    assert bus.unclaimed_ports[0x1234] == 4


def test_wide_accesses_to_a_byte_device_are_split() -> None:
    bus = Bus()
    written: list[tuple[int, int, int]] = []
    bus.claim_ports(0x10, 0x12, lambda port, size: port, lambda port, size, value: written.append((port, size, value)))
    assert bus.port_read(0x10, 4) == 0xFF121110
    bus.port_write(0x10, 4, 0x44332211)
    assert written == [(0x10, 1, 0x11), (0x11, 1, 0x22), (0x12, 1, 0x33)]
    bus.release_ports(0x11, 0x11)
    assert bus.port_read(0x10, 2) == 0xFF10


def test_an_access_never_reaches_beyond_its_last_port() -> None:
    bus = Bus()
    bus.claim_ports(0, 0, lambda port, size: 0xAB, lambda port, size, value: None)
    assert bus.port_read(0xFFFF, 2) == 0xABFF  # wraps as 16 address lines do


def test_memory_claims_do_not_overlap() -> None:
    bus = Bus()
    read, write = (lambda a, s: a & 0xFF), (lambda a, s, v: None)
    bus.claim_memory(0x1000, 0x1000, read, write)
    bus.claim_memory(0x3000, 0x1000, read, write)
    for start, length in ((0x0, 0x1001), (0x1FFF, 1), (0x1800, 0x100), (0x2000, 0x1001), (0x0, 0x10000)):
        with pytest.raises(ValueError, match="overlaps"):
            bus.claim_memory(start, length, read, write)
    bus.claim_memory(0x2000, 0x1000, read, write)
    assert bus.memory_read(0x2042, 1) == 0x42
    bus.release_memory(0x2000)
    assert bus.memory_read(0x2042, 1) == 0xFF
    assert bus.memory_read(0x3001, 1) == 1


def test_an_observer_sees_everything() -> None:
    bus = Bus()
    seen: list[tuple[object, ...]] = []

    class Observer:
        def port(self, port: int, size: int, value: int, write: bool) -> None:
            seen.append(("port", port, size, value, write))

        def mmio(self, physical: int, size: int, value: int, write: bool) -> None:
            seen.append(("mmio", physical, size, value, write))

        def interrupt(self, vector: int) -> None:
            seen.append(("interrupt", vector))

    bus.observer = Observer()
    bus.interrupt_controller = lambda: 0x31
    bus.port_read(5, 1)
    bus.port_write(6, 2, 7)
    bus.memory_read(8, 1)
    bus.memory_write(9, 4, 10)
    assert bus.acknowledge() == 0x31
    assert seen == [
        ("port", 5, 1, 0xFF, False),
        ("port", 6, 2, 7, True),
        ("mmio", 8, 1, 0xFF, False),
        ("mmio", 9, 4, 10, True),
        ("interrupt", 0x31),
    ]
