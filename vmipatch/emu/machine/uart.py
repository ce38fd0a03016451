"""A 16550A serial port.

May import ``bus`` and ``device`` of this package.  Facts: National PC16550D
data sheet (TL/C/8652).  One thing is not the chip's: a byte is sent in no
time, so the transmitter is empty again at once; the divisor is kept but does
not slow the line.  What is sent goes to ``sent`` and to ``on_output``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.device import Device

RX_AVAILABLE, TX_EMPTY, LINE_STATUS, MODEM_STATUS = 1, 2, 4, 8  # IER
DATA_READY, OVERRUN, PARITY, FRAMING, BREAK, THRE, TEMT, FIFO_ERROR = 1, 2, 4, 8, 16, 32, 64, 128  # LSR
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16  # MCR
CTS, DSR, RI, DCD = 0x10, 0x20, 0x40, 0x80  # MSR
FIFO_SIZE = 16
TRIGGER = (1, 4, 8, 14)


class Uart(Device):
    """One port of eight registers; ``irq`` is its line (gated by OUT2, as PCs wire it)."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "ier", "fcr", "lcr", "mcr", "scr", "divisor", "errors", "tx_pending", "fifo", "received", "msr_delta",
        "timeout", "line",
    )  # fmt: skip

    def __init__(self, irq: Callable[[bool], None], on_output: Callable[[int], None] | None = None) -> None:
        self._irq = irq
        self.on_output = on_output
        self._base = 0
        self.carrier = CTS | DSR | DCD  # what the other end of the cable shows
        self.waiting = bytearray()  # bytes from outside that the FIFO has no room for yet
        self.reset()

    def attach(self, bus: Bus, base: int) -> None:
        """Claim the eight ports from ``base``."""
        self._base = base
        bus.claim_ports(base, base + 7, self.port_read, self.port_write)

    def reset(self) -> None:
        """Master reset (data sheet, table I)."""
        self.ier = self.fcr = self.lcr = self.mcr = 0
        self.scr = 0
        self.divisor = 12
        self.errors = 0
        self.tx_pending = False  # a "transmitter empty" interrupt waits to be read
        self.fifo = bytearray()
        self.received = 0  # what the receiver buffer register keeps after it was read
        self.msr_delta = 0
        self.timeout = False
        self.line = False
        self._irq(False)

    # --- from outside ---------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Bytes that arrive on the line; they wait until the chip has room."""
        self.waiting += data
        self._refill()

    def _refill(self) -> None:
        room = (FIFO_SIZE if self.fcr & 1 else 1) - len(self.fifo)
        if self.waiting and room > 0 and not self.mcr & LOOP:
            self.fifo += self.waiting[:room]
            del self.waiting[:room]
            self.timeout = True
        self._update()

    def _arrive(self, byte: int) -> None:
        if len(self.fifo) >= (FIFO_SIZE if self.fcr & 1 else 1):
            self.errors |= OVERRUN
            if self.fcr & 1:
                return  # the FIFO keeps its bytes; the shift register is overwritten
            self.fifo.clear()
        self.fifo.append(byte)
        self.timeout = True

    # --- interrupts -----------------------------------------------------------

    def _cause(self) -> int:
        """The IIR code of the highest pending cause, 1 for none."""
        if self.ier & LINE_STATUS and self.errors:
            return 6
        if self.ier & RX_AVAILABLE and self.fifo:
            if not self.fcr & 1 or len(self.fifo) >= TRIGGER[self.fcr >> 6]:
                return 4
            # Below the trigger level: four character times without traffic, which are over at once.
            if self.timeout:
                return 12
        if self.ier & TX_EMPTY and self.tx_pending:
            return 2
        if self.ier & MODEM_STATUS and self.msr_delta:
            return 0
        return 1

    def _update(self) -> None:
        line = self._cause() != 1 and (bool(self.mcr & OUT2) and not self.mcr & LOOP)
        if line != self.line:
            self.line = line
            self._irq(line)

    def _modem(self) -> int:
        if not self.mcr & LOOP:
            return self.carrier
        return (
            (CTS if self.mcr & RTS else 0)
            | (DSR if self.mcr & DTR else 0)
            | (RI if self.mcr & OUT1 else 0)
            | (DCD if self.mcr & OUT2 else 0)
        )

    # --- registers ------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """One of the eight registers."""
        register = port - self._base
        if register < 2 and self.lcr & 0x80:
            return self.divisor >> (8 * register) & 0xFF
        if register == 0:
            return self._read_byte()
        if register == 1:
            return self.ier
        if register == 2:
            return self._read_iir()
        if register == 3:
            return self.lcr
        if register == 4:
            return self.mcr
        if register == 5:
            status = THRE | TEMT | self.errors | (DATA_READY if self.fifo else 0)
            self.errors = 0
            self._update()
            return status
        if register == 6:
            status = self._modem() | self.msr_delta
            self.msr_delta = 0
            self._update()
            return status
        return self.scr

    def _read_byte(self) -> int:
        if not self.fifo:
            return 0 if self.fcr & 1 else self.received
        value = self.received = self.fifo[0]
        del self.fifo[0]
        # The falling and rising interrupt line makes a new edge for what is left.
        self._drop_line()
        self._refill()
        return value

    def _drop_line(self) -> None:
        if self.line:
            self.line = False
            self._irq(False)

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == 2:
            self.tx_pending = False
            self._update()
        return cause | (0xC0 if self.fcr & 1 else 0)

    def port_write(self, port: int, size: int, value: int) -> None:
        """One of the eight registers."""
        register = port - self._base
        if register < 2 and self.lcr & 0x80:
            shift = 8 * register
            self.divisor = self.divisor & ~(0xFF << shift) | value << shift
        elif register == 0:
            self._transmit(value)
        elif register == 1:
            rising = value & ~self.ier
            self.ier = value & 0x0F
            if rising & TX_EMPTY:
                self.tx_pending = True  # enabling it while the transmitter is empty interrupts at once
            self._update()
        elif register == 2:
            self._write_fcr(value)
        elif register == 3:
            self.lcr = value
        elif register == 4:
            self._write_mcr(value)
        elif register == 7:
            self.scr = value

    def _transmit(self, value: int) -> None:
        self.tx_pending = False
        self._update()
        if self.mcr & LOOP:
            self._arrive(value & (0xFF >> (3 - (self.lcr & 3))))
        elif self.on_output is not None:
            self.on_output(value & (0xFF >> (3 - (self.lcr & 3))))
        self.tx_pending = True
        self._update()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & 1 or value & 2:
            self.fifo.clear()
        if (value ^ self.fcr) & 1 or value & 4:
            self.tx_pending = True  # an emptied transmitter asks for bytes
        self.fcr = value & 0xC9 if value & 1 else 0
        self._refill()

    def _write_mcr(self, value: int) -> None:
        before = self._modem()
        self.mcr = value & 0x1F
        after = self._modem()
        changed = (before ^ after) >> 4
        # RI's delta bit notes its trailing edge only.
        self.msr_delta |= changed & 0b1011 | (4 if before & RI and not after & RI else 0)
        self._refill()
