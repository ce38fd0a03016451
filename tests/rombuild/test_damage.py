"""Damaged ROMs: each fault is named by its rule, and by no other where nothing else is wrong.

The damage is done by offsets read from the header here, and the checksum is put right afterwards, so that it is
the fault itself that must be seen and not the sum.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import pytest
from romguest import PAIRS, rom

from vmipatch.errors import RomError
from vmipatch.rombuild.check import check
from vmipatch.rombuild.inspect import images, relocations

Damage = Callable[[bytearray], None]


def u16(data: bytes | bytearray, at: int) -> int:
    return int(struct.unpack_from("<H", data, at)[0])


def put(at: int, value: bytes) -> Damage:
    def damage(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return damage


def pci(at: int, value: bytes) -> Damage:
    return lambda data: put(u16(data, 0x18) + at, value)(data)


def pnp(at: int, value: bytes, mend: bool = True) -> Damage:
    def damage(data: bytearray) -> None:
        block = u16(data, 0x1A)
        put(block + at, value)(data)
        if mend:
            size = 16 * data[block + 5] or 32
            data[block + 9] = (data[block + 9] - sum(data[block : block + size])) & 0xFF

    return damage


def table(number: int, offset: int | None = None, kind: int | None = None, pad: bytes = b"") -> Damage:
    def damage(data: bytearray) -> None:
        at = u16(data, 0x28) + 8 * number
        if offset is not None:
            struct.pack_into("<I", data, at, offset)
        if kind is not None:
            data[at + 4] = kind
        put(at + 5, pad)(data)

    return damage


def stub(number: int, value: bytes, at: int = 0) -> Damage:
    """Overwrite a stub's code."""

    def damage(data: bytearray) -> None:
        start = struct.unpack_from("<I", data, u16(data, 0x28) + 8 * number)[0]
        put(start + at, value)(data)

    return damage


def state(entry: int, value: bytes) -> Damage:
    def damage(data: bytearray) -> None:
        at = u16(data, 0x2A)
        for _ in range(entry):
            at += 5 + data[at + 4]
        put(at, value)(data)

    return damage


def license_text(value: bytes) -> Damage:
    return lambda data: put(u16(data, 0x16), value)(data)


def string(pointer: int, value: bytes) -> Damage:
    return lambda data: put(u16(data, u16(data, 0x1A) + pointer), value)(data)


def banner_of(pointer: int, value: bytes) -> Damage:
    return lambda data: put(u16(data, pointer), value)(data)


def jump(displacement: int, short: bool = False) -> bytes:
    return b"\xeb" + struct.pack("<b", displacement) if short else b"\xe9" + struct.pack("<i", displacement)


