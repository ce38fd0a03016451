"""Calls behind the gate, and privileged instructions outside the interface: the guest sees what it asked for."""

from __future__ import annotations

import struct

import pytest
from pagedguest import BASE, DATA, DEPRIVILEGED, GDT, IDT, LDT, STACK_TOP, TSS, PagedGuest, gate, segment

from vmipatch.emu.hypervisors.calls import CALLS
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild import hypervisor as hypervisors

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
THROUGH_THE_GATE = ("vmware", "kvm", "l4ka")
UNPUBLISHED = {"MachineToPhysical", "PhysicalToMachine", "SetCallbacks", "Init", "GetRelocationInfo"}


def started(hypervisor: str, abi: str = "vmi-3.0", *, interrupts: bool = False) -> PagedGuest:
    guest = PagedGuest(hypervisor, abi)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    assert guest.init() == 0
    return guest


@pytest.mark.parametrize("abi", abis.names())
@pytest.mark.parametrize("hypervisor", ["vmware", "xen", "kvm", "lguest", "l4ka"])
def test_every_call_that_goes_through_the_gate_is_performed(hypervisor: str, abi: str) -> None:
    spec, interface = hypervisors.load(hypervisor), abis.load(abi)
    if spec.supports(interface) is not None:
        assert hypervisor != "l4ka"
        return
    for call in interface.calls.values():
        entry = spec.entry(interface, call.name)
        text = spec.default if entry is None else entry.text
        if text.strip() == "gate" or "{fallback}" in text:
            assert call.name in CALLS or call.name in UNPUBLISHED, call.name


