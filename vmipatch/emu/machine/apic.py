"""The local APIC of one processor, at 0xFEE00000.

May import ``bus``, ``clock`` and ``device`` of this package.  Facts: Intel SDM
volume 3, chapter "Advanced Programmable Interrupt Controller"; version register
as of the P6 family (0x11, five LVT entries).  The timer's input clock is fixed
at 100 MHz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock
from vmipatch.emu.machine.device import Device

BASE = 0xFEE0_0000
VERSION = 0x0004_0011
TIMER_NS = 10
MASKED = 1 << 16
PERIODIC = 1 << 17
FIXED, LOWEST, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
TIMER, PERFORMANCE, LINT0, LINT1, ERROR = range(5)
LVT_OFFSETS = {0x320: TIMER, 0x340: PERFORMANCE, 0x350: LINT0, 0x360: LINT1, 0x370: ERROR}
LVT_WRITABLE = (0x3_00FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF)
ESR_SEND_ACCEPT, ESR_SEND_VECTOR, ESR_RECEIVE_VECTOR, ESR_REGISTER = 0x04, 0x20, 0x40, 0x80


class LocalApic(Device):
    """Registers, priorities and timer; bit sets of 256 vectors are integers."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "base_msr", "tpr", "ldr", "dfr", "svr", "isr", "tmr", "irr", "esr", "esr_latched", "icr", "icr_high",
        "lvt", "initial_count", "divide", "started", "ident",
    )  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        on_change: Callable[[], None],
        nmi: Callable[[], None],
        eoi_broadcast: Callable[[int], None],
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self._nmi = nmi
        self._eoi_broadcast = eoi_broadcast
        self._timer = clock.timer("apic", self._expired)
        self._bus: Bus | None = None
        self.reset()

    def attach(self, bus: Bus) -> None:
        """Claim the register page."""
        self._bus = bus
        bus.claim_memory(BASE, 0x1000, self.read, self.write)

    def reset(self) -> None:
        """After power-up: software-disabled, every LVT entry masked."""
        self.base_msr = BASE | 0x900
        self.ident = 0
        self.tpr = self.ldr = 0
        self.dfr = 0xFFFF_FFFF
        self.svr = 0xFF
        self.isr = self.tmr = self.irr = 0
        self.esr = self.esr_latched = 0
        self.icr = self.icr_high = 0
        self.lvt = [MASKED] * 5
        self.initial_count = self.divide = 0
        self.started = 0
        self._timer.disarm()

    # --- what the rest of the machine sees -------------------------------------

    @property
    def enabled(self) -> bool:
        """Enabled by the MSR (bit 11) and by software (SVR bit 8)."""
        return bool(self.base_msr & 0x800) and bool(self.svr & 0x100)

    def write_base(self, value: int) -> None:
        """A write of IA32_APIC_BASE; disabling it there resets it (SDM, "Enabling or Disabling")."""
        was = self.base_msr & 0x800
        self.base_msr = value
        if was and not value & 0x800:
            self.reset()
            self.base_msr = value
        self._on_change()

    def passes_extint(self) -> bool:
        """Whether the 8259A's INTR reaches the core.

        With the APIC disabled, LINT0 is the INTR pin.  Enabled, its LVT entry
        decides.
        """
        if not self.enabled:
            return True
        entry = self.lvt[LINT0]
        return not entry & MASKED and entry >> 8 & 7 == EXTINT

    def pending(self) -> bool:
        """Whether a vector waits that the task and processor priorities let through."""
        return self.enabled and bool(self.irr) and (self.irr.bit_length() - 1) >> 4 > self.ppr() >> 4

    def acknowledge(self) -> int:
        """The core takes the highest vector; the spurious one if none is left."""
        if not self.pending():
            return self.svr & 0xFF
        vector = self.irr.bit_length() - 1
        self.irr &= ~(1 << vector)
        self.isr |= 1 << vector
        self._on_change()
        return vector

    def ppr(self) -> int:
        """Processor priority: the higher class of TPR and the highest vector in service."""
        in_service = max(self.isr.bit_length() - 1, 0)
        return self.tpr if self.tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    def matches(self, destination: int, logical: bool) -> bool:
        """Whether a message to ``destination`` is for this APIC."""
        if not logical:
            return destination in (0xFF, self.ident)
        own = self.ldr >> 24
        if self.dfr >> 28 == 0xF:
            return bool(own & destination)
        return own >> 4 == destination >> 4 and bool(own & destination & 0xF)

    def deliver(self, mode: int, vector: int, level: bool) -> None:
        """A message from the bus, an IOAPIC or an LVT entry."""
        if mode in (FIXED, LOWEST):
            if vector < 16:
                self._error(ESR_RECEIVE_VECTOR)
            elif self.enabled:
                bit = 1 << vector
                self.irr |= bit
                self.tmr = self.tmr | bit if level else self.tmr & ~bit
        elif mode == NMI:
            self._nmi()
        self._on_change()

    def _error(self, bit: int) -> None:
        self.esr |= bit
        entry = self.lvt[ERROR]
        if not entry & MASKED and entry & 0xFF >= 16:
            self.deliver(FIXED, entry & 0xFF, False)

    # --- timer ----------------------------------------------------------------

    def _tick_ns(self) -> int:
        code = self.divide & 3 | (self.divide >> 1 & 4)
        return TIMER_NS if code == 7 else TIMER_NS << (code + 1)

    def current_count(self) -> int:
        """What the current-count register shows."""
        if not self.initial_count:
            return 0
        passed = (self._clock.now - self.started) // self._tick_ns()
        if self.lvt[TIMER] & PERIODIC:
            return self.initial_count - passed % self.initial_count
        return max(0, self.initial_count - passed)

    def _start(self) -> None:
        self.started = self._clock.now
        if self.initial_count:
            self._timer.arm(self.started + self.initial_count * self._tick_ns())
        else:
            self._timer.disarm()

    def _expired(self) -> None:
        entry = self.lvt[TIMER]
        if entry & PERIODIC:
            # A period shorter than the engine's step must not stop time: whole periods are made up for.
            period = self.initial_count * self._tick_ns()
            self.started += (self._clock.now - self.started) // period * period
            self._timer.arm(self.started + period)
        self.raise_timer()

    def raise_timer(self) -> None:
        """What the timer's LVT entry says happens now; a hypervisor's alarm may be wired to it."""
        entry = self.lvt[TIMER]
        if not entry & MASKED:
            self.deliver(FIXED, entry & 0xFF, False)

    # --- registers --------------------------------------------------------------

    def read(self, physical: int, size: int) -> int:
        """A load from the register page; only aligned doublewords are registers."""
        offset = physical - BASE
        if not self.base_msr & 0x800:
            return 0xFFFF_FFFF
        value = self._read(offset & 0xFF0) if not offset & 0xC else 0
        return value >> (8 * (offset & 3))

    def _read(self, offset: int) -> int:
        if offset in LVT_OFFSETS:
            return self.lvt[LVT_OFFSETS[offset]]
        for first, bits in ((0x100, self.isr), (0x180, self.tmr), (0x200, self.irr)):
            if first <= offset < first + 0x80:
                return bits >> (2 * (offset - first)) & 0xFFFF_FFFF
        simple = {
            0x20: self.ident << 24,
            0x30: VERSION,
            0x80: self.tpr,
            0x90: self.ppr(),
            0xA0: self.ppr(),
            0xD0: self.ldr,
            0xE0: self.dfr,
            0xF0: self.svr,
            0x280: self.esr_latched,
            0x300: self.icr,
            0x310: self.icr_high,
            0x380: self.initial_count,
            0x390: self.current_count(),
            0x3E0: self.divide,
        }
        if offset not in simple and offset != 0xB0:
            self._error(ESR_REGISTER)
        return simple.get(offset, 0)

    def write(self, physical: int, size: int, value: int) -> None:
        """A store into the register page."""
        offset = physical - BASE
        if offset & 0xF or size != 4 or not self.base_msr & 0x800:
            return
        if offset in LVT_OFFSETS:
            self._write_lvt(LVT_OFFSETS[offset], value)
        elif offset == 0x20:
            self.ident = value >> 24 & 0xF
        elif offset == 0x80:
            self.tpr = value & 0xFF
        elif offset == 0xB0:
            self._eoi()
        elif offset == 0xD0:
            self.ldr = value & 0xFF00_0000
        elif offset == 0xE0:
            self.dfr = value | 0x0FFF_FFFF
        elif offset == 0xF0:
            self._write_svr(value)
        elif offset == 0x280:
            self.esr_latched, self.esr = self.esr, 0
        elif offset == 0x300:
            self.icr = value & 0x000C_CFFF
            self._send()
        elif offset == 0x310:
            self.icr_high = value & 0xFF00_0000
        elif offset == 0x380:
            self.initial_count = value
            self._start()
        elif offset == 0x3E0:
            self._write_divide(value & 0xB)
        else:
            self._error(ESR_REGISTER)
        self._on_change()

    def _write_divide(self, value: int) -> None:
        left = self.current_count()
        self.divide = value
        if self.initial_count and left:
            tick = self._tick_ns()
            self.started = self._clock.now - (self.initial_count - left) * tick
            self._timer.arm(self._clock.now + left * tick)

    def _write_svr(self, value: int) -> None:
        self.svr = value & 0x1FF | 0x0F  # bits 0 to 3 are hardwired to ones on the P6 family
        if not value & 0x100:
            self.lvt = [entry | MASKED for entry in self.lvt]

    def _write_lvt(self, index: int, value: int) -> None:
        was_periodic = self.lvt[index] & PERIODIC
        if not self.svr & 0x100:
            value |= MASKED
        self.lvt[index] = value & LVT_WRITABLE[index]
        if index == TIMER and was_periodic and not value & PERIODIC and self.initial_count:
            # The count that runs becomes the last one.
            passed = (self._clock.now - self.started) // self._tick_ns()
            self.started += passed // self.initial_count * self.initial_count * self._tick_ns()

    def _eoi(self) -> None:
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        if self.tmr >> vector & 1:
            self.tmr &= ~(1 << vector)
            self._eoi_broadcast(vector)

    def _send(self) -> None:
        mode, vector = self.icr >> 8 & 7, self.icr & 0xFF
        shorthand = self.icr >> 18 & 3
        if mode in (FIXED, LOWEST) and vector < 16:
            self._error(ESR_SEND_VECTOR)
            return
        if shorthand == 0:
            mine = self.matches(self.icr_high >> 24, bool(self.icr & 0x800))
            if not mine:
                self._error(ESR_SEND_ACCEPT)
        else:
            mine = shorthand in (1, 2)
        # INIT and start-up messages find no other processor, and are not for a running one.
        if mine and mode in (FIXED, LOWEST, NMI):
            self.deliver(mode, vector, False)