FAR = 0x10000
# (name, rule, damage), done to the Xen ROM of 3.0: it has everything.
DAMAGE: list[tuple[str, str, Damage]] = [
    ("length 0", "length-zero", put(2, b"\0")),
    ("length one less", "pci-image-length", lambda d: put(2, bytes([d[2] - 1]))(d)),
    ("length one more", "length-past-end", lambda d: put(2, bytes([d[2] + 1]))(d)),
    ("length 255", "length-past-end", put(2, b"\xff")),
    ("entry is nothing", "entry", put(3, b"\0\0\0\0")),
    ("entry jumps to the header", "entry", put(3, b"\xe9\x00\x00")),
    ("entry jumps out", "entry", put(3, b"\xe9\x00\x70")),
    ("entry short jump back", "entry", put(3, b"\xeb\xf0")),
    ("entry is a near return", "entry", put(3, b"\xc3")),
    ("pad0", "reserved", put(7, b"\1")),
    ("VMI signature", "vmi-signature", put(8, b"cVmx")),
    ("VMI signature byte-swapped", "vmi-signature", put(8, b"imVc")),
    ("major 4", "api-version", put(0x0D, b"\x04")),
    ("major 0", "api-version", put(0x0D, b"\0")),
    ("minor 7", "api-version", put(0x0C, b"\x07")),
    ("major of another ABI", "block-abi", put(0x0D, b"\x06")),
    ("jump slots", "reserved", put(0x0E, b"\1")),
    ("reserved1", "reserved", put(0x0F, b"\x80")),
    ("virtual_top not a page", "virtual-top", put(0x10, b"\x01")),
    ("virtual_top in the user's half", "virtual-top", put(0x10, struct.pack("<I", 0x08000000))),
    ("virtual_top differs", "block-virtual-top", put(0x10, struct.pack("<I", 0xFD000000))),
    ("reserved2", "reserved", put(0x14, b"\0\1")),
    ("licence offset 0", "license", put(0x16, b"\0\0")),
    ("licence offset past the end", "license", put(0x16, b"\xff\xff")),
    ("licence is another", "license", license_text(b"BSD")),
    ("licence longer", "license", license_text(b"GPL v3 \0")),
    ("licence lower case", "license", license_text(b"gpl")),
    ("licence not text", "license", license_text(b"\x01\x02\x03")),
    ("PCI offset 0", "pci-missing", put(0x18, b"\0\0")),
    ("PCI offset past the end", "pci-block", put(0x18, b"\xf0\xff")),
    ("PCI offset off by 4", "pci-block", lambda d: put(0x18, struct.pack("<H", u16(d, 0x18) + 4))(d)),
    ("PCI signature", "pci-block", pci(0, b"PCIX")),
    ("PCI length short", "pci-length", pci(0x0A, b"\x10")),
    ("PCI length 0", "pci-length", pci(0x0A, b"\0\0")),
    ("PCI image length 0", "pci-image-length", pci(0x10, b"\0\0")),
    ("PCI image length more", "pci-image-length", pci(0x10, b"\x40\0")),
    ("PCI image length less", "pci-image-length", pci(0x10, b"\x01\0")),
    ("PCI vendor", "pci-identity", pci(4, b"\x86\x80")),
    ("PCI device", "pci-identity", pci(6, b"\x02\x08")),
    ("PCI code type EFI", "pci-code-type", pci(0x14, b"\x03")),
    ("PCI code type Open Firmware", "pci-code-type", pci(0x14, b"\x01")),
    ("PCI not the last image", "pci-last", pci(0x15, b"\0")),
    ("PnP offset past the end", "pnp-block", put(0x1A, b"\xf0\xff")),
    ("PnP offset off by one", "pnp-block", lambda d: put(0x1A, struct.pack("<H", u16(d, 0x1A) + 1))(d)),
    ("PnP signature", "pnp-block", pnp(0, b"$pnp", False)),
    ("PnP revision 0", "pnp-revision", pnp(4, b"\0")),
    ("PnP length 0", "pnp-length", pnp(5, b"\0", False)),
    ("PnP length 16", "pnp-length", pnp(5, b"\x01", False)),
    ("PnP checksum", "pnp-checksum", pnp(9, b"\x5a", False)),
    ("PnP class changed", "pnp-checksum", pnp(0x12, b"\x07", False)),
    ("PnP chain out of the image", "pnp-chain", pnp(6, b"\xf0\xff")),
    ("PnP chain into nothing", "pnp-chain", pnp(6, b"\x40\x00")),
    ("PnP chain in a circle", "pnp-chain", lambda d: pnp(6, struct.pack("<H", u16(d, 0x1A)))(d)),
    ("PnP manufacturer out of the image", "pnp-manufacturer", pnp(0x0E, b"\xff\xff")),
    ("PnP product out of the image", "pnp-product", pnp(0x10, b"\xff\xff")),
    ("PnP manufacturer not text", "pnp-manufacturer", string(0x0E, b"\x80\x81")),
    ("PnP product not text", "pnp-product", string(0x10, b"\x07")),
    ("pad3", "reserved", put(0x1C, b"\0\0\0\1")),
    ("private block gone", "not-ours", put(0x20, b"\0\0\0\0")),
    ("private block version", "block-version", put(0x24, b"\x02")),
    ("private block generation", "block-generation", put(0x25, b"\x0d")),
    ("call count less", "block-count", put(0x26, b"\x49")),
    ("call count more", "block-count", put(0x26, b"\xff\xff")),
    ("call count 0", "block-count", put(0x26, b"\0\0")),
    ("table past the end", "block-table", put(0x28, b"\xf8\xff")),
    ("table not inside to its end", "block-table", lambda d: put(0x28, struct.pack("<H", len(d) - 16))(d)),
    ("table in the header", "block-table", put(0x28, b"\x10\0")),
    ("table unaligned", "block-table", lambda d: put(0x28, struct.pack("<H", u16(d, 0x28) + 1))(d)),
    ("state layout past the end", "block-state", put(0x2A, b"\xff\xff")),
    ("state count more", "block-state", put(0x2C, b"\xff\0")),
    ("hypervisor's name out of the image", "block-hypervisor", put(0x2E, b"\xff\xff")),
    ("hypervisor's name not text", "block-hypervisor", banner_of(0x2E, b"\xff")),
    ("ABI's name out of the image", "block-abi", put(0x30, b"\xff\xff")),
    ("ABI's name another", "block-abi", banner_of(0x30, b"vmi-9.9")),
    ("slot size", "block-slot-size", put(0x32, b"\x20")),
    ("virtual_top of the block", "block-virtual-top", put(0x38, b"\0\0\0\0")),
    ("state field out of its page", "state-field", state(0, struct.pack("<HH", 0xFFF, 4))),
    ("state field without size", "state-field", state(1, struct.pack("<HH", 0x10, 0))),
    ("state fields overlap", "state-overlap", state(4, struct.pack("<HH", 0xE10, 4))),
    ("VMI_Init is no code", "stub-code", put(0x80, b"\x0f\x04")),
    ("VMI_Init jumps out", "stub-jump", put(0x80, jump(FAR))),
    ("VMI_Init jumps into the header", "stub-jump", put(0x80, jump(-0x60))),
    ("GetRelocationInfo is filling", "stub-code", put(0x88, b"\xcc" * 8)),
    ("GetRelocationInfo jumps out", "stub-jump", put(0x88, jump(0x7FFFFF00))),
    ("entry past the end of the table's image", "table-offset", table(28, offset=0xFFFF)),
    ("entry just past the end", "table-offset", lambda d: table(28, offset=len(d))(d)),
    ("entry into the header", "table-offset", table(28, offset=0x40)),
    ("entry 0", "table-offset", table(28, offset=0)),
    ("entry NONE with an offset", "table-offset", table(42, offset=0x400)),
    ("entry of an unknown type", "table-type", table(28, kind=4)),
    ("entry of type 255", "table-type", table(15, kind=255)),
    ("reserved byte of an entry", "table-padding", table(28, pad=b"\1")),
    ("reserved bytes of an entry", "table-padding", table(73, pad=b"\0\0\x80")),
    ("JUMP_REL where none is allowed", "table-kind", table(28, kind=2)),
    ("NOP for a call with a result", "table-kind", table(31, kind=3)),
    ("NOP for an interrupt call", "table-kind", table(29, kind=3)),
    ("IRET is NONE", "table-needed", table(33, offset=0, kind=0)),
    ("SYSEXIT is NONE", "table-needed", table(34, offset=0, kind=0)),
    ("IRET is CALL_REL", "table-needed", table(33, kind=1)),
    ("SYSEXIT is NOP", "table-needed", table(34, kind=3)),
    ("no cycle counter", "table-together", table(67, offset=0, kind=0)),
    ("no alarm", "table-together", table(68, offset=0, kind=0)),
    ("no update of long entries", "table-together", table(41, offset=0, kind=0)),
    ("no wall clock", "table-together", table(70, offset=0, kind=0)),
    ("a stub jumps out of the image", "stub-jump", stub(28, jump(FAR))),
    ("a stub jumps far back", "stub-jump", stub(15, jump(-FAR))),
    ("a stub calls out of the image", "stub-jump", stub(17, b"\xe8" + struct.pack("<i", FAR))),
    ("a stub branches out of the image", "stub-jump", stub(47, b"\x0f\x84" + struct.pack("<i", FAR))),
    ("a stub is no code", "stub-code", stub(28, b"\x0f\x04")),
    ("a stub is filling", "stub-code", stub(28, b"\xcc")),
    ("an entry in the last byte", "stub-code", lambda d: table(28, offset=len(d) - 1)(d)),
]
SLOT_DAMAGE: list[tuple[str, str, Damage]] = [
    ("a slot of another call", "table-slot", table(35, offset=36 * 32)),
    ("a call that is not there", "table-needed", table(35, offset=0, kind=0)),
    ("a header slot is a call", "table-unused", table(2, offset=64 * 2, kind=1)),
    ("JUMP_REL", "table-kind", table(39, kind=2)),
    ("a slot jumps out", "stub-jump", put(35 * 32, jump(FAR))),
    ("a slot is filling", "stub-code", put(35 * 32, b"\xcc" * 32)),
    ("slot size", "block-slot-size", put(0x32, b"\x40")),
    ("private word", "reserved", put(0x14, b"\1")),
    ("virtual_top", "block-virtual-top", put(0x10, struct.pack("<I", 0xFE000000))),
]


