"""The PIIX3 ISA bridge with its reset control, and the PIIX4 power management function.

May import ``bus``, ``clock`` and ``pci`` of this package.  Facts: Intel 82371SB
(PIIX3) data sheet, order number 290550 (PIRQ routing 60h-63h, port 0xCF9);
Intel 82371AB (PIIX4) data sheet, order number 290562 (function 3: PMBA at 40h,
PMREGMISC at 80h, PM1 registers, timer at 3,579,545 Hz); ACPI specification 2.0,
chapter 4.7.3.  Device numbers, GPE block and the ACPI enable commands F1h/F0h at
port 0xB2 are those of QEMU's ``pc`` machine, which SeaBIOS expects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock, ticks_at, time_of_tick
from vmipatch.emu.machine.pci import Function

PM_TIMER_HERTZ = 3_579_545
SCI_IRQ = 9
TMR_STS, GBL_STS, PWRBTN_STS, WAK_STS = 0x0001, 0x0020, 0x0100, 0x8000
SCI_EN, SLP_EN = 0x0001, 0x2000
S5, S4 = 0, 2
GPE_BASE = 0xAFE0


class IsaBridge(Function):
    """PIIX3 function 0.  ``irq`` drives an ISA interrupt line."""

    FIELDS: ClassVar[tuple[str, ...]] = ("config", "reset_control", "pirq_lines")

    def __init__(self, irq: Callable[[int, bool], None], reset_line: Callable[[], None]) -> None:
        super().__init__(0x8086, 0x7000, 0x060100, multifunction=True)
        self._irq = irq
        self._reset_line = reset_line
        self.reset_control = 0
        self.pirq_lines = 0
        self.initial[0x60:0x64] = b"\x80" * 4
        for register in (0x4C, *range(0x60, 0x64), 0x69, 0x70, 0x71, 0x76, 0x77, 0x82, 0xA0, 0xA2, 0xAA):
            self.writable[register] = 0xFF
        self.writable[0x4E] = self.writable[0x4F] = 0xFF
        self.initial[0x4C], self.initial[0x4E] = 0x4D, 0x03
        self.config = bytearray(self.initial)

    def attach(self, bus: Bus) -> None:
        """Claim the reset control register."""
        bus.claim_ports(0xCF9, 0xCF9, self._read_reset, self._write_reset)

    def reset(self) -> None:
        """Interrupts not routed."""
        self.reset_control = 0
        self.pirq_lines = 0
        super().reset()

    def set_pirq(self, number: int, asserted: bool) -> None:
        """Drive PIRQ A (0) to D (3); the routing register says which IRQ that is."""
        bit = 1 << number
        self.pirq_lines = self.pirq_lines | bit if asserted else self.pirq_lines & ~bit
        route = self.config[0x60 + number]
        if route & 0x80:
            return
        shared = any(self.pirq_lines >> other & 1 and self.config[0x60 + other] == route for other in range(4))
        self._irq(route & 15, shared)

    def _read_reset(self, port: int, size: int) -> int:
        return self.reset_control

    def _write_reset(self, port: int, size: int, value: int) -> None:
        rising = value & 4 and not self.reset_control & 4
        self.reset_control = value & 2
        if rising:
            self._reset_line()


class PowerManagement(Function):
    """PIIX4 function 3: PM1 event, control and timer blocks, and the APM ports."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "config", "status", "enable", "control", "global_control", "apm_control", "apm_status", "gpe_status",
        "gpe_enable", "seen_toggles",
    )  # fmt: skip

    def __init__(self, clock: Clock, irq: Callable[[bool], None], power_off: Callable[[], None]) -> None:
        super().__init__(0x8086, 0x7113, 0x068000, revision=3)
        self._clock = clock
        self._irq = irq
        self._power_off = power_off
        self._timer = clock.timer("acpi-pm", self._update)
        self._bus: Bus | None = None
        self._decoded: int | None = None
        self.initial[0x3D] = 1
        self.initial[0x40] = 0x01
        self.initial[0x90] = 0x01
        # System management mode is not there: marked as set up, as QEMU does under KVM without it.
        self.initial[0x5B] = 0x02
        for register in range(0x40, 0x100):
            self.writable[register] = 0xFF
        self.writable[0x40], self.writable[0x42], self.writable[0x43] = 0xC0, 0, 0
        self.writable[0x90] = 0xF0
        self._clear()
        self.config = bytearray(self.initial)

    def _clear(self) -> None:
        self.status = self.enable = self.control = self.global_control = 0
        self.apm_control = self.apm_status = 0
        self.gpe_status = self.gpe_enable = 0
        self.seen_toggles = 0

    def attach(self, bus: Bus) -> None:
        """Claim the fixed ports; the PM block follows its base register."""
        self._bus = bus
        bus.claim_ports(0xB2, 0xB3, self._read_apm, self._write_apm)
        bus.claim_ports(GPE_BASE, GPE_BASE + 3, self._read_gpe, self._write_gpe)

    def reset(self) -> None:
        """Block disabled, ACPI mode off."""
        self._clear()
        self.seen_toggles = self._toggles()
        super().reset()
        self._update()

    def changed(self, offset: int, size: int) -> None:
        """Follow the base address and its enable bit."""
        config = self.config
        base = (config[0x41] << 8 | config[0x40] & 0xC0) if config[0x80] & 1 else None
        if base == self._decoded or self._bus is None:
            return
        if self._decoded is not None:
            self._bus.release_ports(self._decoded, self._decoded + 63)
        self._decoded = base
        if base is not None:
            self._bus.claim_ports(base, base + 63, self._read_pm, self._write_pm, width=4)

    def enable_at(self, base: int) -> None:
        """What a BIOS does: put the block at port ``base`` and decode it."""
        self.config[0x40], self.config[0x41], self.config[0x80] = base & 0xC0 | 1, base >> 8, 1
        self.changed(0x40, 2)

    # --- timer ------------------------------------------------------------------

    def timer_value(self) -> int:
        """The 24-bit ACPI timer."""
        return ticks_at(self._clock.now, PM_TIMER_HERTZ) & 0xFF_FFFF

    def _toggles(self) -> int:
        return ticks_at(self._clock.now, PM_TIMER_HERTZ) >> 23

    def _update(self) -> None:
        toggles = self._toggles()
        if toggles != self.seen_toggles:
            self.seen_toggles = toggles
            self.status |= TMR_STS
        sci = bool(self.control & SCI_EN) and bool(
            self.status & self.enable & 0x0521 or self.gpe_status & self.gpe_enable
        )
        self._irq(sci)
        if self.enable & TMR_STS:
            self._timer.arm(time_of_tick((toggles + 1) << 23, PM_TIMER_HERTZ))
        else:
            self._timer.disarm()

    # --- registers ----------------------------------------------------------------

    def _read_pm(self, port: int, size: int) -> int:
        assert self._decoded is not None
        self._update()
        offset = port - self._decoded
        block = bytearray(64)
        block[0:2] = self.status.to_bytes(2, "little")
        block[2:4] = self.enable.to_bytes(2, "little")
        block[4:6] = self.control.to_bytes(2, "little")
        block[8:12] = self.timer_value().to_bytes(4, "little")
        block[0x28:0x2C] = self.global_control.to_bytes(4, "little")
        return int.from_bytes(block[offset : offset + size], "little")

    def _write_pm(self, port: int, size: int, value: int) -> None:
        assert self._decoded is not None
        self._update()
        for index in range(size):
            self._write_pm_byte(port - self._decoded + index, value >> (8 * index) & 0xFF)
        self._update()

    def _write_pm_byte(self, offset: int, value: int) -> None:
        shift = 8 * (offset & 1)
        keep = 0xFFFF & ~(0xFF << shift)
        if offset < 2:
            self.status &= ~(value << shift)
        elif offset < 4:
            self.enable = self.enable & keep | value << shift
        elif offset < 6:
            self.control = self.control & keep | value << shift
            if self.control & SLP_EN:
                self.control &= ~SLP_EN
                self._sleep(self.control >> 10 & 7)
        elif 0x28 <= offset < 0x2C:
            shift = 8 * (offset - 0x28)
            self.global_control = self.global_control & ~(0xFF << shift) | value << shift

    def _sleep(self, kind: int) -> None:
        if kind in (S5, S4):
            self._power_off()
        else:
            self.status |= WAK_STS  # nothing else sleeps here: awake again at once

    def _read_apm(self, port: int, size: int) -> int:
        return self.apm_status if port & 1 else self.apm_control

    def _write_apm(self, port: int, size: int, value: int) -> None:
        if port & 1:
            self.apm_status = value
            return
        self.apm_control = value
        if value == 0xF1:
            self.control |= SCI_EN
        elif value == 0xF0:
            self.control &= ~SCI_EN
        self._update()

    def _read_gpe(self, port: int, size: int) -> int:
        offset = port - GPE_BASE
        return (self.gpe_status if offset < 2 else self.gpe_enable) >> (8 * (offset & 1)) & 0xFF

    def _write_gpe(self, port: int, size: int, value: int) -> None:
        offset = port - GPE_BASE
        shift = 8 * (offset & 1)
        if offset < 2:
            self.gpe_status &= ~(value << shift)
        else:
            self.gpe_enable = self.gpe_enable & ~(0xFF << shift) | value << shift
        self._update()
