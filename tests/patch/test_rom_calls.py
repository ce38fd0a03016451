"""Kernels patched to call straight into ROMs; every displacement is worked out again here."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.elfwriter import ElfWriter
from vmipatch.annotate import scan
from vmipatch.errors import PatchError, RomError
from vmipatch.image import open_image
from vmipatch.patch import OnRom, apply, plan, restore
from vmipatch.patch.target import rom_at
from vmipatch.rombuild.build import build

TEXT, TRANSLATION, PHYSICAL = 0xC0100000, 0xC0180000, 0xC0000
HYPERVISORS = ("native", "vmware", "xen", "kvm", "lguest", "l4ka")

# Call numbers of the March 2006 list and of the 3.0 list (the RFC's patch 3; mach-vmi headers of mid-2006).
NUMBERS = {
    13: {"EnableInterrupts": 35, "DisableInterrupts": 36, "IRET": 39, "WriteGDTEntry": 16, "UpdateKernelStack": 19},
    3: {"EnableInterrupts": 29, "DisableInterrupts": 30, "IRET": 33, "WriteGDTEntry": 11, "UpdateKernelStack": 14},
}
# Op, native code, translation around its call: before, after.
SHAPES = [
    ("EnableInterrupts", b"\xfb", b"", b""),
    ("DisableInterrupts", b"\xfa", b"", b""),
    ("WriteGDTEntry", b"\x89\x0c\xd0\x89\x74\xd0\x04", b"\x56", b"\x8d\x64\x24\x04"),
    ("UpdateKernelStack", b"", b"", b""),
    ("IRET", b"\xcf", b"", b""),
]


def annotated(version: str) -> bytes:
    """A kernel with one site of each shape, annotated as v1, v1b or v2."""
    numbers = NUMBERS[3 if version == "v2" else 13]
    text, translations, entries = b"", b"", b""
    for op, native, before, after in SHAPES:
        number = numbers[op]
        shown = 0 if version == "v2" else number
        body = before + b"\xe8" + struct.pack("<I", shown) + after
        pad = len(body) - len(native)
        site = TEXT + len(text)
        call_offset = 0 if version == "v1" else len(before)
        entries += struct.pack(
            "<IIIBBbB", number, site, TRANSLATION + len(translations), len(body), len(body), pad, call_offset
        )
        text += native + b"\x66" * (pad - 1) + b"\x90" if pad else native
        translations += body
    elf = ElfWriter(bits=32)
    elf.section(".text", text, address=TEXT, flags="ax")
    elf.section(".vmi.translation", translations, address=TRANSLATION, flags="ax")
    elf.section(".vmi.annotation", entries, address=TRANSLATION + 0x1000, flags="a")
    return elf.build()


def rom_file(folder: Path, hypervisor: str, abi: str) -> Path:
    path = folder / f"{hypervisor}-{abi}.rom"
    path.write_bytes(build(hypervisor, abi).data)
    return path


def table_of(rom: bytes) -> dict[int, tuple[int, int]]:
    """Call number to (type, offset), from the bytes of the ROM's own relocation table (docs/abis.md)."""
    from vmipatch.rombuild.inspect import images

    (image,) = images(rom)
    assert image.vmi
    assert image.vmi.block
    at = image.vmi.block.table
    count = 74 if image.vmi.block.generation == 3 else 85
    rows = [struct.unpack_from("<IB", rom, at + 8 * number) for number in range(count)]
    return {number: (kind, offset) for number, (offset, kind) in enumerate(rows)}


