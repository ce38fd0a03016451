"""The host-side BIOS: its ROM image, data areas and chip set-up, as a BIOS leaves them.

May import this package's lower modules and the machine.  Facts: IBM PS/2 and PC
BIOS Interface Technical Reference (interrupt vectors, BIOS data area at
0x400, reset vector, model byte at F000:FFFE).

The ROM is ours and tiny.  A service is a stub of three bytes, ``OUT 0xE8, AL``
and ``IRET``: the write makes the processor leave after that instruction, and
:mod:`bios_calls` does the work on the registers and on the flags that lie on
the guest's stack.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmipatch.emu.firmware import acpi, mptable
from vmipatch.emu.firmware.memory_map import BASE_MEMORY_END, BIOS, EBDA
from vmipatch.emu.machine import apic

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

TRAP_PORT = 0xE8
SEGMENT = 0xF000
STUBS = 0x1000  # service n at STUBS + 4 * n
RETURN_STUB = 0x1800  # a far call's return address
IRQ0_HANDLER, IRQ_LOW_HANDLER, IRQ_HIGH_HANDLER, IRET_HANDLER = 0x2000, 0x2040, 0x2060, 0x2080
# Virtual wire mode (MPS 1.4, 3.6.2.2): the APIC on, LINT0 as the 8259s' line, LINT1 as NMI.
VIRTUAL_WIRE = ((0xF0, 0x10F), (0x350, 0x700), (0x360, 0x400))
SERVICES = (0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1A)

# push ds; push eax; xor ax,ax; mov ds,ax; inc dword [046C]; int 1C; mov al,20; out 20,al; pop eax; pop ds; iret
_IRQ0 = bytes.fromhex("1e665031c08ed866ff066c04cd1cb020e62066581fcf")
_IRQ_LOW = bytes.fromhex("50b020e62058cf")  # push ax; mov al,20; out 20,al; pop ax; iret
_IRQ_HIGH = bytes.fromhex("50b020e6a0e62058cf")


def rom_image(signature: int = 0, features: int = 0) -> bytes:
    """The 64 KiB at F0000, for a processor whose CPUID leaf 1 says so in EAX and EDX."""
    rom = bytearray(b"\xf4" * 0x10000)  # HLT wherever nothing of ours stands
    for number in range(256):
        at = STUBS + 4 * number
        rom[at : at + 4] = bytes((0xE6, TRAP_PORT, 0xCF, 0xF4))
    rom[RETURN_STUB : RETURN_STUB + 4] = bytes((0xE6, TRAP_PORT, 0xF4, 0xF4))
    for at, code in (
        (IRQ0_HANDLER, _IRQ0),
        (IRQ_LOW_HANDLER, _IRQ_LOW),
        (IRQ_HIGH_HANDLER, _IRQ_HIGH),
        (IRET_HANDLER, b"\xcf"),
    ):
        rom[at : at + len(code)] = code
    for at, tables in ((acpi.TABLES, acpi.tables()), (mptable.TABLES, mptable.tables(signature, features))):
        rom[at : at + len(tables)] = tables
    rom[0xFFF0:0xFFF5] = b"\xea" + struct.pack("<HH", STUBS + 4 * 0x19, SEGMENT)
    rom[0xFFF5:0xFFFD] = b"01/01/20"
    rom[0xFFFE] = 0xFC
    return bytes(rom)


def vectors() -> bytes:
    """The real-mode interrupt vector table."""
    table = [IRET_HANDLER] * 256
    table[0x08] = IRQ0_HANDLER
    table[0x09:0x10] = [IRQ_LOW_HANDLER] * 7
    table[0x70:0x78] = [IRQ_HIGH_HANDLER] * 8
    for number in SERVICES:
        table[number] = STUBS + 4 * number
    return b"".join(struct.pack("<HH", offset, SEGMENT) for offset in table)


def install(machine: Machine) -> None:
    """Put the ROM, vectors and data area in place and set the chips up."""
    board, memory = machine.board, machine.memory
    backing = memory.allocate(0x10000)
    leaves: dict[int, tuple[int, ...]] = machine.cpu.leaves  # type: ignore[assignment]
    memory.write_backing(backing, rom_image(leaves[1][0], leaves[1][3]))
    board.host_bridge.place_rom(BIOS, 0x10000, backing)
    memory.write(0, vectors())
    memory.write(0x400, _data_area())
    memory.write(EBDA, b"\x01")
    memory.write(acpi.FACS, acpi.facs())
    _chips(machine)


def _data_area() -> bytes:
    area = bytearray(0x100)

    def put(offset: int, value: int, size: int = 2) -> None:
        area[offset : offset + size] = value.to_bytes(size, "little")

    put(0x00, 0x3F8)
    put(0x0E, EBDA >> 4)
    put(0x10, 0x0226)  # coprocessor, 80x25 colour, pointing device's bit clear, one serial port
    put(0x13, BASE_MEMORY_END >> 10)
    put(0x49, 3, 1)
    put(0x4A, 80)
    put(0x4C, 4000)
    put(0x60, 0x0D0E)
    put(0x63, 0x3D4)
    put(0x80, 0x1E)
    put(0x82, 0x3E)
    put(0x84, 24, 1)
    put(0x85, 16)
    return bytes(area)


def _chips(machine: Machine) -> None:
    """Interrupt controllers, timer and ACPI block, through the ports as a BIOS does."""
    out = machine.bus.port_write
    for port, value in (
        (0x20, 0x11), (0x21, 0x08), (0x21, 0x04), (0x21, 0x01), (0xA0, 0x11), (0xA1, 0x70), (0xA1, 0x02),
        (0xA1, 0x01), (0x21, 0xB8), (0xA1, 0xFF), (0x43, 0x34), (0x40, 0x00), (0x40, 0x00), (0x3FB, 0x03), (0x64, 0xAA),
    ):  # fmt: skip
        out(port, 1, value)
    machine.bus.port_read(0x60, 1)
    out(0x64, 1, 0x60)
    out(0x60, 1, 0x61)  # keyboard interrupts on when somebody enables them, system flag, translation
    machine.board.power.enable_at(acpi.PM_BASE)
    for register, value in VIRTUAL_WIRE:
        machine.bus.memory_write(apic.BASE + register, 4, value)
    machine.bus.port_accesses = machine.bus.mmio_accesses = 0
