"""The MP table of the host-side BIOS: one processor, its local APIC, and the I/O APIC with its wires.

May import ``memory_map`` and the machine's APICs' addresses.  Facts: Intel MultiProcessor Specification 1.4,
chapter 4 (tables 4-1, 4-2 and 4-4 to 4-12) and section 3.6.2.2 (virtual wire mode).  The wires are those of
:mod:`vmipatch.emu.machine.board`: ISA interrupts go to the input of their number, IRQ 0 to input 2, and the
8259s' own output to LINT0 only.

Why there is one: a kernel with a driver for I/O APICs takes the board for one without if nobody tells.  Linux
from 2.6.22 on then has VMI's timer ring at vector 0x31, which is IRQ 0 only where an I/O APIC was found
(arch/i386/kernel/vmiclock.c, vmi_get_timer_vector; i8259.c, native_init_IRQ).
"""

from __future__ import annotations

import struct

from vmipatch.emu.firmware.memory_map import BIOS
from vmipatch.emu.machine import apic, ioapic

TABLES = 0x5000  # offset in the BIOS ROM
PROCESSOR, BUS, IO_APIC, INTERRUPT, LOCAL_INTERRUPT = range(5)
INT, NMI, EXTINT = 0, 1, 3
ENABLED, BOOT_PROCESSOR = 1, 2
CONFORMING, LEVEL_HIGH = 0, 0b1101  # polarity in bits 1:0, trigger mode in bits 3:2
PCI_BUS, ISA_BUS = 0, 1
PROCESSOR_APIC, IO_APIC_ID, ALL_APICS = 0, 1, 0xFF
CASCADE, SCI = 2, 9


def input_of(irq: int) -> int:
    """The I/O APIC's input that an ISA interrupt is wired to."""
    return CASCADE if irq == 0 else irq


def _entries(signature: int, features: int) -> list[bytes]:
    versions = apic.VERSION & 0xFF, ioapic.VERSION & 0xFF
    entries = [
        struct.pack(
            "<BBBBIIII", PROCESSOR, PROCESSOR_APIC, versions[0], ENABLED | BOOT_PROCESSOR, signature, features, 0, 0
        ),
        struct.pack("<BB6s", BUS, PCI_BUS, b"PCI   "),
        struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", IO_APIC, IO_APIC_ID, versions[1], ENABLED, ioapic.BASE),
    ]
    for irq in range(16):
        if irq != CASCADE:
            flags = LEVEL_HIGH if irq == SCI else CONFORMING
            entries.append(struct.pack("<BBHBBBB", INTERRUPT, INT, flags, ISA_BUS, irq, IO_APIC_ID, input_of(irq)))
    for kind, pin in ((EXTINT, 0), (NMI, 1)):
        entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, kind, CONFORMING, ISA_BUS, 0, ALL_APICS, pin))
    return entries


def _summed(data: bytes, at: int) -> bytes:
    """The same with the byte at ``at`` such that all bytes add up to 0."""
    out = bytearray(data)
    out[at] = -sum(out) & 0xFF
    return bytes(out)


def tables(signature: int, features: int) -> bytes:
    """Floating pointer and configuration table for offset :data:`TABLES` of the BIOS ROM.

    ``signature`` and ``features``: EAX and EDX of CPUID's leaf 1.
    """
    entries = _entries(signature, features)
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        b"PCMP", 44 + len(body), 4, 0, b"VMIPATCH", b"MACHINE     ", 0, 0, len(entries), apic.BASE, 0, 0, 0,
    )  # fmt: skip
    pointer = struct.pack("<4sIBBB5x", b"_MP_", BIOS + TABLES + 16, 1, 4, 0)
    return _summed(pointer, 10) + _summed(header + body, 7)