@ALL
def test_control_registers(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.call("SetCR0", eax=0x8001001B)
    guest.call("GetCR0")
    assert guest.cpu.get("eax") == 0x8001001B
    assert guest.cpu.get("cr0") & 8
    guest.call("CLTS")
    guest.call("GetCR0")
    assert guest.cpu.get("eax") == 0x80010013
    assert not guest.cpu.get("cr0") & 8
    guest.call("SetCR4", eax=0x90)
    guest.call("GetCR4")
    assert guest.cpu.get("eax") == 0x90
    guest.call("SetCR2", eax=0x1234)
    guest.run("mov eax, cr2")
    assert guest.cpu.get("eax") == 0x1234


@ALL
def test_turning_paging_off_is_no_way_out(hypervisor: str) -> None:
    guest = started(hypervisor)
    assert guest.run("mov cr0, eax", eax=0x11).reason == "violation"
    assert guest.personality.violation is not None
    assert guest.personality.violation.rule == "paging-off"


@ALL
def test_descriptors_get_ring_1_and_a_cut_limit(hypervisor: str) -> None:
    guest = started(hypervisor)
    for index, base, limit in (
        (20, 0, 0xFFFFF),
        (21, 0x10000000, 0xFFFFF),
        (22, 0xFBFFF000, 0xF),
        (23, 0x10000800, 0xFFFFF),
    ):
        low, high = struct.unpack("<II", segment(0x93, base=base, limit=limit))
        assert guest.call("WriteGDTEntry", high, eax=BASE + GDT, edx=index, ecx=low).reason == "breakpoint"
        assert (guest.word(GDT + 8 * index), guest.word(GDT + 8 * index + 4)) == (low, high)
        guest.run("mov fs, eax", eax=8 * index | 1)
        end = guest.cpu.get("fs_base") + guest.cpu.get("fs_limit")
        assert 0xFC000000 <= end <= 0xFC000FFF
        assert guest.cpu.get("fs_access") >> 5 & 3 == 1
    # A segment that begins in the hole is none at all: #NP.
    low, high = struct.unpack("<II", segment(0x93, base=0xFD000000, limit=0xF))
    guest.call("WriteGDTEntry", high, eax=BASE + GDT, edx=24, ecx=low)
    guest.run("mov fs, eax", eax=0xC1, limit=20)
    assert guest.word(STACK_TOP - 20) == 11


@ALL
def test_a_new_gdt(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.memory.write(0x80000, guest.memory.read(GDT, 0x100))
    guest.memory.write(0x80000 + 0xA0, segment(0xF3, base=0x1000, limit=0xFF, flags=4))
    guest.memory.write(DATA + 0x100, struct.pack("<HI", 0xAF, BASE + 0x80000))
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    assert guest.call("SetGDT", eax=BASE + DATA + 0x100).reason == "breakpoint", guest.personality.violation
    guest.run("mov gs, eax", eax=0xA3)
    assert (guest.cpu.get("gs_base"), guest.cpu.get("gs_limit")) == (0x1000, 0xFF)
    # Past the new limit there is nothing.
    guest.run("mov gs, eax", eax=0xB3, limit=20)
    assert guest.word(STACK_TOP - 20) == 13
    guest.memory.write(DATA, bytes(8))
    guest.call("GetGDT", eax=BASE + DATA)
    assert guest.memory.read(DATA, 6) == struct.pack("<HI", 0xAF, BASE + 0x80000)


@ALL
def test_the_ldt(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.run("mov gs, eax", eax=0x0F)
    assert guest.cpu.get("gs_access") >> 5 & 3 == 3
    low, high = struct.unpack("<II", segment(0xF3, base=0x2000, limit=0x7F, flags=4))
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    assert guest.call("WriteLDTEntry", high, eax=BASE + LDT, edx=3, ecx=low).reason == "breakpoint"
    guest.run("mov gs, eax", eax=0x1F)
    assert (guest.cpu.get("gs_base"), guest.cpu.get("gs_limit")) == (0x2000, 0x7F)
    assert guest.call("SetLDT", eax=0).reason == "breakpoint"
    guest.call("GetLDT")
    assert guest.cpu.get("eax") == 0
    guest.run("mov gs, eax", eax=0x1F, limit=20)
    assert guest.word(STACK_TOP - 20) == 13


@ALL
def test_gates_written_one_by_one(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.memory.write(DATA + 0x800, b"\xeb\xfe")
    low, high = struct.unpack("<II", gate(BASE + DATA + 0x800))
    assert guest.call("WriteIDTEntry", high, eax=BASE + IDT, edx=6, ecx=low).reason == "breakpoint"
    assert guest.memory.read(IDT + 48, 8) == gate(BASE + DATA + 0x800)
    guest.run("ud2", limit=10)
    assert guest.cpu.get("eip") == BASE + DATA + 0x800


@ALL
def test_the_kernels_stack(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.call("UpdateKernelStack", eax=0x68, edx=BASE + 0x7F000)
    assert guest.personality.view()["stack_esp"] == BASE + 0x7F000
    assert guest.word(TSS + 4) == BASE + STACK_TOP, "the guest's TSS is the guest's to write"


@pytest.mark.parametrize("hypervisor", THROUGH_THE_GATE)
def test_the_kernels_stack_in_the_older_interface(hypervisor: str) -> None:
    guest = started(hypervisor, "vmi-13.0")
    guest.call("UpdateKernelStack", eax=BASE + TSS, edx=BASE + 0x7F000)
    view = guest.personality.view()
    assert (view["stack_ss"], view["stack_esp"]) == (0x69, BASE + 0x7F000)


@ALL
def test_debug_registers(hypervisor: str) -> None:
    guest = started(hypervisor)
    for number in (0, 1, 2, 3):
        guest.call("SetDR", eax=number, edx=0x1000 * number)
    guest.call("SetDR", eax=7, edx=0x2755)
    guest.call("GetDR", eax=2)
    assert guest.cpu.get("eax") == 0x2000
    guest.call("GetDR", eax=7)
    assert guest.cpu.get("eax") == 0x755, "bit 10 is always on, general detect never"
    guest.call("SetDR", eax=7, edx=0x400)


@ALL
def test_model_specific_registers(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.call("WRMSR", ecx=0x175, eax=0x55, edx=0)
    guest.call("RDMSR", ecx=0x175)
    assert (guest.cpu.get("eax"), guest.cpu.get("edx")) == (0x55, 0)
    assert guest.cpu.get("sysenter_esp") == 0 or hypervisor == "native"
    guest.run("rdmsr", ecx=0x175)
    assert guest.cpu.get("eax") == 0x55
    # One that the processor does not have faults, in or out of the interface.
    guest.run("rdmsr", ecx=0x12345678, limit=20)
    assert guest.word(STACK_TOP - 20) == 13


@ALL
def test_time(hypervisor: str) -> None:
    guest = started(hypervisor)

    def wide(name: str, **registers: int) -> int:
        assert guest.call(name, **registers).reason == "breakpoint"
        return guest.cpu.get("eax") | guest.cpu.get("edx") << 32

    assert wide("GetCycleFrequency") == 1_000_000_000 // guest.machine.options.ns_per_instruction
    first, second = wide("GetCycleCounter", eax=0), wide("GetCycleCounter", eax=1)
    assert 0 < first < second <= wide("RDTSC")
    assert wide("GetCycleCounter", eax=2) == 0
    # The machine's clock begins on 2020-01-01.
    seconds = wide("GetWallclockTime") // 1_000_000_000
    assert 1_577_836_800 <= seconds <= 1_577_836_801
    assert guest.call("WallclockUpdated").reason == "breakpoint"
    assert guest.cpu.get("eax") == 0


def answer_irq0(guest: PagedGuest, handler: bytes) -> None:
    """The 8259A is set up, and vector 0x20 has this handler."""
    bus = guest.machine.bus
    for port, values in ((0x20, (0x11,)), (0x21, (0x20, 4, 1, 0xFE)), (0xA0, (0x11,)), (0xA1, (0x28, 2, 1, 0xFF))):
        for value in values:
            bus.port_write(port, 1, value)
    guest.memory.write(0x48000 + 16 * 0x20, handler)


@ALL
def test_an_alarm_comes_when_it_is_due(hypervisor: str) -> None:
    guest = started(hypervisor)
    # rdtsc; mov ss:[0xC0050000], eax; stop
    answer_irq0(guest, bytes.fromhex("0f31 36a3000005c0 ebfe".replace(" ", "")))
    now = guest.cpu.time_stamp()
    assert guest.call("SetAlarm", 0, 0, eax=0, edx=now + 20_000 & 0xFFFFFFFF, ecx=0).reason == "breakpoint"
    guest.call("CancelAlarm", eax=0)
    assert guest.cpu.get("eax") == 1
    guest.call("CancelAlarm", eax=0)
    assert guest.cpu.get("eax") == 0
    assert guest.call("EnableInterrupts").reason == "breakpoint"
    guest.run("nop; " * 20)
    guest.call("DisableInterrupts")
    now = guest.cpu.time_stamp()
    guest.call("SetAlarm", 0, 0, eax=0, edx=now + 20_000 & 0xFFFFFFFF, ecx=now + 20_000 >> 32)
    guest.call("Halt")
    assert now + 20_000 <= guest.word(DATA) < now + 20_100


@ALL
@pytest.mark.parametrize(("flags", "times"), [(0, 1), (0x100, 10)])
def test_an_alarm_rings_once_or_again_and_again(hypervisor: str, flags: int, times: int) -> None:
    guest = started(hypervisor, interrupts=True)
    iret = guest.stub("IRET") - (BASE + 0x48000 + 16 * 0x20) - 16
    # inc dword ptr ss:[0xC0050000]; mov al, 0x20; out 0x20, al; jmp IRET
    answer_irq0(guest, bytes.fromhex("36ff05000005c0b020e620e9") + struct.pack("<i", iret))
    now = guest.cpu.time_stamp()
    guest.call("SetAlarm", 1_000, 0, eax=flags, edx=now + 1_000 & 0xFFFFFFFF, ecx=now + 1_000 >> 32)
    guest.run(b"\x49\x75\xfd", limit=200_000, ecx=5_250)  # dec ecx; jnz: 10,500 instructions
    assert times <= guest.word(DATA) <= times + times // 10


@pytest.mark.parametrize("hypervisor", THROUGH_THE_GATE)
def test_the_older_interfaces_page_calls(hypervisor: str) -> None:
    guest = started(hypervisor, "vmi-13.0")
    entry = 0x10000 + 0x3F0 * 4
    at = BASE + entry
    guest.call("SetPxE", eax=at, edx=0x300003)
    assert guest.word(entry) == 0x300003
    guest.call("SwapPxE", eax=at, edx=0x301003)
    assert (guest.cpu.get("eax"), guest.word(entry)) == (0x300003, 0x301003)
    guest.call("TestAndSetPxEBit", eax=at, edx=6)
    assert (guest.cpu.get("eax"), guest.word(entry)) == (0, 0x301043)
    guest.call("TestAndClearPxEBit", eax=at, edx=6)
    assert (guest.cpu.get("eax"), guest.word(entry)) == (1, 0x301003)
    guest.call("GetPxE", eax=at)
    assert guest.cpu.get("eax") == 0x301003


@ALL
def test_ports_are_the_machines(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.run("mov edx, 0x3fb; mov al, 3; out dx, al; xor eax, eax; in al, dx")
    assert guest.cpu.get("eax") == 3
    assert guest.personality.traps["out"] == 1
    guest.memory.write(DATA, b"hypervisors")
    guest.run("cld; rep outsb dx, byte ptr [esi]", edx=0xE9, esi=BASE + DATA, ecx=11)
    assert guest.machine.board.consoles.debug == b"hypervisors"
    assert (guest.cpu.get("ecx"), guest.cpu.get("esi")) == (0, BASE + DATA + 11)
    guest.run("std; rep outsb dx, byte ptr [esi]; cld", edx=0xE9, esi=BASE + DATA + 2, ecx=3)
    assert guest.machine.board.consoles.debug == b"hypervisorspyh"
    assert (guest.cpu.get("ecx"), guest.cpu.get("esi")) == (0, BASE + DATA - 1)


@ALL
def test_privileged_instructions_outside_the_interface(hypervisor: str) -> None:
    guest = started(hypervisor)
    guest.memory.write(DATA + 0x100, struct.pack("<HI", 0xFF, BASE + GDT) + struct.pack("<HI", 0x7FF, BASE + IDT))
    guest.run(
        "sti; clts; wbinvd; mov eax, cr3; mov cr3, eax; mov eax, cr4; mov cr4, eax; invlpg [0xC0050000]; "
        "mov eax, dr7; mov dr7, eax; xor eax, eax; lldt ax; mov eax, 0x80; ltr ax"
    )
    assert guest.personality.violation is None
    assert guest.personality.virtual_if
    guest.run(bytes.fromhex("0f011500010 5c0".replace(" ", "")) + bytes.fromhex("0f011d060105c0"))
    assert guest.personality.view()["idtr_limit"] == 0x7FF
    traps = guest.personality.traps
    assert traps["lgdt, lidt, lmsw, invlpg"] == 3
    assert traps["lldt, ltr"] == 2
    assert traps["mov to cr"] == traps["mov from cr"] == 2


@ALL
@pytest.mark.parametrize(("name", "reason"), [("Reboot", "reset"), ("Shutdown", "poweroff")])
def test_the_ends(hypervisor: str, name: str, reason: str) -> None:
    guest = started(hypervisor)
    assert guest.call(name, eax=1).reason == reason


@pytest.mark.parametrize("hypervisor", THROUGH_THE_GATE)
def test_initial_state_of_another_processor_is_kept(hypervisor: str) -> None:
    guest = started(hypervisor)
    state = bytes(range(0x5A))
    guest.memory.write(DATA, state)
    guest.call("SetInitialAPState", eax=BASE + DATA, edx=1)
    assert guest.personality.processors == {1: state}


@pytest.mark.parametrize("abi", ["vmi-3.0", "vmi-13.0"])
def test_the_local_apic(abi: str) -> None:
    guest = started("vmware", abi)
    base = 0 if abi == "vmi-3.0" else 0xC03FF000
    guest.call("APICWrite", eax=base + 0x80, edx=0x20)
    guest.call("APICRead", eax=base + 0x80)
    assert guest.cpu.get("eax") == 0x20