def branch_target(memory: bytes, at: int, address: int) -> int:
    distance: int = struct.unpack_from("<i", memory, at + 1)[0]
    return (address + at + 5 + distance) & 0xFFFFFFFF


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
@pytest.mark.parametrize("version", ["v1", "v1b"])
def test_rfc_sites_call_their_slots(tmp_path: Path, hypervisor: str, version: str) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(annotated(version))
    image = open_image(source)
    found = scan(image)
    assert [s.op for s in found.sites] == [shape[0] for shape in SHAPES]
    rom = rom_at(image, found, rom_file(tmp_path, hypervisor, "vmi-13.0"), PHYSICAL)
    out = tmp_path / "patched"
    apply(image, plan(image, found, OnRom(rom)), out)
    patched = open_image(out)
    for (op, _, before, after), site in zip(SHAPES, found.sites, strict=True):
        code = patched.read(site.address, site.length)
        used = len(before) + 5 + len(after)
        assert code[: len(before)] == before
        assert code[len(before)] == 0xE8
        assert branch_target(code, len(before), site.address) == 0xC00C0000 + 32 * NUMBERS[13][op]
        assert code[len(before) + 5 : used] == after
        assert set(code[used:]) <= {0x66, 0x90}
    restore(out)
    assert out.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_v2_sites_follow_the_relocation_type(tmp_path: Path, hypervisor: str) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(annotated("v2"))
    image = open_image(source)
    found = scan(image)
    path = rom_file(tmp_path, hypervisor, "vmi-3.0")
    rom = rom_at(image, found, path, 0xC8000)
    out = tmp_path / "patched"
    apply(image, plan(image, found, OnRom(rom)), out)
    patched = open_image(out)
    answers = table_of(path.read_bytes())
    seen = set()
    for (op, _, before, _), site in zip(SHAPES, found.sites, strict=True):
        code = patched.read(site.address, site.length)
        kind, offset = answers[NUMBERS[3][op]]
        seen.add(kind)
        if kind == 0:
            assert code == image.read(site.address, site.length)
        elif kind == 3:
            assert code == b"\x66" * (site.length - 1) + b"\x90"
        else:
            assert code[len(before)] == {1: 0xE8, 2: 0xE9}[kind]
            assert branch_target(code, len(before), site.address) == 0xC00C8000 + offset
    assert {1, 2} <= seen
    restore(out)
    assert out.read_bytes() == source.read_bytes()


def test_a_rom_of_the_other_interface_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(annotated("v1"))
    image = open_image(source)
    found = scan(image)
    path = rom_file(tmp_path, "native", "vmi-3.0")
    with pytest.raises(RomError, match="generation 13"):
        rom_at(image, found, path, PHYSICAL)


def test_a_rom_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(annotated("v1"))
    image = open_image(source)
    path = rom_file(tmp_path, "native", "vmi-13.0")
    foreign = bytearray(path.read_bytes())
    foreign[0x20:0x80] = bytes(0x60)
    path.write_bytes(foreign)
    found = scan(image)
    with pytest.raises(RomError, match="not ours"):
        rom_at(image, found, path, PHYSICAL)


@pytest.mark.parametrize("base", [0xC0100, 0xBF800, 0xE0000, 0xDF800])
def test_a_base_where_no_guest_finds_it_is_refused(tmp_path: Path, base: int) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(annotated("v1"))
    image = open_image(source)
    found = scan(image)
    path = rom_file(tmp_path, "native", "vmi-13.0")
    assert path.stat().st_size > 0x800
    with pytest.raises(RomError, match=r"base|outside"):
        rom_at(image, found, path, base)


