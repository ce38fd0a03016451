"""VMI_Init: what the guest finds afterwards is docs/abis.md's promise, whatever the hypervisor."""

from __future__ import annotations

import pytest
from pagedguest import BASE, CODE, DATA, DEPRIVILEGED, GDT, KERNEL_DS, ROM, STACK_TOP, PagedGuest

from vmipatch.emu.hypervisors import create
from vmipatch.emu.machine.machine import Machine

BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)


@ALL
@BOTH
def test_init_returns_at_ring_1(hypervisor: str, pae: bool) -> None:
    guest = PagedGuest(hypervisor, pae=pae)
    cpu = guest.cpu
    kept = {"ebx": 1, "esi": 2, "edi": 3, "ebp": 4}
    for name, value in kept.items():
        cpu.set(name, value)
    assert guest.init() == 0
    assert [cpu.get(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")] == [0x61, 0x69, 0x69, 0x69, 0, 0]
    assert cpu.get("cpl") == 1
    assert {name: cpu.get(name) for name in kept} == kept
    assert cpu.get("esp") == BASE + STACK_TOP
    # Flat segments end one page above virtual_top; the real flag is on, the virtual one as it was.
    assert cpu.get("cs_limit") == cpu.get("ds_limit") == 0xFC000FFF
    assert cpu.eflags & 0x3200 == 0x200
    assert not guest.personality.virtual_if


@ALL
def test_the_virtual_flag_is_what_the_real_one_was(hypervisor: str) -> None:
    guest = PagedGuest(hypervisor)
    guest.cpu.set("eflags", 0x202)
    assert guest.init() == 0
    assert guest.personality.virtual_if
    guest.call("GetInterruptMask")
    assert guest.cpu.get("eax") & 0x200


@ALL
@BOTH
def test_system_registers_are_the_guests_own(hypervisor: str, pae: bool) -> None:
    guest = PagedGuest(hypervisor, pae=pae)
    guest.init()
    for name, value in (("GetCR0", 0x80010011), ("GetCR3", guest.cr3), ("GetCR4", 0x30 if pae else 0x10)):
        guest.call(name)
        assert guest.cpu.get("eax") == value, name
    guest.call("GetTR")
    assert guest.cpu.get("eax") == 0x80
    guest.call("GetLDT")
    assert guest.cpu.get("eax") == 0x88
    guest.call("GetGDT", eax=BASE + DATA)
    assert guest.memory.read(DATA, 6) == (0xFF).to_bytes(2, "little") + (BASE + GDT).to_bytes(4, "little")
    seen = guest.personality.view()
    assert (seen["cr3"], seen["gdtr_base"], seen["stack_esp"]) == (guest.cr3, BASE + GDT, BASE + STACK_TOP)


@ALL
def test_a_second_init_is_done_already(hypervisor: str) -> None:
    guest = PagedGuest(hypervisor)
    guest.init()
    traps = dict(guest.personality.traps)
    assert guest.init() == 0
    assert guest.personality.hypercalls["init"] == 1
    assert dict(guest.personality.traps) == traps


@ALL
def test_another_hypervisors_rom_finds_nobody(hypervisor: str) -> None:
    other = "kvm" if hypervisor != "kvm" else "vmware"
    guest = PagedGuest(hypervisor, attach=False)
    create(other).attach(guest.machine)
    assert guest.init() == 0xFFFFFFFF
    assert guest.cpu.get("cpl") == 0


@ALL
def test_a_bare_machine_has_no_hypervisor(hypervisor: str) -> None:
    guest = PagedGuest(hypervisor, attach=False)
    assert guest.init() == 0xFFFFFFFF
    assert guest.cpu.get("cpl") == 0


@ALL
def test_the_init_port_checks_the_rom(hypervisor: str) -> None:
    guest = PagedGuest(hypervisor)
    for rom in (0, BASE + DATA, 0x10, 0xFFFFF000):
        guest.run("in eax, dx", eax=0x696D5663, edx=0x564D, ebx=rom)
        assert guest.cpu.get("eax") == 1, hex(rom)
        assert guest.cpu.get("cpl") == 0
    # A ROM whose private block names somebody else.
    strange = bytearray(guest.rom.data)
    name = int.from_bytes(strange[0x2E:0x30], "little")
    strange[name] ^= 1
    guest.memory.write(0x80000, bytes(strange))
    guest.run("in eax, dx", eax=0x696D5663, edx=0x564D, ebx=BASE + 0x80000)
    assert guest.cpu.get("eax") == 2
    # Without the signature it is a port where nothing answers, as on any machine.
    guest.run("in eax, dx", eax=7, edx=0x564D)
    assert guest.cpu.get("eax") == 0xFFFFFFFF


@ALL
@BOTH
def test_stubs_act_natively_before_init(hypervisor: str, pae: bool) -> None:
    guest = PagedGuest(hypervisor, pae=pae)
    guest.call("EnableInterrupts")
    assert guest.cpu.eflags & 0x200
    guest.call("DisableInterrupts")
    assert not guest.cpu.eflags & 0x200
    guest.call("SetCR3", eax=guest.cr3)
    assert not guest.personality.calls


@ALL
def test_snapshots_hold_the_hypervisor(hypervisor: str) -> None:
    guest = PagedGuest(hypervisor)
    native = guest.machine.snapshot()
    guest.init()
    lowered = guest.machine.snapshot()
    guest.call("SetCR0", eax=0x80010019)
    guest.call("EnableInterrupts")
    guest.call("WriteGDTEntry", 0x00CF9300, eax=BASE + GDT, edx=6, ecx=0xFFFF)
    view = guest.personality.view()
    assert view["cr0"] == 0x80010019
    guest.machine.restore(lowered)
    assert guest.personality.view()["cr0"] == 0x80010011
    assert not guest.personality.virtual_if
    guest.machine.restore(native)
    assert not guest.personality.active
    assert guest.cpu.get("cpl") == 0
    # Interrupt vectors are the guest's own again: a fault ends in its handler, at ring 0.
    exits = guest.machine.exits["vector"]
    guest.run("ud2", limit=20)
    assert guest.word(STACK_TOP - 16) == 6
    assert guest.machine.exits["vector"] == exits
    guest.machine.restore(native)
    assert guest.init() == 0
    guest.machine.restore(lowered)
    assert guest.call("GetCR3").reason == "breakpoint"
    assert guest.cpu.get("eax") == guest.cr3


def test_the_host_can_switch_at_any_instruction() -> None:
    guest = PagedGuest("vmware")
    guest.run("mov eax, 5; nop")
    assert guest.personality.start(BASE + ROM) == 0
    assert (guest.cpu.get("cpl"), guest.cpu.get("eax")) == (1, 5)
    assert guest.personality.start(BASE + ROM) == 3


def test_native_is_the_bare_machine() -> None:
    guest = PagedGuest("native")
    assert guest.init() == 0
    assert guest.cpu.get("cpl") == 0
    assert guest.personality.view()["cr3"] == guest.cr3
    guest.call("EnableInterrupts")
    assert guest.personality.view()["if"] == 1


def test_machine_owned_memory_is_out_of_the_guests_reach() -> None:
    guest = PagedGuest("vmware")
    guest.init()
    for at in (0xFC001000, 0xFC010000, 0xFFFFFFFC):
        # A read faults like any access past a limit; the handler pushes its number.
        machine: Machine = guest.machine
        before = machine.snapshot()
        guest.run(f"mov eax, dword ptr [{at:#x}]", limit=50)
        assert guest.word(STACK_TOP - 20) == 13
        assert guest.personality.violation is None
        machine.restore(before)
    assert guest.cpu.get("ds") == KERNEL_DS | 1
    assert guest.run("mov eax, dword ptr [0xFC000E10]", at=CODE).reason == "breakpoint"
    assert guest.cpu.get("eax") == 0x80010011
