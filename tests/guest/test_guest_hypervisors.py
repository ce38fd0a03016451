"""Every form on the ROM and personality of every hypervisor, patching itself and patched on disk: the same console."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from guestmachine import ABI, FORMS, HYPERVISORS, Boot, elf, expected, on_rom, patched, rom

DEPRIVILEGED = [name for name in HYPERVISORS if name != "native"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hypervisor", HYPERVISORS)
@pytest.mark.parametrize("on_disk", [False, True], ids=["itself", "on disk"])
def test_console_is_the_native_one(form: str, hypervisor: str, on_disk: bool, tmp_path: Path) -> None:
    boot = on_rom(form, hypervisor, patched(form, hypervisor, tmp_path) if on_disk else None)
    assert boot.run() == "poweroff"
    assert boot.lines == expected(form)
    ring = 0 if hypervisor == "native" else 1
    assert f"VMI ROM at c0000, ring {ring}, features " in boot.backend


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
@pytest.mark.parametrize("append", ["vmi=disable_timer", "vmi=disable_pse vmi=disable_sep vmi=disable_pge"])
def test_options(hypervisor: str, append: str) -> None:
    """The emulated 8254 in the place of the alarm; 4 KiB pages, `int 0x80` alone, no global pages."""
    boot = on_rom("mainline", hypervisor, append=append)
    assert boot.run() == "poweroff"
    assert boot.lines == expected("mainline")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hypervisor", ["native", "vmware", "xen"])
def test_another_hypervisor_below(form: str, hypervisor: str) -> None:
    """VMI_Init refuses what it does not know: the guest goes on natively."""
    other = "kvm" if hypervisor == "vmware" else "vmware"
    boot = Boot(elf(form), hypervisor, rom(other, ABI[form]))
    assert boot.run() == "poweroff"
    assert boot.lines == expected(form)
    assert boot.backend.startswith("native: the ROM did not initialise, ring 0")


def broken(form: str, **words: int) -> bytes:
    """The native ROM with words of its header changed: name of the field in the tables of the interface."""
    offsets = {"signature": 0x00, "magic": 0x08, "major": 0x0C, "license": 0x16, "pci": 0x18}
    data = bytearray(rom("native", ABI[form]))
    for name, value in words.items():
        struct.pack_into("<H", data, offsets[name], value)
    data[0x0E] = (data[0x0E] - sum(data)) & 0xFF  # a byte that no guest reads keeps the image's sum at 0
    return bytes(data)


@pytest.mark.parametrize(
    ("forms", "change", "reason"),
    [
        (FORMS, {"magic": 0x1234}, "native, ring 0"),
        (FORMS, {"pci": 0}, "native: the ROM has no PCI header, ring 0"),
        (FORMS, {"major": 0x0600}, "native: the ROM is of another interface, ring 0"),
        (("mainline", "mainline-pae"), {"license": 0}, "native: the ROM's licence is not the GPL, ring 0"),
        (("rfc-v1", "v2"), {"license": 0}, "vmipatch native VMI ROM at c0000, ring 0"),
    ],
)
def test_roms_that_are_refused(forms: tuple[str, ...], change: dict[str, int], reason: str) -> None:
    for form in forms:
        boot = Boot(elf(form), rom=broken(form, **change))
        assert boot.run() == "poweroff"
        assert boot.lines == expected(form)
        assert boot.backend.startswith(reason)