def damaged(data: bytes, damage: Damage) -> bytes:
    out = bytearray(data)
    damage(out)
    size = 512 * out[2]
    if 0 < size <= len(out):
        out[size - 1] = (out[size - 1] - sum(out[:size])) & 0xFF
    return bytes(out)


def test_a_hundred() -> None:
    assert len(DAMAGE) + len(SLOT_DAMAGE) >= 100
    assert len({name for name, _, _ in DAMAGE}) == len(DAMAGE)


@pytest.mark.parametrize(("name", "rule", "damage"), DAMAGE, ids=[d[0] for d in DAMAGE])
def test_a_damaged_3_0_rom(name: str, rule: str, damage: Damage) -> None:
    data = damaged(rom("xen", "vmi-3.0").data, damage)
    assert data != rom("xen", "vmi-3.0").data
    rules = [f.rule for f in check(data)]
    assert rule in rules, rules
    assert "checksum" not in rules
    with contextlib.suppress(RomError):
        relocations(data)


@pytest.mark.parametrize(("name", "rule", "damage"), SLOT_DAMAGE, ids=[d[0] for d in SLOT_DAMAGE])
def test_a_damaged_13_0_rom(name: str, rule: str, damage: Damage) -> None:
    data = damaged(rom("xen", "vmi-13.0").data, damage)
    assert rule in [f.rule for f in check(data)]


