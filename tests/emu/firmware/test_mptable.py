"""MP table and MADT of the host-side BIOS, read as Linux reads them, and held against the board's wires."""

from __future__ import annotations

import struct

from guests import code, multiboot
from test_boots import machine_with

from vmipatch.emu.machine.machine import Machine

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}  # MPS 1.4, table 4-3
IO_APIC = 0xFEC00000


def entries(machine: Machine) -> list[bytes]:
    """Linux 2.6.22, arch/i386/kernel/mpparse.c: smp_scan_config and smp_read_mpc, every check that they make."""
    low = machine.memory.read(0xF0000, 0x10000)
    at = next(n for n in range(0, len(low), 16) if low[n : n + 4] == b"_MP_")
    pointer, length, revision, _, kind = struct.unpack_from("<IBBBB", low, at + 4)
    assert (length, sum(low[at : at + 16]) & 0xFF, revision, kind) == (1, 0, 4, 0)
    assert low[at + 12] & 0x80 == 0, "no IMCR: virtual wire mode"
    signature, size, spec = struct.unpack("<4sHB", machine.memory.read(pointer, 7))
    table = machine.memory.read(pointer, size)
    assert (signature, spec, sum(table) & 0xFF) == (b"PCMP", 4, 0)
    count, local = struct.unpack_from("<HI", table, 34)
    assert local == 0xFEE00000
    found, at = [], 44
    while at < size:
        found.append(table[at : at + SIZES[table[at]]])
        at += SIZES[table[at]]
    assert (len(found), at) == (count, size)
    return found


def test_one_processor_and_one_io_apic() -> None:
    machine = machine_with(multiboot(code("mov eax, 1; cpuid; hlt")))
    found = entries(machine)
    processors = [e for e in found if e[0] == 0]
    assert len(processors) == 1
    _, ident, version, flags, signature, features = struct.unpack_from("<BBBBII", processors[0])
    # apic_id_registered: the number in the table is the one in the register; APIC_INTEGRATED: 0x10 or more.
    assert ident == machine.bus.memory_read(0xFEE00020, 4) >> 24
    assert version == machine.bus.memory_read(0xFEE00030, 4) & 0xFF >= 0x10
    assert flags == 3
    machine.run(limit=100)
    assert (signature, features) == (machine.cpu.get("eax"), machine.cpu.get("edx"))
    assert [e[2:] for e in found if e[0] == 1] == [b"PCI   ", b"ISA   "]
    assert [struct.unpack_from("<BBI", e, 2)[1:] for e in found if e[0] == 2] == [(1, IO_APIC)]


def test_every_isa_interrupt_is_at_the_input_that_the_table_names() -> None:
    """Each input of the I/O APIC is given a vector, then each line of the board rises."""
    machine = machine_with(multiboot(code("hlt")))
    machine.bus.memory_write(0xFEE000F0, 4, 0x1FF)
    for pin in range(24):
        for register, value in ((0x11 + 2 * pin, 0), (0x10 + 2 * pin, 0x40 + pin)):
            machine.bus.memory_write(IO_APIC, 4, register)
            machine.bus.memory_write(IO_APIC + 0x10, 4, value)
    sources = {e[5]: e for e in entries(machine) if e[0] == 3 and e[1] == 0}
    assert sorted(sources) == [irq for irq in range(16) if irq != 2]
    for irq, entry in sources.items():
        machine.board.set_irq(irq, False)
        machine.board.set_irq(irq, True)
        assert machine.board.apic.irr == 1 << 0x40 + entry[7], irq
        machine.board.apic.irr = 0
    assert (sources[0][7], sources[9][2]) == (2, 0b1101), "IRQ 0 by way of 2; ACPI's is level-triggered"


def test_the_8259s_reach_the_processor_through_the_local_apic() -> None:
    """MPS 1.4, 3.6.2.2: a system that knows of no APIC gets its interrupts as before."""
    machine = machine_with(multiboot(code("hlt")))
    local = [e for e in entries(machine) if e[0] == 4]
    assert [(e[1], e[7]) for e in local] == [(3, 0), (1, 1)], "ExtINT at LINT0, NMI at LINT1"
    read = machine.bus.memory_read
    assert [read(0xFEE00000 + r, 4) & 0x1_0700 for r in (0x350, 0x360)] == [0x700, 0x400]
    assert read(0xFEE000F0, 4) & 0x100
    machine.bus.port_write(0x21, 1, 0xFE)
    machine.board.set_irq(0, False)
    machine.board.set_irq(0, True)
    assert machine.board.interrupt_level()


def test_the_madt_says_the_same() -> None:
    """ACPI 2.0, 5.2.10.4; Linux 2.6.22, arch/i386/kernel/acpi/boot.c: one local APIC, one I/O APIC with all ISA
    interrupts from 0 on, overrides where the wires are others than ISA's."""
    machine = machine_with(multiboot(code("hlt")))
    low = machine.memory.read(0xF0000, 0x10000)
    root = next(n for n in range(0, len(low), 16) if low[n : n + 8] == b"RSD PTR ")
    (rsdt,) = struct.unpack_from("<I", low, root + 16)
    (size,) = struct.unpack("<I", machine.memory.read(rsdt + 4, 4))
    tables = struct.unpack(f"<{(size - 36) // 4}I", machine.memory.read(rsdt + 36, size - 36))
    at = next(table for table in tables if machine.memory.read(table, 4) == b"APIC")
    (size,) = struct.unpack("<I", machine.memory.read(at + 4, 4))
    madt = machine.memory.read(at, size)
    assert sum(madt) & 0xFF == 0
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    found, place = [], 44
    while place < size:
        found.append(madt[place : place + madt[place + 1]])
        place += madt[place + 1]
    mp = entries(machine)
    assert [(e[3], e[4]) for e in found if e[0] == 0] == [(e[1], 1) for e in mp if e[0] == 0]
    assert [(e[2], *struct.unpack_from("<II", e, 4)) for e in found if e[0] == 1] == [(1, IO_APIC, 0)]
    overrides = {e[3]: struct.unpack_from("<IH", e, 4) for e in found if e[0] == 2}
    for entry in mp:
        if entry[:2] == b"\x03\0":
            irq, pin, flags = entry[5], entry[7], entry[2]
            assert overrides.get(irq, (irq, 0)) == (pin, flags), irq
    assert [e[2:] for e in found if e[0] == 4] == [b"\xff\0\0\x01"]
