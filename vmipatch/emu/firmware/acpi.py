"""The ACPI tables of the host-side BIOS: enough for a kernel to find PCI, APICs, the PM timer and soft-off.

May import ``memory_map``, ``mptable`` and the machine's APICs' addresses.  Facts: ACPI specification 2.0, chapters
5.2 (RSDP, RSDT, FADT revision 1, FACS; 5.2.10.4: MADT), 6.4 (resource descriptors) and 17 (AML encoding).
The MADT says what the MP table says: a kernel with ACPI believes no MP table where there is no MADT.
"""

from __future__ import annotations

import struct

from vmipatch.emu.firmware import mptable
from vmipatch.emu.firmware.memory_map import BIOS, EBDA
from vmipatch.emu.machine import apic, ioapic

TABLES = 0x4000  # offset in the BIOS ROM
FACS = EBDA + 0x40  # the one table that an operating system writes
PM_BASE, GPE_BASE, GPE_LENGTH = 0x600, 0xAFE0, 4
SMI_COMMAND, ACPI_ENABLE, ACPI_DISABLE, SCI = 0xB2, 0xF1, 0xF0, 9
# WBINVD works, C1 on every processor, power and sleep buttons are not fixed hardware, nor is RTC wake.
FADT_FLAGS = 0x01 | 0x04 | 0x10 | 0x20 | 0x40
LEGACY_DEVICES, KEYBOARD_CONTROLLER = 1, 2
WINDOW, WINDOW_END = 0xC0000000, 0xFEBFFFFF  # where PCI memory may lie: above any RAM, below the I/O APIC


def _name(name: str, value: bytes) -> bytes:
    return b"\x08" + name.encode("ascii") + value


def _package_length(content: bytes) -> bytes:
    """PkgLength counts itself; one byte up to 63, else two."""
    if len(content) + 1 < 64:
        return bytes((len(content) + 1,)) + content
    total = len(content) + 2
    return bytes((0x40 | total & 15, total >> 4)) + content


def _word_space(kind: int, flags: int, first: int, last: int) -> bytes:
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, 0x0C, flags, 0, first, last, 0, last - first + 1)


def _memory_space(flags: int, first: int, last: int) -> bytes:
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, flags, 0, first, last, 0, last - first + 1)


def _definition_block() -> bytes:
    """\\_S5 (sleep type 0) and a PCI root bridge PNP0A03 with its buses, ports and memory."""
    resources = (
        _word_space(2, 0, 0, 0xFF)
        + struct.pack("<BBHHBB", 0x47, 1, 0xCF8, 0xCF8, 1, 8)
        + _word_space(1, 3, 0, 0xCF7)
        + _word_space(1, 3, 0xD00, 0xFFFF)
        + _memory_space(3, 0xA0000, 0xBFFFF)
        + _memory_space(1, WINDOW, WINDOW_END)
        + b"\x79\x00"
    )
    buffer = b"\x11" + _package_length(b"\x0b" + struct.pack("<H", len(resources)) + resources)
    bridge = b"PCI0" + _name("_HID", b"\x0c\x41\xd0\x0a\x03") + _name("_CRS", buffer)
    scope = b"\\_SB_" + b"\x5b\x82" + _package_length(bridge)
    sleep = _name("_S5_", b"\x12" + _package_length(b"\x04" + bytes(4)))
    return sleep + b"\x10" + _package_length(scope)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, b"VMIPAT", b"MACHINE ", 1, b"VMIP", 1)
    data = bytearray(head + body)
    data[9] = -sum(data) & 0xFF
    return bytes(data)


def _fadt(dsdt: int) -> bytes:
    body = struct.pack(
        "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI",
        FACS, dsdt, 0, 0, SCI, SMI_COMMAND, ACPI_ENABLE, ACPI_DISABLE, 0, 0,
        PM_BASE, 0, PM_BASE + 4, 0, 0, PM_BASE + 8, GPE_BASE, 0,
        4, 2, 0, 4, GPE_LENGTH, 0, 0, 0,
        0xFFF, 0xFFF, 0, 0, 0, 0, 0, 0, 0x32, LEGACY_DEVICES | KEYBOARD_CONTROLLER, 0, FADT_FLAGS,
    )  # fmt: skip
    return _table(b"FACP", 1, body)


def _madt() -> bytes:
    """One processor, one I/O APIC with interrupts from 0 on, the two that are not wired as ISA has them, NMI."""
    body = struct.pack("<II", apic.BASE, 1)  # the 8259s are there too
    body += struct.pack("<BBBBI", 0, 8, 0, mptable.PROCESSOR_APIC, mptable.ENABLED)
    body += struct.pack("<BBBBII", 1, 12, mptable.IO_APIC_ID, 0, ioapic.BASE, 0)
    for irq, flags in ((0, mptable.CONFORMING), (SCI, mptable.LEVEL_HIGH)):
        body += struct.pack("<BBBBIH", 2, 10, 0, irq, mptable.input_of(irq), flags)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, mptable.CONFORMING, 1)  # every processor's LINT1
    return _table(b"APIC", 1, body)


def tables() -> bytes:
    """RSDP and tables for offset :data:`TABLES` of the BIOS ROM."""
    base = BIOS + TABLES
    out = bytearray(64)
    dsdt_at = base + len(out)
    out += _table(b"DSDT", 1, _definition_block())
    out += bytes(-len(out) % 16)
    fadt_at = base + len(out)
    out += _fadt(dsdt_at)
    out += bytes(-len(out) % 16)
    madt_at = base + len(out)
    out += _madt()
    out += bytes(-len(out) % 16)
    rsdt_at = base + len(out)
    out += _table(b"RSDT", 1, struct.pack("<II", fadt_at, madt_at))
    rsdp = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"VMIPAT", 0, rsdt_at))
    rsdp[8] = -sum(rsdp) & 0xFF
    out[: len(rsdp)] = rsdp
    return bytes(out)


def facs() -> bytes:
    """The firmware control structure."""
    return struct.pack("<4sI", b"FACS", 64) + bytes(56)
