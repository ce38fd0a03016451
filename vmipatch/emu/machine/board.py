"""The board: which devices there are, where they sit and how their lines run.

May import the devices of this package and ``vmipatch.errors``.  The board is
QEMU's ``pc`` machine as far as firmware and kernels can see it: i440FX, PIIX3,
PIIX4 power management, no disks, no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from vmipatch.emu.machine.apic import LocalApic
from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock
from vmipatch.emu.machine.contract import PhysicalMemory, Processor
from vmipatch.emu.machine.device import Device
from vmipatch.emu.machine.dma import Dma
from vmipatch.emu.machine.fw_cfg import FirmwareConfig
from vmipatch.emu.machine.i440fx import HostBridge
from vmipatch.emu.machine.ioapic import IoApic
from vmipatch.emu.machine.keyboard import KeyboardController
from vmipatch.emu.machine.pci import Pci
from vmipatch.emu.machine.pic import PicPair
from vmipatch.emu.machine.piix import SCI_IRQ, IsaBridge, PowerManagement
from vmipatch.emu.machine.pit import Pit
from vmipatch.emu.machine.ports import DebugPorts, SystemPorts
from vmipatch.emu.machine.romcard import RomCard
from vmipatch.emu.machine.rtc import DEFAULT_DATE, Rtc
from vmipatch.emu.machine.uart import Uart
from vmipatch.emu.machine.vga import Vga
from vmipatch.errors import EmulatorError

MEBIBYTE = 1 << 20
MAX_RAM = 3072 * MEBIBYTE  # PCI, APICs and the BIOS lie above
LOW_RAM_END, HIGH_RAM = 0xA0000, 0x100000


@dataclass(frozen=True)
class BoardOptions:
    """What can be chosen about a board; part of every snapshot's meaning.

    ``ram_bytes``: a multiple of 4096; ``date``: what the RTC shows at
    power-on; ``roms``: expansion ROMs, each on a PCI card of its own.
    """

    ram_bytes: int = 128 * MEBIBYTE
    ns_per_instruction: int = 10
    date: datetime = DEFAULT_DATE
    vga: bool = True
    roms: tuple[bytes, ...] = ()


@dataclass
class Consoles:
    """What the guest printed, byte by byte, and who listens."""

    serial: bytearray = field(default_factory=bytearray)
    debug: bytearray = field(default_factory=bytearray)
    listeners: list[Callable[[str, int], None]] = field(default_factory=list)

    def put(self, console: str, byte: int) -> None:
        """A byte on ``"serial"`` or ``"debug"``."""
        (self.serial if console == "serial" else self.debug).append(byte)
        for listener in self.listeners:
            listener(console, byte)


class Board:
    """Memory, bus and devices of one machine; ``stop`` is called for reset, power-off and debug exit."""

    def __init__(
        self,
        options: BoardOptions,
        processor: Processor,
        memory: PhysicalMemory,
        bus: Bus,
        stop: Callable[[str], None],
    ) -> None:
        check_options(options)
        self.options = options
        self.processor = processor
        self.memory = memory
        self.bus = bus
        self.consoles = Consoles()
        self.exit_code: int | None = None
        self.filter_interrupt: Callable[[bool], bool] | None = None
        """A hypervisor between the interrupt controllers and the processor's pin."""
        self._stop = stop
        clock = self.clock = Clock(processor, options.ns_per_instruction)
        clock.on_sooner = processor.request_exit

        self.apic = LocalApic(clock, self._update_interrupt, processor.nmi, self._end_of_interrupt)
        self.ioapic = IoApic()
        self.pic = PicPair()
        self.pic.on_change = self._update_interrupt
        self.pit = Pit(clock, self._line(0))
        self.rtc = Rtc(clock, self._line(8), options.ram_bytes, options.date)
        self.uart = Uart(self._line(4), lambda byte: self.consoles.put("serial", byte))
        self.system = SystemPorts(clock, self.pit, self._reset_line, processor.set_a20)
        self.keyboard = KeyboardController(self._line(1), self._reset_line, self.system.drive_a20, self.system.is_a20)
        self.debug = DebugPorts(lambda byte: self.consoles.put("debug", byte), self._debug_exit)
        self.dma = Dma()
        self.fw_cfg = FirmwareConfig(memory, options.ram_bytes)
        self.host_bridge = HostBridge(memory, 0)
        self.isa_bridge = IsaBridge(self.set_irq, self._reset_line)
        self.power = PowerManagement(clock, self._line(SCI_IRQ), lambda: self._stop("poweroff"))
        self.vga = Vga(clock, memory) if options.vga else None
        self.rom_cards = tuple([RomCard(memory, rom) for rom in options.roms])
        self.pci = Pci()
        self._wire()
        self.devices: tuple[Device, ...] = (
            self.apic, self.ioapic, self.pic, self.pit, self.rtc, self.uart, self.system, self.keyboard,
            self.debug, self.dma, self.fw_cfg, self.pci, *([self.vga] if self.vga else []),
        )  # fmt: skip
        self.reset()

    def _wire(self) -> None:
        bus, memory = self.bus, self.memory
        memory.map(0, min(LOW_RAM_END, self.options.ram_bytes), 0)
        if self.options.ram_bytes > HIGH_RAM:
            memory.map(HIGH_RAM, self.options.ram_bytes - HIGH_RAM, HIGH_RAM)
        self.dma.attach(bus)
        self.pic.attach(bus)
        self.pit.attach(bus)
        self.rtc.attach(bus)
        self.system.attach(bus)
        self.keyboard.attach(bus)
        self.debug.attach(bus)
        self.fw_cfg.attach(bus)
        self.pci.attach(bus)
        self.apic.attach(bus)
        self.host_bridge.attach(bus)
        self.isa_bridge.attach(bus)
        self.power.attach(bus)
        if self.vga is not None:
            self.vga.attach(bus)
        self.uart.attach(bus, 0x3F8)
        self.ioapic.attach(bus, self.apic)
        self.pci.plug(0, 0, self.host_bridge)
        self.pci.plug(1, 0, self.isa_bridge)
        self.pci.plug(1, 3, self.power)
        for index, card in enumerate(self.rom_cards):
            self.pci.plug(3 + index, 0, card)
        bus.interrupt_controller = self._acknowledge
        bus.apic_base_listener = self.apic.write_base

    def reset(self) -> None:
        """Every device as after power-on; RAM keeps its content."""
        for device in self.devices:
            device.reset()
        self._update_interrupt()

    # --- interrupt lines ----------------------------------------------------------

    def _line(self, irq: int) -> Callable[[bool], None]:
        def drive(level: bool) -> None:
            self.set_irq(irq, level)

        return drive

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive an ISA interrupt: both controllers see it, IRQ 0 as input 2 of the IOAPIC."""
        self.pic.set_line(irq, level)
        self.ioapic.set_line(2 if irq == 0 else irq, level)

    def _end_of_interrupt(self, vector: int) -> None:
        self.ioapic.end_of_interrupt(vector)

    def interrupt_level(self) -> bool:
        """The line that the interrupt controllers drive."""
        return self.apic.pending() or (self.pic.output and self.apic.passes_extint())

    def _update_interrupt(self) -> None:
        level = self.interrupt_level()
        if self.filter_interrupt is not None:
            level = self.filter_interrupt(level)
        self.processor.interrupt_line = level

    def refresh_interrupt(self) -> None:
        """Drive the processor's pin anew: somebody else has set it."""
        self._update_interrupt()

    def _acknowledge(self) -> int:
        if self.apic.pending() or not self.pic.output:
            return self.apic.acknowledge() if self.apic.enabled else self.pic.acknowledge()
        return self.pic.acknowledge()

    # --- ends ------------------------------------------------------------------------

    def _reset_line(self) -> None:
        self._stop("reset")

    def _debug_exit(self, code: int) -> None:
        self.exit_code = code
        self._stop("debug exit")

    # --- snapshots ---------------------------------------------------------------------

    def save(self) -> tuple[Any, ...]:
        """Time and every device."""
        return self.clock.save(), tuple([device.save() for device in self.devices])

    def restore(self, state: tuple[Any, ...]) -> None:
        """Bring back what :meth:`save` returned; :meth:`refresh_interrupt` is left to the caller."""
        clock, devices = state
        for device, fields in zip(self.devices, devices, strict=True):
            device.restore(fields)
        self.clock.restore(clock)


def check_options(options: BoardOptions) -> None:
    """Raises :class:`EmulatorError` for a board that cannot be built."""
    ram = options.ram_bytes
    if ram % 4096 or not MEBIBYTE <= ram <= MAX_RAM:
        raise EmulatorError(
            f"a machine has 1 to {MAX_RAM // MEBIBYTE} MiB of memory, in pages of 4096 bytes; not {ram} bytes"
        )
    if not 1 <= options.ns_per_instruction <= 1_000_000:
        raise EmulatorError("an instruction takes 1 to 1,000,000 ns")
    if not 1900 <= options.date.year <= 2999:
        raise EmulatorError("the clock starts between the years 1900 and 2999")
    if len(options.roms) > 16:
        raise EmulatorError("there is room for 16 expansion ROMs")
    for rom in options.roms:
        if not 0 < len(rom) <= 16 * MEBIBYTE:
            raise EmulatorError("an expansion ROM has 1 byte to 16 MiB")
