"""Two 8259A interrupt controllers, cascaded as in a PC.

May import :mod:`vmipatch.emu.machine.device` and ``bus``.  Facts: Intel 8259A
data sheet (order number 231468), Intel 82371SB (PIIX3) data sheet for the
edge/level registers at 0x4D0 and 0x4D1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device

SLAVE_INPUT = 2


class Chip(Device):
    """One 8259A.  ``output`` is its INT pin; ``level_mask`` its ELCR byte."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "lines", "irr", "isr", "imr", "base", "first", "step", "needs_icw4", "single", "auto_eoi",
        "rotate_on_auto_eoi", "special_mask", "special_nested", "read_isr", "poll", "level_mask", "output", "ready",
    )  # fmt: skip

    def __init__(self, master: bool) -> None:
        self.master = master
        self.level_mask = 0
        self.lines = 0
        self.reset()

    def reset(self) -> None:
        """Not initialised: no requests, nothing masked, no vector base."""
        self.irr = self.isr = self.imr = 0
        self.base = 0
        self.first = 0  # the input with the highest priority
        self.step = 0  # which ICW is due: 0 none, else 2, 3, 4
        self.needs_icw4 = self.single = False
        self.auto_eoi = self.rotate_on_auto_eoi = False
        self.special_mask = self.special_nested = False
        self.read_isr = self.poll = False
        self.level_mask = 0
        self.output = False
        self.ready = False  # no interrupt before the initialisation words are complete

    def set_line(self, number: int, level: bool) -> None:
        """Drive input ``number``.

        A request whose line falls before the acknowledge cycle is lost; the
        cycle then answers with the default input 7 (data sheet, "Interrupt
        Request" and figure 9 with its note).
        """
        bit = 1 << number
        if level:
            if self.level_mask & bit or not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            self.irr &= ~bit
        self._update()

    def set_level_mask(self, mask: int) -> None:
        """The ELCR byte; a line that is high asks at once where it is level triggered now."""
        self.level_mask = mask
        self.irr |= self.lines & mask
        self._update()

    def pending(self) -> int | None:
        """The input that an acknowledge cycle would answer, or None."""
        requests = self.irr & ~self.imr
        if not requests or not self.ready:
            return None
        in_service = self.isr
        if self.special_mask:
            # A masked level in service no longer holds back lower ones.
            in_service &= ~self.imr
        if self.special_nested and self.master:
            in_service &= ~(1 << SLAVE_INPUT)
        for offset in range(8):
            bit = 1 << ((self.first + offset) & 7)
            if in_service & bit:
                return None
            if requests & bit:
                return (self.first + offset) & 7
        return None

    def _update(self) -> None:
        self.output = self.pending() is not None

    def acknowledge(self) -> tuple[int, bool]:
        """One acknowledge cycle: the input (7 when none is left) and whether it was genuine."""
        number = self.pending()
        if number is None:
            return 7, False
        bit = 1 << number
        if not self.level_mask & bit:
            self.irr &= ~bit
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.first = (number + 1) & 7
        else:
            self.isr |= bit
        self._update()
        return number, True

    def write_command(self, value: int) -> None:
        """A write with A0 = 0: ICW1, OCW2 or OCW3."""
        if value & 0x10:
            self._icw1(value)
        elif value & 0x08:
            self._ocw3(value)
        else:
            self._ocw2(value)
        self._update()

    def _icw1(self, value: int) -> None:
        # The edge sense circuit is reset: an input that is high now must fall first.
        self.irr = self.lines & self.level_mask
        self.imr = self.isr = 0
        self.first = 0
        self.special_mask = self.read_isr = self.poll = False
        self.needs_icw4 = bool(value & 1)
        self.single = bool(value & 2)
        self.auto_eoi = self.rotate_on_auto_eoi = self.special_nested = False
        self.step = 2
        self.ready = False

    def _ocw2(self, value: int) -> None:
        operation, level = value >> 5, value & 7
        if operation == 0b000:
            self.rotate_on_auto_eoi = False
        elif operation == 0b100:
            self.rotate_on_auto_eoi = True
        elif operation in (0b001, 0b101):
            highest = self._highest_in_service()
            if highest is not None:
                self.isr &= ~(1 << highest)
                if operation == 0b101:
                    self.first = (highest + 1) & 7
        elif operation in (0b011, 0b111):
            self.isr &= ~(1 << level)
            if operation == 0b111:
                self.first = (level + 1) & 7
        elif operation == 0b110:
            self.first = (level + 1) & 7

    def _ocw3(self, value: int) -> None:
        if value & 0x40:
            self.special_mask = bool(value & 0x20)
        if value & 0x04:
            self.poll = True
        elif value & 0x02:
            self.read_isr = bool(value & 1)

    def _highest_in_service(self) -> int | None:
        for offset in range(8):
            number = (self.first + offset) & 7
            if not self.isr & (1 << number):
                continue
            # A level that special mask mode has set aside is not the one that ended.
            if self.special_mask and self.imr & (1 << number):
                continue
            return number
        return None

    def write_data(self, value: int) -> None:
        """A write with A0 = 1: ICW2 to ICW4 while initialising, else OCW1 (the mask)."""
        if self.step == 0:
            self.imr = value
        elif self.step == 2:
            self.base = value & 0xF8
            self._after(3 if not self.single else 4)
        elif self.step == 3:
            self._after(4)
        else:
            self.special_nested = bool(value & 0x10)
            self.auto_eoi = bool(value & 0x02)
            self._after(5)
        self._update()

    def _after(self, step: int) -> None:
        """The next initialisation word, or the end of them."""
        done = step > 4 or (step == 4 and not self.needs_icw4)
        self.step = 0 if done else step
        self.ready = done

    def read_command(self) -> int:
        """A read with A0 = 0: the poll word if asked for, else IRR or ISR."""
        if self.poll:
            return self.poll_read()
        return self.isr if self.read_isr else self.irr

    def poll_read(self) -> int:
        """The poll word; the read itself is the acknowledge cycle."""
        self.poll = False
        number, genuine = self.acknowledge()
        return 0x80 | number if genuine else 0

    def read_data(self) -> int:
        """A read with A0 = 1: the poll word if asked for, else the mask."""
        return self.poll_read() if self.poll else self.imr


