"""Local APIC (Intel SDM volume 3) and I/O APIC (82093AA, 290566)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machineparts import Time

from vmipatch.emu.machine.apic import BASE, LocalApic
from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.ioapic import BASE as IO_BASE
from vmipatch.emu.machine.ioapic import IoApic

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_ERROR, INITIAL, CURRENT, DIVIDE = 0x320, 0x350, 0x370, 0x380, 0x390, 0x3E0


class Pair:
    def __init__(self, time: Time) -> None:
        self.bus = Bus()
        self.nmis = 0
        self.io = IoApic()
        self.local = LocalApic(time.clock, lambda: None, self.nmi, self.io.end_of_interrupt)
        self.local.attach(self.bus)
        self.io.attach(self.bus, self.local)

    def nmi(self) -> None:
        self.nmis += 1

    def read(self, register: int) -> int:
        return self.bus.memory_read(BASE + register, 4)

    def write(self, register: int, value: int) -> None:
        self.bus.memory_write(BASE + register, 4, value)

    def io_read(self, index: int) -> int:
        self.bus.memory_write(IO_BASE, 4, index)
        return self.bus.memory_read(IO_BASE + 0x10, 4)

    def io_write(self, index: int, value: int) -> None:
        self.bus.memory_write(IO_BASE, 4, index)
        self.bus.memory_write(IO_BASE + 0x10, 4, value)

    def redirect(self, pin: int, low: int, destination: int = 0) -> None:
        self.io_write(0x11 + 2 * pin, destination << 24)
        self.io_write(0x10 + 2 * pin, low)


@pytest.fixture
def pair(time: Time) -> Pair:
    return Pair(time)


@pytest.fixture
def enabled(pair: Pair) -> Pair:
    pair.write(SVR, 0x1FF)
    return pair


def test_state_after_reset(pair: Pair) -> None:
    """SDM, "Local APIC State After Power-Up Reset"."""
    assert [pair.read(register) for register in (ID, TPR, LDR, ICR, ICR_HIGH, INITIAL, CURRENT, DIVIDE)] == [0] * 8
    assert pair.read(DFR) == 0xFFFFFFFF
    assert pair.read(SVR) == 0xFF
    assert [pair.read(register) for register in (LVT_TIMER, 0x340, LVT_LINT0, 0x360, LVT_ERROR)] == [0x10000] * 5
    assert pair.read(VERSION) & 0xFF == 0x11


def test_lvt_cannot_be_unmasked_while_disabled(pair: Pair) -> None:
    pair.write(LVT_TIMER, 0x31)
    assert pair.read(LVT_TIMER) == 0x10031
    pair.write(SVR, 0x1FF)
    pair.write(LVT_TIMER, 0x31)
    assert pair.read(LVT_TIMER) == 0x31
    pair.write(SVR, 0xFF)
    assert pair.read(LVT_TIMER) == 0x10031


def test_extint_passes_by_lint0(pair: Pair) -> None:
    assert pair.local.passes_extint()  # disabled: LINT0 is INTR
    pair.write(SVR, 0x1FF)
    assert not pair.local.passes_extint()
    pair.write(LVT_LINT0, 0x700)
    assert pair.local.passes_extint()
    pair.write(LVT_LINT0, 0x10700)
    assert not pair.local.passes_extint()
    pair.local.write_base(0xFEE00100)
    assert pair.local.passes_extint()
    assert pair.read(VERSION) == 0xFFFFFFFF


def test_self_interrupt_isr_irr_and_eoi(enabled: Pair) -> None:
    enabled.write(ICR, 0x40041)
    assert enabled.read(IRR + 0x20) == 2
    assert enabled.local.pending()
    assert enabled.local.acknowledge() == 0x41
    assert enabled.read(IRR + 0x20) == 0
    assert enabled.read(ISR + 0x20) == 2
    assert enabled.read(PPR) == 0x40
    enabled.write(ICR, 0x40042)
    assert not enabled.local.pending()  # same class
    enabled.write(ICR, 0x40051)
    assert enabled.local.acknowledge() == 0x51
    enabled.write(EOI, 0)
    assert enabled.read(PPR) == 0x40
    enabled.write(EOI, 0)
    assert enabled.local.acknowledge() == 0x42


def test_task_priority_holds_back_its_class_and_below(enabled: Pair) -> None:
    enabled.write(ICR, 0x40041)
    enabled.write(TPR, 0x40)
    assert not enabled.local.pending()
    assert enabled.local.acknowledge() == 0xFF  # spurious, nothing in service
    assert enabled.read(ISR + 0x20) == 0
    enabled.write(TPR, 0x3F)
    assert enabled.local.pending()


def test_destinations(enabled: Pair) -> None:
    enabled.write(ICR_HIGH, 0)
    enabled.write(ICR, 0x0031)  # physical, own identification
    assert enabled.local.acknowledge() == 0x31
    enabled.write(EOI, 0)
    enabled.write(ICR_HIGH, 5 << 24)
    enabled.write(ICR, 0x0031)
    assert not enabled.local.pending()
    enabled.write(ESR, 0)
    assert enabled.read(ESR) == 4  # nobody accepted it
    enabled.write(LDR, 0x02000000)
    enabled.write(ICR_HIGH, 3 << 24)
    enabled.write(ICR, 0x0832)
    assert enabled.local.acknowledge() == 0x32
    enabled.write(EOI, 0)
    enabled.write(DFR, 0x0FFFFFFF)  # cluster model
    enabled.write(LDR, 0x21000000)
    enabled.write(ICR_HIGH, 0x21 << 24)
    enabled.write(ICR, 0x0833)
    assert enabled.local.acknowledge() == 0x33
    enabled.write(EOI, 0)
    enabled.write(ICR_HIGH, 0x31 << 24)
    enabled.write(ICR, 0x0834)
    assert not enabled.local.pending()


def test_startup_messages_find_nobody(enabled: Pair) -> None:
    for value in (0xC4500, 0xC4608, 0x44500):
        enabled.write(ICR, value)
        assert not enabled.read(ICR) & 0x1000  # delivery status: idle
    assert not enabled.local.pending()
    enabled.write(ICR, 0x80400)
    assert enabled.nmis == 1


def test_illegal_vector(enabled: Pair) -> None:
    enabled.write(LVT_ERROR, 0x38)
    enabled.write(ICR, 0x40005)
    assert enabled.local.acknowledge() == 0x38
    enabled.write(ESR, 0)
    assert enabled.read(ESR) == 0x20
    enabled.write(ESR, 0)
    assert enabled.read(ESR) == 0


def test_timer_one_shot(enabled: Pair, time: Time) -> None:
    enabled.write(DIVIDE, 0x3)  # by 16: 160 ns
    enabled.write(LVT_TIMER, 0x40)
    enabled.write(INITIAL, 100)
    time.pass_ns(160 * 40)
    assert enabled.read(CURRENT) == 60
    time.pass_ns(160 * 60 - 1)
    assert not enabled.local.pending()
    time.pass_ns(1)
    assert enabled.local.acknowledge() == 0x40
    assert enabled.read(CURRENT) == 0
    enabled.write(EOI, 0)
    time.pass_ns(10**6)
    assert not enabled.local.pending()


def test_timer_periodic_and_stop(enabled: Pair, time: Time) -> None:
    enabled.write(DIVIDE, 0xB)  # by 1
    enabled.write(LVT_TIMER, 0x20040)
    enabled.write(INITIAL, 1000)
    for _ in range(3):
        time.pass_ns(10_000)
        assert enabled.local.acknowledge() == 0x40
        enabled.write(EOI, 0)
    time.pass_ns(2_500)
    assert enabled.read(CURRENT) == 750
    enabled.write(INITIAL, 0)
    time.pass_ns(10**6)
    assert not enabled.local.pending()


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divide_configuration(enabled: Pair, time: Time, code: int, divisor: int) -> None:
    enabled.write(DIVIDE, code)
    enabled.write(INITIAL, 1000)
    time.pass_ns(10 * divisor * 10)
    assert enabled.read(CURRENT) == 990


def test_ioapic_registers(pair: Pair) -> None:
    assert pair.io_read(1) == 0x00170011
    pair.io_write(0, 0x0A000000)
    assert pair.io_read(0) == pair.io_read(2) == 0x0A000000
    assert pair.io_read(0x10) == 0x10000
    pair.redirect(3, 0xFFFFFFFF, 0xAB)
    assert pair.io_read(0x16) == 0x1AFFF  # delivery status and remote IRR are read-only
    assert pair.io_read(0x17) == 0xAB000000
    assert pair.io_read(0x50) == 0


def test_ioapic_edge(enabled: Pair) -> None:
    enabled.redirect(4, 0x34)
    enabled.io.set_line(4, True)
    assert enabled.local.acknowledge() == 0x34
    enabled.write(EOI, 0)
    enabled.io.set_line(4, True)
    assert not enabled.local.pending()
    enabled.redirect(4, 0x10034)
    enabled.io.set_line(4, False)
    enabled.io.set_line(4, True)
    enabled.redirect(4, 0x34)
    assert not enabled.local.pending()  # an edge on a masked pin is ignored


def test_ioapic_level_until_eoi(enabled: Pair) -> None:
    enabled.redirect(9, 0x8039)
    enabled.io.set_line(9, True)
    assert enabled.io_read(0x10 + 18) & 0x4000
    assert enabled.local.acknowledge() == 0x39
    assert enabled.read(TMR + 0x10) == 1 << 0x19
    assert not enabled.local.pending()
    enabled.write(EOI, 0)
    assert enabled.local.acknowledge() == 0x39  # still asserted
    enabled.io.set_line(9, False)
    enabled.write(EOI, 0)
    assert not enabled.local.pending()
    assert not enabled.io_read(0x10 + 18) & 0x4000


def test_ioapic_unmasking_a_level_that_is_there(enabled: Pair) -> None:
    enabled.redirect(9, 0x18039)
    enabled.io.set_line(9, True)
    assert not enabled.local.pending()
    enabled.redirect(9, 0x8039)
    assert enabled.local.acknowledge() == 0x39


def test_ioapic_nmi_and_other_destination(enabled: Pair) -> None:
    enabled.redirect(5, 0x400)
    enabled.io.set_line(5, True)
    assert enabled.nmis == 1
    enabled.redirect(6, 0x36, 7)
    enabled.io.set_line(6, True)
    assert not enabled.local.pending()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["local", "io", "line", "ack", "time"]),
            st.integers(0, 0x3F),
            st.integers(0, 0xFFFFFFFF),
        ),
        max_size=60,
    )
)
def test_any_sequence_is_harmless(steps: list[tuple[str, int, int]]) -> None:
    time = Time()
    pair = Pair(time)
    pair.write(SVR, 0x1FF)
    for what, index, value in steps:
        if what == "local":
            pair.write(index << 4, value)
            assert 0 <= pair.read((value & 0x3F) << 4) <= 0xFFFFFFFF
        elif what == "io":
            pair.io_write(index, value)
        elif what == "line":
            pair.io.set_line(value % 24, bool(index & 1))
        elif what == "ack":
            assert 0 <= pair.local.acknowledge() <= 255
        else:
            time.clock.skip_to(time.clock.now + value % 100_000)
            time.clock.run_due()
        state, output = pair.local.save(), pair.local.pending()
        pair.local.restore(state)
        assert pair.local.pending() == output
        assert pair.local.irr < 1 << 256


def test_timer_interrupts_are_edges(enabled: Pair, time: Time) -> None:
    enabled.write(DIVIDE, 0xB)
    enabled.write(LVT_TIMER, 0x40)
    enabled.write(INITIAL, 1)
    time.pass_ns(10)
    assert enabled.read(TMR + 0x20) == 0
    assert enabled.local.acknowledge() == 0x40


def test_ioapic_remote_irr_goes_when_the_entry_becomes_edge_triggered(enabled: Pair) -> None:
    enabled.redirect(9, 0x8039)
    enabled.io.set_line(9, True)
    enabled.redirect(9, 0x8039)
    assert enabled.io_read(0x10 + 18) & 0x4000
    enabled.redirect(9, 0x0039)
    assert not enabled.io_read(0x10 + 18) & 0x4000


def test_ioapic_register_past_the_last(pair: Pair) -> None:
    assert pair.io_read(0x3F) == 0
    pair.io_write(0x3F, 0xFF000000)
    assert pair.io_read(0x3F) == 0xFF000000
    assert pair.io_read(0x40) == 0


def test_trigger_mode_follows_the_last_delivery(enabled: Pair) -> None:
    enabled.local.deliver(0, 0x41, True)
    enabled.local.deliver(0, 0x42, True)
    enabled.local.deliver(0, 0x41, False)
    assert enabled.read(TMR + 0x20) == 4


def test_cluster_model_needs_a_common_member(enabled: Pair) -> None:
    enabled.write(DFR, 0x0FFFFFFF)
    enabled.write(LDR, 0x21000000)
    assert enabled.local.matches(0x21, True)
    assert not enabled.local.matches(0x22, True)


def test_writing_the_base_register_resets_only_when_it_disables(enabled: Pair) -> None:
    enabled.local.write_base(0xFEE00900)
    assert enabled.read(SVR) == 0x1FF
    enabled.local.write_base(0xFEE00100)
    enabled.local.write_base(0xFEE00900)
    assert enabled.read(SVR) == 0xFF


def test_ioapic_level_entry_does_not_answer_to_an_edge_entry(enabled: Pair) -> None:
    enabled.redirect(4, 0x34)
    enabled.io.set_line(4, True)
    assert not enabled.io_read(0x10 + 8) & 0x4000  # no remote IRR for an edge