PV_IRQ, PV_CPU, PV_MMU = 0xC0200100, 0xC0200200, 0xC0200300
# Linux 2.6.32 (asm/paravirt_types.h): pv_cpu_ops begins at word 4+... of the patch template with clts at type 5 and has
# irq_enable_sysexit at type 36 and iret at 39; pv_irq_ops begins with save_fl at 43; read_cr2, write_cr2, read_cr3 and
# write_cr3 are types 50 to 53, the first words of pv_mmu_ops.
FIRST_CPU_TYPE = 3
MAINLINE = [
    ("irq_disable", b"\xff\x15", PV_IRQ + 8, 45, "DisableInterrupts"),
    ("irq_enable", b"\xff\x15", PV_IRQ + 12, 46, "EnableInterrupts"),
    ("restore_fl", b"\xff\x15", PV_IRQ + 4, 44, "SetInterruptMask"),
    ("save_fl", b"\xff\x15", PV_IRQ, 43, "GetInterruptMask"),
    ("iret", b"\x2e\xff\x25", PV_CPU + 4 * (39 - FIRST_CPU_TYPE), 39, "IRET"),
    ("irq_enable_sysexit", b"\x2e\xff\x25", PV_CPU + 4 * (36 - FIRST_CPU_TYPE), 36, "SYSEXIT"),
    ("write_cr3", b"\xff\x15", PV_MMU + 12, 53, None),
]
NUMBER_3 = {
    "EnableInterrupts": 29, "DisableInterrupts": 30, "GetInterruptMask": 31, "SetInterruptMask": 32,
    "IRET": 33, "SYSEXIT": 34,
}  # fmt: skip


def mainline(release: bytes = b"2.6.32.9") -> bytes:
    """A Linux with one site of each patchable op and one of another."""
    text, entries = b"", b""
    for _, opcode, slot, kind, _ in MAINLINE:
        site = opcode + struct.pack("<I", slot)
        entries += struct.pack("<IBBH", TEXT + len(text), kind, len(site), 7)
        text += site
    banner = b"Linux version " + release + b" (root@build) (gcc version 4.4.3) #1 SMP Fri Mar 19 2010\n\0"
    elf = ElfWriter(bits=32)
    elf.section(".text", text, address=TEXT, flags="ax")
    elf.section(".rodata", banner, address=TEXT + 0x1000, flags="a")
    elf.section(".data", bytes(0x400), address=0xC0200000, flags="aw")
    elf.section(".parainstructions", entries, address=0xC0300000, flags="a")
    for name, address in (("pv_irq_ops", PV_IRQ), ("pv_cpu_ops", PV_CPU), ("pv_mmu_ops", PV_MMU)):
        elf.symbol(name, address, ".data", size=0x80, type="object")
    return elf.build()


@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_mainline_patches_six_ops_and_leaves_the_rest(tmp_path: Path, hypervisor: str) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(mainline())
    image = open_image(source)
    found = scan(image)
    assert [s.op.rpartition(".")[2] for s in found.sites] == [row[0] for row in MAINLINE]
    path = rom_file(tmp_path, hypervisor, "vmi-3.0")
    out = tmp_path / "patched"
    apply(image, plan(image, found, OnRom(rom_at(image, found, path, PHYSICAL))), out)
    patched = open_image(out)
    answers = table_of(path.read_bytes())
    for site, (_, _, _, _, call) in zip(found.sites, MAINLINE, strict=True):
        code, before = patched.read(site.address, site.length), image.read(site.address, site.length)
        kind, offset = answers[NUMBER_3[call]] if call else (0, 0)
        if kind == 0:
            assert code == before
            continue
        if call in ("IRET", "SYSEXIT"):
            assert kind == 2
        assert code[0] == {1: 0xE8, 2: 0xE9}[kind]
        assert branch_target(code, 0, site.address) == 0xC00C0000 + offset
        # Generic padding of 2.6.32: 1 byte 90, 2 bytes 89 F6.
        assert code[5:] == {1: b"\x90", 2: b"\x89\xf6"}[site.length - 5]
    restore(out)
    assert out.read_bytes() == source.read_bytes()


def test_a_modern_kernel_has_no_vmi_back_end(tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(mainline(b"2.6.39.4"))
    image = open_image(source)
    found = scan(image)
    rom = rom_at(image, found, rom_file(tmp_path, "native", "vmi-3.0"), PHYSICAL)
    with pytest.raises(PatchError, match="no VMI back end"):
        plan(image, found, OnRom(rom))
