"""The guest patches itself as `vmipatch patch` does it on disk, and calls the ROM before VMI_Init when it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from guestmachine import (
    ABI,
    DONE,
    FORMS,
    HYPERVISORS,
    PAGE_OFFSET,
    ROM_PLACE,
    Boot,
    elf,
    expected,
    on_rom,
    patched,
    rom,
)

import vmipatch
from vmipatch.patch.cpu import from_spec
from vmipatch.patch.target import Native, OnRom, rom_at
from vmipatch.rombuild.inspect import relocations

NUMBERS = {"vmi-13.0": {"Init": 4, "GetInterruptMask": 37, "IRET": 39}, "vmi-3.0": {"GetInterruptMask": 31, "IRET": 33}}


def text(file: Path) -> tuple[int, bytes]:
    """Address and bytes of .text as the file has them."""
    image = vmipatch.open_image(file)
    (section,) = (s for s in image.sections if s.name == ".text")
    return section.address, image.read(section.address, section.size)


def running_text(boot: Boot) -> bytes:
    """The same in the machine's memory."""
    address, data = text(boot.image)
    return boot.machine.memory.read(address - PAGE_OFFSET, len(data))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_self_patched_equals_patched_on_disk(form: str, hypervisor: str, tmp_path: Path) -> None:
    boot = on_rom(form, hypervisor)
    assert boot.run(until="descriptor tables: ok") == "until"
    on_disk = text(patched(form, hypervisor, tmp_path))[1]
    assert on_disk != text(elf(form))[1]
    assert running_text(boot) == on_disk


@pytest.mark.parametrize("form", ["mainline", "mainline-pae"])
@pytest.mark.parametrize("hypervisor", HYPERVISORS)
def test_a_sealed_kernel_runs_on_its_rom(form: str, hypervisor: str, tmp_path: Path) -> None:
    """A kernel on a ROM walks its table twice; sealed, it finds nothing in it either time."""
    file = tmp_path / "rom"
    file.write_bytes(rom(hypervisor, ABI[form]))
    image = vmipatch.open_image(elf(form))
    found = vmipatch.scan(image)
    target = OnRom(rom_at(image, found, file, ROM_PLACE))
    planned = vmipatch.plan(image, found, target, seal=True)
    vmipatch.apply(image, planned, tmp_path / "sealed.elf")
    boot = on_rom(form, hypervisor, tmp_path / "sealed.elf")
    assert boot.run(until=DONE) == "until"
    assert boot.lines == expected(form)
    (table,) = (t for t in vmipatch.scan(vmipatch.open_image(tmp_path / "sealed.elf")).tables if t.sealed)
    assert table.section == ".parainstructions"


@pytest.mark.parametrize("form", ["mainline", "mainline-pae"])
def test_native_patching_equals_patched_on_disk(form: str, tmp_path: Path) -> None:
    image = vmipatch.open_image(elf(form))
    planned = vmipatch.plan(image, vmipatch.scan(image), Native(from_spec("pentium3", image.version), 1))
    vmipatch.apply(image, planned, tmp_path / "native.elf")
    boot = Boot(elf(form))
    assert boot.run(until="descriptor tables: ok") == "until"
    assert running_text(boot) == text(tmp_path / "native.elf")[1]
    boot = Boot(tmp_path / "native.elf")
    assert boot.run() == "poweroff"
    assert boot.lines == expected(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hypervisor", ["native", "xen", "vmware"])
@pytest.mark.parametrize("call", ["GetInterruptMask", "IRET"])
def test_patched_on_disk_calls_the_rom_before_init(form: str, hypervisor: str, call: str, tmp_path: Path) -> None:
    """At CPL 0, before the ROM's VMI_Init: an interrupt-mask call, and the IRET of a fault's handler."""
    abi = ABI[form]
    data = rom(hypervisor, abi)
    boot = on_rom(form, hypervisor, patched(form, hypervisor, tmp_path))
    linear = PAGE_OFFSET + ROM_PLACE
    stub = linear + relocations(data).of(NUMBERS[abi][call]).offset
    boot.machine.cpu.add_breakpoint(stub)
    boot.machine.cpu.add_breakpoint(linear + 0x80)
    assert boot.run() == "breakpoint"
    assert boot.machine.cpu.linear_eip == stub
    assert boot.machine.cpu.get("cs") & 3 == 0
    boot.machine.cpu.remove_breakpoint(stub)
    assert boot.run() == "breakpoint"
    assert boot.machine.cpu.linear_eip == linear + 0x80
    assert boot.lines == expected(form)[:3]
    boot.machine.cpu.remove_breakpoint(linear + 0x80)
    assert boot.run(until=DONE) == "until"


@pytest.mark.parametrize("form", FORMS)
def test_unpatched_natively_calls_no_rom(form: str) -> None:
    """Without a ROM no byte of an annotated form changes."""
    boot = Boot(elf(form))
    boot.run(until="descriptor tables: ok")
    assert (running_text(boot) == text(elf(form))[1]) is (form in ("rfc-v1", "v2"))