class PicPair(Device):
    """Master at 0x20/0x21, slave at 0xA0/0xA1 on input 2, ELCR at 0x4D0/0x4D1."""

    ELCR_MASK = (0xF8, 0xDE)  # IRQ 0, 1, 2, 8 and 13 are always edge triggered (PIIX3, ELCR1/ELCR2)

    def __init__(self) -> None:
        self.master = Chip(master=True)
        self.slave = Chip(master=False)
        self.on_change: Callable[[], None] | None = None

    def attach(self, bus: Bus) -> None:
        """Claim the ports."""
        for first in (0x20, 0xA0):
            bus.claim_ports(first, first + 1, self.port_read, self.port_write)
        bus.claim_ports(0x4D0, 0x4D1, self.port_read, self.port_write)

    def reset(self) -> None:
        """Both chips as after power-on."""
        self.master.reset()
        self.slave.reset()
        self._cascade()

    def save(self) -> Any:
        """State of both chips."""
        return self.master.save(), self.slave.save()

    def restore(self, state: Any) -> None:
        """Bring back what :meth:`save` returned."""
        self.master.restore(state[0])
        self.slave.restore(state[1])

    @property
    def output(self) -> bool:
        """The INTR line."""
        return self.master.output

    def set_line(self, irq: int, level: bool) -> None:
        """Drive IRQ 0-15; IRQ 2 is the cascade and is ignored."""
        if irq == SLAVE_INPUT:
            return
        if irq < 8:
            self.master.set_line(irq, level)
        else:
            self.slave.set_line(irq - 8, level)
        self._cascade()

    def _cascade(self) -> None:
        self.master.set_line(SLAVE_INPUT, self.slave.output)
        if self.on_change is not None:
            self.on_change()

    def acknowledge(self) -> int:
        """Both INTA cycles; returns the vector (base + 7 when the request is gone)."""
        number, genuine = self.master.acknowledge()
        if genuine and number == SLAVE_INPUT:
            number, _ = self.slave.acknowledge()
            vector = self.slave.base + number
        else:
            vector = self.master.base + number
        # A second request of the slave needs a new edge on the cascade line.
        self.master.set_line(SLAVE_INPUT, False)
        self._cascade()
        return vector

    def port_read(self, port: int, size: int) -> int:
        """Ports of the chips and ELCR."""
        if port >= 0x4D0:
            return (self.master, self.slave)[port - 0x4D0].level_mask
        chip = self.slave if port & 0x80 else self.master
        value = chip.read_data() if port & 1 else chip.read_command()
        self._cascade()
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Ports of the chips and ELCR."""
        if port >= 0x4D0:
            index = port - 0x4D0
            (self.master, self.slave)[index].set_level_mask(value & self.ELCR_MASK[index])
            self._cascade()
            return
        chip = self.slave if port & 0x80 else self.master
        if port & 1:
            chip.write_data(value)
        else:
            chip.write_command(value)
        self._cascade()
