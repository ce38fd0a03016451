"""The 8259A pair against Intel's data sheet (231468) and the PIIX3's ELCR."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmipatch.emu.machine.pic import PicPair


def initialised(auto_eoi: bool = False, nested: bool = False) -> PicPair:
    """Both chips as a PC BIOS sets them up: vectors 0x08 and 0x70, nothing masked."""
    pic = PicPair()
    for base, vector, third in ((0x20, 0x08, 4), (0xA0, 0x70, 2)):
        pic.port_write(base, 1, 0x11)
        pic.port_write(base + 1, 1, vector)
        pic.port_write(base + 1, 1, third)
        pic.port_write(base + 1, 1, 1 | (2 if auto_eoi else 0) | (0x10 if nested and base == 0x20 else 0))
        pic.port_write(base + 1, 1, 0)
    return pic


def isr(pic: PicPair, base: int = 0x20) -> int:
    pic.port_write(base, 1, 0x0B)
    return pic.port_read(base, 1)


def irr(pic: PicPair, base: int = 0x20) -> int:
    pic.port_write(base, 1, 0x0A)
    return pic.port_read(base, 1)


def test_vectors_of_master_and_slave() -> None:
    pic = initialised()
    for irq, vector in ((0, 0x08), (1, 0x09), (7, 0x0F), (8, 0x70), (15, 0x77)):
        pic.set_line(irq, True)
        assert pic.output
        assert pic.acknowledge() == vector
        pic.set_line(irq, False)
        if irq >= 8:
            pic.port_write(0xA0, 1, 0x20)
        pic.port_write(0x20, 1, 0x20)
        assert isr(pic) == isr(pic, 0xA0) == 0


def test_low_bits_of_icw2_are_the_level() -> None:
    pic = PicPair()
    for value in (0x11, 0x2F, 4, 1):
        pic.port_write(0x20 if value == 0x11 else 0x21, 1, value)
    pic.set_line(3, True)
    assert pic.acknowledge() == 0x28 + 3


def test_nothing_before_initialisation_is_complete() -> None:
    pic = PicPair()
    pic.set_line(1, True)
    assert not pic.output
    for port, value in ((0x20, 0x11), (0x21, 8), (0x21, 4)):
        pic.port_write(port, 1, value)
        pic.set_line(3, False)
        pic.set_line(3, True)
        assert not pic.output
    pic.port_write(0x21, 1, 1)
    assert pic.acknowledge() == 0x0B


def test_fully_nested_priority() -> None:
    pic = initialised()
    pic.set_line(5, True)
    assert pic.acknowledge() == 0x0D
    pic.set_line(6, True)
    assert not pic.output  # lower than what is in service
    pic.set_line(3, True)
    assert pic.output  # higher
    assert pic.acknowledge() == 0x0B
    assert isr(pic) == 0b101000
    pic.port_write(0x20, 1, 0x20)  # non-specific: ends the highest in service
    assert isr(pic) == 0b100000
    pic.port_write(0x20, 1, 0x20)
    assert pic.acknowledge() == 0x0E


def test_slave_priority_lies_at_input_2() -> None:
    pic = initialised()
    pic.set_line(3, True)
    pic.set_line(15, True)
    assert pic.acknowledge() == 0x77
    assert isr(pic) == 4
    assert not pic.output  # IRQ 3 is lower than input 2


def test_a_higher_slave_request_waits_without_special_fully_nested_mode() -> None:
    pic = initialised()
    pic.set_line(12, True)
    pic.acknowledge()
    pic.set_line(8, True)
    assert not pic.output
    nested = initialised(nested=True)
    nested.set_line(12, True)
    nested.acknowledge()
    nested.set_line(8, True)
    assert nested.output
    assert nested.acknowledge() == 0x70


def test_edge_triggered_needs_a_new_edge() -> None:
    pic = initialised()
    pic.set_line(4, True)
    pic.acknowledge()
    pic.port_write(0x20, 1, 0x20)
    pic.set_line(4, True)
    assert not pic.output
    pic.set_line(4, False)
    pic.set_line(4, True)
    assert pic.output


def test_level_triggered_by_elcr_asks_again() -> None:
    pic = initialised()
    pic.port_write(0x4D0, 1, 1 << 5)
    pic.set_line(5, True)
    pic.acknowledge()
    pic.port_write(0x20, 1, 0x20)
    assert pic.output
    pic.set_line(5, False)
    assert not pic.output


def test_elcr_bits_of_the_fixed_edge_interrupts_stay_zero() -> None:
    pic = initialised()
    pic.port_write(0x4D0, 1, 0xFF)
    pic.port_write(0x4D1, 1, 0xFF)
    assert pic.port_read(0x4D0, 1) == 0xF8
    assert pic.port_read(0x4D1, 1) == 0xDE


def test_spurious_interrupt_7_sets_no_isr_bit() -> None:
    pic = initialised()
    pic.set_line(3, True)
    pic.set_line(3, False)
    assert pic.acknowledge() == 0x0F
    assert isr(pic) == 0


def test_masking_holds_a_request_and_reads_back() -> None:
    pic = initialised()
    pic.port_write(0x21, 1, 0xFB)
    assert pic.port_read(0x21, 1) == 0xFB
    pic.set_line(0, True)
    assert not pic.output
    assert irr(pic) == 1
    pic.port_write(0x21, 1, 0)
    assert pic.output


def test_specific_eoi() -> None:
    pic = initialised()
    pic.set_line(6, True)
    pic.acknowledge()
    pic.set_line(1, True)
    pic.acknowledge()
    pic.port_write(0x20, 1, 0x66)
    assert isr(pic) == 2


def test_automatic_eoi() -> None:
    pic = initialised(auto_eoi=True)
    pic.set_line(1, True)
    assert pic.acknowledge() == 9
    assert isr(pic) == 0


def test_rotate_on_automatic_eoi() -> None:
    pic = initialised(auto_eoi=True)
    pic.port_write(0x20, 1, 0x80)
    pic.set_line(0, True)
    pic.set_line(1, True)
    assert pic.acknowledge() == 8
    pic.set_line(0, False)
    pic.set_line(0, True)
    assert pic.acknowledge() == 9  # 0 is the lowest now
    pic.port_write(0x20, 1, 0x00)
    assert pic.acknowledge() == 8


@pytest.mark.parametrize(("command", "lowest"), [(0xC4, 4), (0xA0, 5), (0xE5, 5)])
def test_rotation(command: int, lowest: int) -> None:
    """Set priority; rotate on non-specific EOI; rotate on specific EOI (data sheet, OCW2)."""
    pic = initialised()
    if command != 0xC4:
        pic.set_line(5, True)
        pic.acknowledge()
        pic.set_line(5, False)
    pic.port_write(0x20, 1, command)
    assert isr(pic) == 0
    for irq in (0, 1, 3, 4, 5, 6, 7):
        pic.set_line(irq, True)
    order = []
    while pic.output:
        order.append(pic.acknowledge() - 8)
        pic.port_write(0x20, 1, 0x60 | order[-1])
    expected = [(lowest + 1 + offset) & 7 for offset in range(8)]
    assert order == [irq for irq in expected if irq != 2]


def test_special_mask_mode_lets_lower_levels_through() -> None:
    pic = initialised()
    pic.set_line(1, True)
    pic.acknowledge()
    pic.set_line(5, True)
    assert not pic.output
    pic.port_write(0x21, 1, 2)
    assert not pic.output
    pic.port_write(0x20, 1, 0x68)
    assert pic.output
    assert pic.acknowledge() == 0x0D
    # "An IS bit that is masked will not be cleared by a non-specific EOI in special mask mode."
    pic.port_write(0x20, 1, 0x20)
    assert isr(pic) == 2
    pic.port_write(0x20, 1, 0x20)
    assert isr(pic) == 2
    pic.port_write(0x20, 1, 0x48)
    pic.port_write(0x20, 1, 0x20)
    assert isr(pic) == 0


def test_poll_command() -> None:
    pic = initialised()
    pic.port_write(0x20, 1, 0x0C)
    assert pic.port_read(0x20, 1) & 0x80 == 0
    pic.set_line(6, True)
    pic.port_write(0x20, 1, 0x0C)
    assert pic.port_read(0x20, 1) == 0x86
    assert isr(pic) == 0x40
    assert not pic.output


def test_icw1_clears_mask_service_and_edges() -> None:
    pic = initialised()
    pic.set_line(6, True)
    pic.acknowledge()
    pic.set_line(3, True)
    pic.port_write(0x21, 1, 0xFF)
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
        pic.port_write(port, 1, value)
    assert pic.port_read(0x21, 1) == 0
    assert isr(pic) == 0
    assert not pic.output  # lines 3 and 6 are still high, but made no edge since
    pic.set_line(3, False)
    pic.set_line(3, True)
    assert pic.acknowledge() == 0x23


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, "line", "ack", "read"]),
            st.integers(0, 255),
        ),
        max_size=80,
    )
)
def test_any_sequence_keeps_registers_in_range(steps: list[tuple[int | str, int]]) -> None:
    pic = PicPair()
    for what, value in steps:
        if what == "line":
            pic.set_line(value & 15, bool(value & 16))
        elif what == "ack":
            assert 0 <= pic.acknowledge() <= 255
        elif what == "read":
            assert 0 <= pic.port_read((0x20, 0x21, 0xA0, 0xA1)[value & 3], 1) <= 255
        else:
            assert isinstance(what, int)
            pic.port_write(what, 1, value)
        state = pic.save()
        output = pic.output
        pic.restore(state)
        assert pic.output == output
        # An unmasked request with nothing in service always reaches the processor.
        master = pic.master
        if master.ready and master.irr & ~master.imr and not master.isr:
            assert output
        assert not master.irr & 4 or pic.slave.output


def test_without_icw4_there_is_no_automatic_eoi() -> None:
    pic = PicPair()
    pic.reset()
    for port, value in ((0x20, 0x10), (0x21, 8), (0x21, 4)):
        pic.port_write(port, 1, value)
    pic.set_line(1, True)
    assert pic.acknowledge() == 9
    assert isr(pic) == 2


def test_a_high_line_asks_when_it_becomes_level_triggered() -> None:
    pic = initialised()
    pic.set_line(9, True)
    assert pic.acknowledge() == 0x71
    pic.port_write(0xA0, 1, 0x20)
    pic.port_write(0x20, 1, 0x20)
    assert not pic.output
    pic.port_write(0x4D1, 1, 2)
    assert pic.output
    assert pic.acknowledge() == 0x71
