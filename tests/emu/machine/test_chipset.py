"""PCI configuration, 440FX, PIIX3/4, ROM card, DMA, fw_cfg and VGA against their data sheets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machineparts import Line, PlainMemory, Time

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.dma import Dma
from vmipatch.emu.machine.fw_cfg import FirmwareConfig
from vmipatch.emu.machine.i440fx import HostBridge
from vmipatch.emu.machine.pci import Pci
from vmipatch.emu.machine.piix import IsaBridge, PowerManagement
from vmipatch.emu.machine.romcard import RomCard, identity
from vmipatch.emu.machine.vga import Vga


class Chipset:
    def __init__(self, bus: Bus, memory: PlainMemory, time: Time, sci: Line) -> None:
        self.bus = bus
        self.memory = memory
        self.irqs: dict[int, bool] = {}
        self.resets = 0
        self.offs = 0
        rom = memory.allocate(0x10000)
        memory.store[rom : rom + 0x10000] = b"R" * 0x10000
        self.bridge = HostBridge(memory, 0)
        self.isa = IsaBridge(self.irqs.__setitem__, self.reset)
        self.power = PowerManagement(time.clock, sci, self.off)
        self.pci = Pci()
        self.pci.plug(0, 0, self.bridge)
        self.pci.plug(1, 0, self.isa)
        self.pci.plug(1, 3, self.power)
        for device in (self.pci, self.bridge, self.isa, self.power):
            device.attach(bus)
        self.pci.reset()
        self.bridge.place_rom(0xF0000, 0x10000, rom)

    def reset(self) -> None:
        self.resets += 1

    def off(self) -> None:
        self.offs += 1

    def read(self, slot: int, number: int, offset: int, size: int = 4) -> int:
        self.bus.port_write(0xCF8, 4, 0x80000000 | slot << 11 | number << 8 | offset & 0xFC)
        return self.bus.port_read(0xCFC | offset & 3, size)

    def write(self, slot: int, number: int, offset: int, size: int, value: int) -> None:
        self.bus.port_write(0xCF8, 4, 0x80000000 | slot << 11 | number << 8 | offset & 0xFC)
        self.bus.port_write(0xCFC | offset & 3, size, value)


@pytest.fixture
def chipset(bus: Bus, memory: PlainMemory, time: Time, line: Line) -> Chipset:
    return Chipset(bus, memory, time, line)


def test_configuration_mechanism_1(chipset: Chipset) -> None:
    bus = chipset.bus
    assert chipset.read(0, 0, 0) == 0x12378086
    assert chipset.read(0, 0, 2, 2) == 0x1237
    assert chipset.read(0, 0, 0x0B, 1) == 6
    assert chipset.read(1, 0, 0) == 0x70008086
    assert chipset.read(1, 0, 0x0E, 1) == 0x80
    assert chipset.read(1, 3, 0) == 0x71138086
    assert chipset.read(9, 0, 0) == 0xFFFFFFFF
    bus.port_write(0xCF8, 4, 0)  # not enabled
    assert bus.port_read(0xCFC, 4) == 0xFFFFFFFF
    bus.port_write(0xCF8, 4, 0x80010000)  # bus 1
    assert bus.port_read(0xCFC, 4) == 0xFFFFFFFF
    bus.port_write(0xCF8, 4, 0x80000008)
    bus.port_write(0xCF8, 1, 0x44)  # only doublewords reach the address register
    assert bus.port_read(0xCF8, 4) == 0x80000008
    chipset.write(0, 0, 0, 4, 0)
    assert chipset.read(0, 0, 0) == 0x12378086  # read-only


@pytest.mark.parametrize("segment", [0xC0000, 0xC4000, 0xD8000, 0xE0000, 0xEC000, 0xF0000])
def test_pam_attributes(chipset: Chipset, segment: int) -> None:
    """82441FX, "PAM[6:0]": 00 disabled, 01 read only, 10 write only, 11 read/write."""
    bus, memory = chipset.bus, chipset.memory
    memory.store[segment : segment + 4] = b"DRAM"
    index = (segment - 0xC0000) >> 14
    register, shift = (0x59, 4) if segment == 0xF0000 else (0x5A + index // 2, 4 * (index % 2))
    before = b"RRRR" if segment == 0xF0000 else b"\xff" * 4
    assert memory.read(segment, 4) == before
    chipset.write(0, 0, register, 1, 1 << shift)
    assert memory.read(segment, 4) == b"DRAM"
    assert not memory.pages[segment >> 12][1]
    bus.memory_write(segment, 4, 0)
    assert memory.read(segment, 4) == b"DRAM"
    chipset.write(0, 0, register, 1, 2 << shift)
    assert memory.read(segment, 4) == before
    bus.memory_write(segment, 4, int.from_bytes(b"dram", "little"))
    assert memory.read(segment, 4) == before
    chipset.write(0, 0, register, 1, 3 << shift)
    assert memory.read(segment, 4) == b"dram"
    assert memory.pages[segment >> 12][1]
    neighbour = (segment + 0x4000) if segment != 0xF0000 else 0xEC000
    if neighbour < 0xF0000:
        assert neighbour >> 12 not in memory.pages


def test_pam_follows_a_restored_snapshot(chipset: Chipset) -> None:
    state = chipset.pci.save()
    chipset.write(0, 0, 0x5A, 1, 0x33)
    assert 0xC0 in chipset.memory.pages
    chipset.pci.restore(state)
    assert 0xC0 not in chipset.memory.pages


def test_pirq_routing(chipset: Chipset) -> None:
    chipset.isa.set_pirq(0, True)
    assert chipset.irqs == {}
    chipset.write(1, 0, 0x60, 1, 11)
    chipset.write(1, 0, 0x61, 1, 11)
    chipset.isa.set_pirq(0, True)
    chipset.isa.set_pirq(1, True)
    assert chipset.irqs == {11: True}
    chipset.isa.set_pirq(0, False)
    assert chipset.irqs == {11: True}  # the other one shares the line
    chipset.isa.set_pirq(1, False)
    assert chipset.irqs == {11: False}


def test_reset_control_register(chipset: Chipset) -> None:
    chipset.bus.port_write(0xCF9, 1, 2)
    assert chipset.bus.port_read(0xCF9, 1) == 2
    assert chipset.resets == 0
    chipset.bus.port_write(0xCF9, 1, 6)
    assert chipset.resets == 1


def test_pm_timer_counts_at_its_rate(chipset: Chipset, time: Time) -> None:
    bus = chipset.bus
    assert bus.port_read(0x608, 4) == 0xFFFFFFFF
    chipset.write(1, 3, 0x40, 4, 0x601)
    chipset.write(1, 3, 0x80, 1, 1)
    start = bus.port_read(0x608, 4)
    time.pass_ns(10**9)
    assert bus.port_read(0x608, 4) - start == 3_579_545
    time.pass_ns(10 * 10**9)
    assert bus.port_read(0x608, 4) < 1 << 24
    chipset.write(1, 3, 0x40, 4, 0xB001)
    assert bus.port_read(0x608, 4) == 0xFFFFFFFF
    assert bus.port_read(0xB008, 4) != 0xFFFFFFFF


def test_pm_timer_overflow_raises_sci(chipset: Chipset, time: Time, line: Line) -> None:
    bus = chipset.bus
    chipset.power.enable_at(0x600)
    bus.port_write(0x602, 2, 1)
    bus.port_write(0xB2, 1, 0xF1)
    assert bus.port_read(0x604, 2) & 1
    time.pass_ns(2_343_000_000)  # bit 23 changes after 2.3435 s
    assert not line.level
    time.pass_ns(1_000_000)
    assert line.level
    assert bus.port_read(0x600, 2) & 1
    bus.port_write(0x600, 2, 1)
    assert not line.level
    bus.port_write(0xB2, 1, 0xF0)
    assert not bus.port_read(0x604, 2) & 1


def test_soft_off(chipset: Chipset) -> None:
    chipset.power.enable_at(0x600)
    chipset.bus.port_write(0x604, 2, 1 << 10)
    assert chipset.offs == 0
    chipset.bus.port_write(0x604, 2, 1 << 10 | 0x2000)  # S3: not here
    assert chipset.offs == 0
    assert chipset.bus.port_read(0x600, 2) & 0x8000
    chipset.bus.port_write(0x604, 2, 0x2000)
    assert chipset.offs == 1


def option_rom(vendor: int, device: int) -> bytes:
    rom = bytearray(0x800)
    rom[0:3] = b"\x55\xaa\x04"
    rom[0x18:0x1A] = (0x1C).to_bytes(2, "little")
    rom[0x1C:0x34] = (
        b"PCIR" + vendor.to_bytes(2, "little") + device.to_bytes(2, "little") + bytes(5) + b"\x00\x00\x02" + bytes(8)
    )
    return bytes(rom)


def test_rom_card(chipset: Chipset) -> None:
    assert identity(option_rom(0x8086, 0x100E)) == (0x8086, 0x100E, 0x020000)
    assert identity(b"\x55\xaa") == (0x15AD, 0x0801, 0x050000)
    card = RomCard(chipset.memory, option_rom(0x15AD, 0x0801))
    chipset.pci.plug(3, 0, card)
    assert chipset.read(3, 0, 0) == 0x080115AD
    chipset.write(3, 0, 0x30, 4, 0xFFFFFFFE)
    assert chipset.read(3, 0, 0x30) == 0xFFFFF000  # 4 KiB
    chipset.write(3, 0, 0x30, 4, 0xFE000001)
    assert 0xFE000 not in chipset.memory.pages  # memory decoding is off
    chipset.write(3, 0, 4, 2, 2)
    assert chipset.memory.pages[0xFE000] == (card.backing, False)
    assert chipset.memory.read(0xFE000000, 3) == b"\x55\xaa\x04"
    chipset.write(3, 0, 0x30, 4, 0xFE000000)
    assert 0xFE000 not in chipset.memory.pages


def test_dma_registers(bus: Bus) -> None:
    dma = Dma()
    dma.reset()
    dma.attach(bus)
    for port, value in ((0x0C, 0), (0x04, 0x34), (0x04, 0x12), (0x83, 0xAB)):
        bus.port_write(port, 1, value)
    assert [bus.port_read(0x04, 1), bus.port_read(0x04, 1)] == [0x34, 0x12]
    assert bus.port_read(0x83, 1) == 0xAB
    assert bus.port_read(0x0F, 1) == 0xFF
    bus.port_write(0x0A, 1, 2)
    assert bus.port_read(0x0F, 1) == 0xFB
    bus.port_write(0x0D, 1, 0)
    assert bus.port_read(0x0F, 1) == 0xFF
    bus.port_write(0xD0, 1, 0)
    bus.port_write(0xC4, 1, 0x77)
    bus.port_write(0xD8, 1, 0)
    assert bus.port_read(0xC4, 1) == 0x77
    state = dma.save()
    bus.port_write(0x83, 1, 1)
    dma.restore(state)
    assert bus.port_read(0x83, 1) == 0xAB


def configured(bus: Bus, memory: PlainMemory) -> FirmwareConfig:
    memory.map(0, 0x100000, 0)
    config = FirmwareConfig(memory, 64 << 20)
    config.attach(bus)
    config.add_file("genroms/b.rom", b"bbb")
    config.add_file("etc/a", b"aa")
    return config


def item(bus: Bus, key: int, length: int) -> bytes:
    bus.port_write(0x510, 2, key)
    return bytes(bus.port_read(0x511, 1) for _ in range(length))


def test_fw_cfg_items(bus: Bus, memory: PlainMemory) -> None:
    configured(bus, memory)
    assert item(bus, 0, 6) == b"QEMU\0\0"
    assert item(bus, 3, 8) == (64 << 20).to_bytes(8, "little")
    assert item(bus, 0x3FFF, 4) == bytes(4)
    directory = item(bus, 0x19, 4 + 192)
    assert directory[:4] == b"\0\0\0\3"
    assert directory[4:12] == b"\0\0\0\2\0\x20\0\0"
    assert directory[12:68].rstrip(b"\0") == b"etc/a"
    assert directory[140:196].rstrip(b"\0") == b"genroms/b.rom"
    assert item(bus, 0x22, 3) == b"bbb"
    assert item(bus, 0x21, 20) == bytes(8) + (64 << 20).to_bytes(8, "little") + b"\1\0\0\0"


def test_fw_cfg_dma(bus: Bus, memory: PlainMemory) -> None:
    configured(bus, memory)
    assert bus.port_read(0x514, 4).to_bytes(4, "little") + bus.port_read(0x518, 4).to_bytes(4, "little") == b"QEMU CFG"
    request = (0x220000 | 8 | 2).to_bytes(4, "big") + (3).to_bytes(4, "big") + (0x2000).to_bytes(8, "big")
    memory.write(0x1000, request)
    bus.port_write(0x514, 4, 0)
    bus.port_write(0x518, 4, int.from_bytes((0x1000).to_bytes(4, "big"), "little"))
    assert memory.read(0x2000, 4) == b"bbb\0"
    assert memory.read(0x1000, 4) == bytes(4)
    memory.write(0x1000, (16).to_bytes(4, "big") + request[4:])
    bus.port_write(0x518, 4, int.from_bytes((0x1000).to_bytes(4, "big"), "little"))
    assert memory.read(0x1000, 4) == b"\0\0\0\1"  # writing is not offered: the error bit


@given(st.binary(min_size=16, max_size=16))
def test_any_dma_request_is_bounded(request: bytes) -> None:
    bus, memory = Bus(), PlainMemory(0x10000)
    memory.map(0, 0x10000, 0)
    config = FirmwareConfig(memory, 64 << 20)
    config.attach(bus)
    # Lengths in the megabytes are allowed; keep the test quick.
    data = bytearray(request)
    data[4:6] = b"\0\0" if data[4] < 128 else data[4:6]
    memory.write(0x1000, bytes(data))
    bus.port_write(0x518, 4, int.from_bytes((0x1000).to_bytes(4, "big"), "little"))


def test_vga_text(bus: Bus, memory: PlainMemory, time: Time) -> None:
    vga = Vga(time.clock, memory)
    vga.attach(bus)
    assert vga.size() == (80, 25)
    assert vga.text() == [""] * 25
    memory.write(0xB8000, b"H\x07i\x07")
    memory.write(0xB8000 + 24 * 160, b"\xdb\x07")
    assert vga.text()[0] == "Hi"
    assert vga.text()[24] == "█"
    for index, value in ((0x0C, 0), (0x0D, 80)):
        bus.port_write(0x3D4, 1, index)
        bus.port_write(0x3D5, 1, value)
    assert vga.text()[23] == "█"
    vga.reset()
    vga.scroll()
    assert vga.text()[23] == "█"
    vga.put(0, 1, ord("x"))
    assert vga.text()[0] == " x"


def test_vga_crtc_protection_and_attribute_flip_flop(bus: Bus, memory: PlainMemory, time: Time) -> None:
    vga = Vga(time.clock, memory)
    vga.attach(bus)
    bus.port_write(0x3D4, 2, 0x8000 | 0x11)
    bus.port_write(0x3D4, 2, 0x2700 | 1)
    assert vga.size() == (80, 25)
    bus.port_write(0x3D4, 2, 0x0000 | 0x11)
    bus.port_write(0x3D4, 2, 0x2700 | 1)
    assert vga.size() == (40, 25)
    bus.port_read(0x3DA, 1)
    bus.port_write(0x3C0, 1, 0x10)
    bus.port_write(0x3C0, 1, 0x55)
    assert bus.port_read(0x3C1, 1) == 0x55
    bus.port_write(0x3C8, 1, 2)
    for value in (1, 2, 3):
        bus.port_write(0x3C9, 1, value)
    bus.port_write(0x3C7, 1, 2)
    assert [bus.port_read(0x3C9, 1) for _ in range(3)] == [1, 2, 3]


def test_vga_font_plane(bus: Bus, memory: PlainMemory, time: Time) -> None:
    vga = Vga(time.clock, memory)
    vga.attach(bus)
    bus.port_write(0x3C4, 2, 0x0402)
    bus.memory_write(0xA0010, 2, 0x1234)
    bus.port_write(0x3CE, 2, 0x0204)
    assert bus.memory_read(0xA0010, 2) == 0x1234
    bus.port_write(0x3CE, 2, 0x0004)
    assert bus.memory_read(0xA0010, 2) == 0


@given(
    st.lists(
        st.tuples(st.sampled_from([0xCF8, 0xCFC, 0xCFD, 0xCF9, 0xB2, 0x3C0, 0x3D4, 0x3D5, 0x600, 0x604]),
                  st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)),
        max_size=60,
    )
)  # fmt: skip
def test_any_sequence_is_harmless(steps: list[tuple[int, int, int]]) -> None:
    bus, memory, time = Bus(), PlainMemory(), Time()
    chipset = Chipset(bus, memory, time, Line())
    Vga(time.clock, memory).attach(bus)
    chipset.power.enable_at(0x600)
    for port, size, value in steps:
        if port == 0xCF8:
            value = 0x80000000 | value & 0x1BFC
        bus.port_write(port, size, value & (1 << 8 * size) - 1)
        assert 0 <= bus.port_read(port, size) < 1 << 8 * size
    state = chipset.pci.save()
    chipset.pci.restore(state)
    assert chipset.pci.save() == state


def test_set_attributes_changes_only_the_segments_meant(chipset: Chipset) -> None:
    bridge = chipset.bridge
    bridge.set_attributes(0xC8000, 0xD0000, 3)
    shown = {start: bridge.attributes(start) for start in range(0xC0000, 0x100000, 0x4000)}
    assert {start for start, value in shown.items() if value} == {0xC8000, 0xCC000}
    bridge.set_attributes(0xC8000, 0xCC000, 1)
    assert (bridge.attributes(0xC8000), bridge.attributes(0xCC000)) == (1, 3)
    bridge.set_attributes(0xC8000, 0xD0000, 0)
    assert not any(bridge.config[0x59:0x60])


def test_a_rom_behind_the_bridge_is_never_writable(chipset: Chipset) -> None:
    assert not chipset.memory.pages[0xF0][1]


def test_gpe_block_drives_sci(chipset: Chipset, line: Line) -> None:
    bus = chipset.bus
    bus.port_write(0xAFE2, 1, 0x81)
    bus.port_write(0xAFE3, 1, 0x42)
    assert bus.port_read(0xAFE2, 2) == 0x4281
    bus.port_write(0xAFE2, 1, 0x01)
    assert bus.port_read(0xAFE2, 2) == 0x4201
    bus.port_write(0xB2, 1, 0xF1)
    chipset.power.gpe_status = 0x0300
    bus.port_write(0xAFE3, 1, 0x01)
    assert line.level
    bus.port_write(0xAFE1, 1, 0x01)
    assert chipset.power.gpe_status == 0x0200
    assert not line.level


def test_enabling_the_pm_block_shows_in_its_registers(chipset: Chipset) -> None:
    chipset.power.enable_at(0x600)
    assert chipset.read(1, 3, 0x40) == 0x601
    assert chipset.read(1, 3, 0x80, 1) == 1


def dma(bus: Bus, memory: PlainMemory, control: int, length: int, address: int) -> int:
    """One request; the control word afterwards."""
    memory.write(0x1000, control.to_bytes(4, "big") + length.to_bytes(4, "big") + address.to_bytes(8, "big"))
    bus.port_write(0x518, 4, int.from_bytes((0x1000).to_bytes(4, "big"), "little"))
    return int.from_bytes(memory.read(0x1000, 4), "big")


def test_fw_cfg_dma_goes_on_skips_and_refuses(bus: Bus, memory: PlainMemory) -> None:
    configured(bus, memory)
    assert dma(bus, memory, 8 | 2, 2, 0x2000) == 0  # selects key 0
    assert dma(bus, memory, 2, 2, 0x2002) == 0
    assert memory.read(0x2000, 4) == b"QEMU"
    assert dma(bus, memory, 8 | 4, 2, 0) == 0
    assert dma(bus, memory, 2, 1, 0x2000) == 0
    assert memory.read(0x2000, 1) == b"M"
    assert dma(bus, memory, 2, (1 << 24) + 1, 0x2000) == 1
    assert dma(bus, memory, 2, 2, 0xFFFFFFFF) == 1
    assert dma(bus, memory, 2, 1, 0xFFFFFFFF) == 0
    assert dma(bus, memory, 0, 1, 0x2000) == 0
    assert memory.read(0x2000, 1) == b"M"


def test_vga_attribute_index(bus: Bus, memory: PlainMemory, time: Time) -> None:
    Vga(time.clock, memory).attach(bus)
    bus.port_read(0x3DA, 1)
    bus.port_write(0x3C0, 1, 0xC5)
    assert bus.port_read(0x3C0, 1) == 0x05
