"""The 8042 keyboard controller with a keyboard, ports 0x60 and 0x64.

May import ``bus`` and ``device`` of this package.  Facts: Intel 8042 as
programmed for IBM's AT and PS/2 (IBM PS/2 Hardware Interface Technical
Reference, "Keyboard and Auxiliary Device Controller"), keyboard commands from
the same book.  There is no mouse: the auxiliary port's interface test says that
its clock line is stuck low, and the loop-back command answers as a controller
without an auxiliary port does, from the keyboard side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device

FULL, SYSTEM, COMMAND = 0x01, 0x04, 0x08  # status bits; 0x10: not locked by the key
CONFIG_IRQ1, CONFIG_DISABLE, CONFIG_TRANSLATE = 0x01, 0x10, 0x40
ACK, RESEND, BAT_OK = 0xFA, 0xFE, 0xAA
AUX_CLOCK_LOW = 0x01
TAKES_PARAMETER = frozenset((0xED, 0xF0, 0xF3))


class KeyboardController(Device):
    """Controller and keyboard.  ``reset_line`` and ``a20`` are its output port's pins 0 and 1."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "config", "ram", "output_port", "queue", "controller_queue", "wrote_command", "command",
        "keyboard_command", "scanning", "leds", "scan_set", "current",
    )  # fmt: skip

    def __init__(
        self,
        irq: Callable[[bool], None],
        reset_line: Callable[[], None],
        a20: Callable[[bool], None],
        get_a20: Callable[[], bool],
    ) -> None:
        self._irq = irq
        self._reset_line = reset_line
        self._a20 = a20
        self._get_a20 = get_a20
        self.reset()

    def attach(self, bus: Bus) -> None:
        """Claim ports 0x60 and 0x64."""
        bus.claim_ports(0x60, 0x60, self.port_read, self.port_write)
        bus.claim_ports(0x64, 0x64, self.port_read, self.port_write)

    def reset(self) -> None:
        """After power-on: keyboard disabled until the BIOS tests the controller."""
        self.config = CONFIG_IRQ1 | CONFIG_TRANSLATE
        self.ram = bytearray(32)
        self.output_port = 0xCF
        self.queue = bytearray()  # from the keyboard
        self.controller_queue = bytearray()  # from the controller itself, goes first
        self.current: int | None = None  # the output buffer
        self.wrote_command = False
        self.command = 0  # a controller command that waits for its byte
        self.keyboard_command = 0
        self.scanning = True
        self.leds = 0
        self.scan_set = 2
        self._irq(False)

    def press(self, scan_codes: bytes) -> None:
        """Bytes from the keys (set 1 codes if translation is on, which is the default)."""
        if self.scanning:
            self.queue += scan_codes
            self._fill()

    def _fill(self) -> None:
        """Move the next byte into the output buffer when that is empty."""
        if self.current is None:
            source = self.controller_queue
            if not source and not self.config & CONFIG_DISABLE:
                source = self.queue
            if source:
                self.current = source[0]
                del source[0]
        self._irq(self.current is not None and bool(self.config & CONFIG_IRQ1))

    def _answer(self, *values: int) -> None:
        self.controller_queue += bytes(values)
        self._fill()

    def _keyboard_answer(self, *values: int) -> None:
        self.queue += bytes(values)
        self._fill()

    def port_read(self, port: int, size: int) -> int:
        """0x60: the output buffer; 0x64: status."""
        if port == 0x64:
            full = FULL if self.current is not None else 0
            return full | 0x10 | (self.config & SYSTEM) | (COMMAND if self.wrote_command else 0)
        value = self.current
        if value is None:
            return self.ram[1]
        self.ram[1] = value  # an empty buffer reads as the last byte again
        self.current = None
        self._irq(False)
        self._fill()
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """0x60: a byte for the controller's command or for the keyboard; 0x64: a command."""
        self.wrote_command = port == 0x64
        if port == 0x64:
            self._controller_command(value)
        elif self.command:
            command, self.command = self.command, 0
            self._controller_data(command, value)
        else:
            self.config &= ~CONFIG_DISABLE
            self._keyboard_byte(value)

    def _controller_command(self, value: int) -> None:
        self.command = 0
        if value == 0x20:
            self._answer(self.config)
        elif 0x21 <= value <= 0x3F:
            self._answer(self.ram[value - 0x20])
        elif 0x60 <= value <= 0x7F or value in (0xD1, 0xD2, 0xD3, 0xD4):
            self.command = value
        elif value == 0xA7:
            self.config |= 0x20
        elif value == 0xA8:
            self.config &= ~0x20
        elif value == 0xA9:
            self._answer(AUX_CLOCK_LOW)
        elif value == 0xAA:
            self.config |= SYSTEM
            self._answer(0x55)
        elif value == 0xAB:
            self._answer(0x00)
        elif value == 0xAD:
            self.config |= CONFIG_DISABLE
        elif value == 0xAE:
            self.config &= ~CONFIG_DISABLE
            self._fill()
        elif value == 0xC0:
            self._answer(0x80)  # input port: keyboard not locked
        elif value == 0xD0:
            full = 0x10 if self.current is not None else 0
            self._answer(self.output_port & ~0x12 | (0x02 if self._get_a20() else 0) | full)
        elif value == 0xDD:
            self._a20(False)
        elif value == 0xDF:
            self._a20(True)
        elif value >= 0xF0 and not value & 1:
            self._reset_line()  # pulses the output port's bit 0

    def _controller_data(self, command: int, value: int) -> None:
        if command == 0x60:
            self.config = value & 0x7F
            self._fill()
        elif command <= 0x7F:
            self.ram[command - 0x60] = value
        elif command == 0xD1:
            self.output_port = value
            self._a20(bool(value & 2))
            if not value & 1:
                self._reset_line()
        elif command == 0xD2:
            self._keyboard_answer(value)
        elif command == 0xD3:
            self._answer(value)
        # 0xD4 sends to the mouse, which is not there: no answer ever comes.

    def _keyboard_byte(self, value: int) -> None:
        if self.keyboard_command:
            command, self.keyboard_command = self.keyboard_command, 0
            if value < 0x80:
                self._keyboard_parameter(command, value)
                return
        if value == 0xFF:
            self.scanning, self.leds, self.scan_set = True, 0, 2
            self._keyboard_answer(ACK, BAT_OK)
        elif value == 0xFE:
            self._keyboard_answer(self.ram[1])
        elif value == 0xF2:
            # With translation on the controller turns the identification AB 83 into AB 41.
            self._keyboard_answer(ACK, 0xAB, 0x41 if self.config & CONFIG_TRANSLATE else 0x83)
        elif value == 0xEE:
            self._keyboard_answer(0xEE)
        elif value in TAKES_PARAMETER:
            self.keyboard_command = value
            self._keyboard_answer(ACK)
        elif value in (0xF4, 0xF5, 0xF6):
            self.scanning = value != 0xF5
            self._keyboard_answer(ACK)
        elif 0xF7 <= value <= 0xFD:
            self._keyboard_answer(ACK)
        else:
            self._keyboard_answer(RESEND)

    def _keyboard_parameter(self, command: int, value: int) -> None:
        if command == 0xED:
            self.leds = value & 7
            self._keyboard_answer(ACK)
        elif command == 0xF0 and value == 0:
            codes = {1: 0x43, 2: 0x41, 3: 0x3F} if self.config & CONFIG_TRANSLATE else {1: 1, 2: 2, 3: 3}
            self._keyboard_answer(ACK, codes[self.scan_set])
        elif command == 0xF0 and value > 3:
            self._keyboard_answer(RESEND)
        else:
            if command == 0xF0:
                self.scan_set = value
            self._keyboard_answer(ACK)