@pytest.mark.parametrize(("hypervisor", "abi"), PAIRS)
def test_any_changed_byte_is_seen(hypervisor: str, abi: str) -> None:
    """Without the sum put right, no single changed byte goes through."""
    data = rom(hypervisor, abi).data
    for at in range(2, len(data), 67):
        broken = bytearray(data)
        broken[at] ^= 0x40
        assert check(bytes(broken)), hex(at)


@pytest.mark.parametrize("cut", [3, 16, 127, 512, 1000, 3000])
def test_a_file_cut_short(cut: int) -> None:
    findings = check(rom("xen", "vmi-3.0").data[:cut])
    assert [f.rule for f in findings] == ["length-past-end"]


def test_findings_say_where() -> None:
    data = damaged(rom("xen", "vmi-3.0").data, put(0x1C, b"\1"))
    (finding,) = check(data)
    assert (finding.severity, finding.rule, finding.offset) == ("error", "reserved", 0x1C)
    assert "pad3" in finding.message


def test_a_second_image_out_of_step() -> None:
    first = bytearray(rom("l4ka", "vmi-3.0").data)
    first[u16(first, 0x18) + 0x15] = 0
    first[-1] = (first[-1] - sum(first)) & 0xFF
    both = bytes(first) + rom("l4ka", "vmi-13.0").data
    assert len(images(both)) == 2
    if len(first) % 2048:
        assert [f.rule for f in check(both)] == ["image-alignment"]
