"""Interrupts and faults under every hypervisor: who runs next, on which stack, with which virtual flag.

What is expected is the processor's own rule (SDM 3A, chapter 6) with ring 1 for ring 0, and docs/abis.md.
"""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    CODE,
    DATA,
    DEPRIVILEGED,
    HANDLERS,
    IDT,
    STACK_TOP,
    USER_AT,
    USER_CODE,
    USER_CS,
    USER_DS,
    USER_STACK_AT,
    PagedGuest,
    code,
    gate,
)

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
IRQ0 = 0x20


def started(hypervisor: str, *, interrupts: bool = False, pae: bool = False) -> PagedGuest:
    guest = PagedGuest(hypervisor, pae=pae)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    assert guest.init() == 0
    return guest


def stack(guest: PagedGuest, count: int) -> tuple[int, ...]:
    """Words on the stack, the top first."""
    raw = guest.cpu.read_linear(guest.cpu.get("esp"), 4 * count)
    assert raw is not None
    return struct.unpack(f"<{count}I", raw)


def arm_irq0(guest: PagedGuest) -> None:
    """The 8259A answers with vector 0x20 for IRQ 0, and the line rises."""
    pic = guest.machine.board.pic
    bus = guest.machine.bus
    for port, values in ((0x20, (0x11,)), (0x21, (0x20, 4, 1, 0xFE)), (0xA0, (0x11,)), (0xA1, (0x28, 2, 1, 0xFF))):
        for value in values:
            bus.port_write(port, 1, value)
    guest.machine.board.set_irq(0, False)
    guest.machine.board.set_irq(0, True)
    assert pic.output


def handler(guest: PagedGuest, vector: int, text: str) -> None:
    raw = code(text)
    assert len(raw) <= 16
    guest.memory.write(HANDLERS + 16 * vector, raw)


def to_user(guest: PagedGuest, text: str, flags: int = 0x202) -> None:
    """Run user code: an IRET by the hypervisor's stub, then on up to whatever stops it."""
    guest.memory.write(USER_CODE, code(text))
    target = guest.stub("IRET")
    frame = f"push {USER_DS}; push {USER_STACK_AT}; push {flags}; push {USER_CS}; push {USER_AT}; "
    guest.run(frame + f"mov eax, {target}; jmp eax", limit=300)


@ALL
@pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
def test_a_kernel_fault_comes_to_its_handler(hypervisor: str, pae: bool) -> None:
    guest = started(hypervisor, interrupts=True, pae=pae)
    handler(guest, 14, "mov ecx, esp; jmp .")
    guest.run("nop; mov eax, dword ptr [0x12345678]", limit=30, ecx=0)
    top = guest.cpu.get("ecx")
    assert top == BASE + STACK_TOP - 16
    assert stack(guest, 4) == (0, BASE + CODE + 1, 0x61, guest.cpu.eflags & 0xD5 | 0x10202)
    assert not guest.personality.virtual_if
    assert guest.cpu.eflags & 0x200
    guest.memory.write(CODE, b"\x90" * 16)
    guest.call("GetCR2")
    assert guest.cpu.get("eax") == 0x12345678


@ALL
def test_a_trap_gate_leaves_the_virtual_flag(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    guest.memory.write(IDT + 8 * 3, gate(BASE + HANDLERS + 16 * 3, 0xEF))
    guest.call("SetIDT", eax=table_pointer(guest, BASE + IDT, 0x7FF))
    handler(guest, 3, "jmp .")
    guest.run("int3", limit=10)
    assert guest.personality.virtual_if
    assert stack(guest, 3)[0] == BASE + CODE + 1


def table_pointer(guest: PagedGuest, base: int, limit: int) -> int:
    guest.memory.write(DATA + 0x100, struct.pack("<HI", limit, base))
    return BASE + DATA + 0x100


@ALL
def test_the_pushed_flags_show_the_virtual_flag(hypervisor: str) -> None:
    guest = started(hypervisor)
    handler(guest, 6, "jmp .")
    guest.run("ud2", limit=10)
    assert not stack(guest, 3)[2] & 0x200


@ALL
def test_a_system_call_and_back(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    handler(guest, 0x80, f"mov ebx, esp; mov edx, {guest.stub('IRET')}; jmp edx")
    to_user(guest, "mov eax, 5; int 0x80; mov ecx, esp; jmp .")
    cpu = guest.cpu
    assert (cpu.get("cpl"), cpu.get("cs"), cpu.get("ss"), cpu.get("eax")) == (3, USER_CS, USER_DS, 5)
    assert cpu.get("ecx") == USER_STACK_AT
    assert cpu.get("ebx") == BASE + STACK_TOP - 20
    assert guest.personality.virtual_if
    # A trap gate for users needs no exit.
    assert "int" not in guest.personality.traps


@ALL
def test_a_user_fault_enters_the_kernel_on_its_stack(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    handler(guest, 14, "mov ebx, esp; jmp .")
    to_user(guest, f"mov eax, {USER_DS}; mov ds, eax; mov eax, dword ptr [0xC0001000]")
    assert guest.cpu.get("cpl") == 1
    # Frame: error code (user, present), EIP, CS, EFLAGS, ESP, SS.
    assert guest.cpu.get("ebx") == BASE + STACK_TOP - 24
    error, eip, cs, flags, esp, ss = stack(guest, 6)
    assert (error, eip, cs, esp, ss) == (5, USER_AT + 7, USER_CS, USER_STACK_AT, USER_DS)
    assert flags & 0x200
    assert not guest.personality.virtual_if


@ALL
def test_users_cannot_reach_the_kernels_instructions(hypervisor: str) -> None:
    for text in ("cli", "hlt", "mov eax, cr0", "out 0x80, al", "int 0x21", "mov eax, dword ptr [0xFC001000]"):
        guest = started(hypervisor, interrupts=True)
        handler(guest, 13, "mov ebx, esp; jmp .")
        to_user(guest, text)
        assert guest.cpu.get("cpl") == 1, text
        assert stack(guest, 2)[1] == USER_AT, text
        assert stack(guest, 1)[0] == (0x21 * 8 + 2 if text == "int 0x21" else 0)
        assert guest.personality.violation is None


@ALL
def test_an_interrupt_waits_for_the_virtual_flag(hypervisor: str) -> None:
    guest = started(hypervisor)
    handler(guest, IRQ0, "inc dword ptr ss:[0xC0050000]; jmp .")
    arm_irq0(guest)
    assert guest.run("nop; nop; nop").reason == "breakpoint"
    assert guest.word(DATA) == 0
    assert guest.machine.board.pic.output, "nothing was acknowledged before the guest could take it"
    guest.call("EnableInterrupts")
    assert guest.word(DATA) == 1
    assert not guest.personality.virtual_if
    assert stack(guest, 3)[2] & 0x200


@ALL
def test_an_interrupt_comes_at_once_when_it_may(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    handler(guest, IRQ0, "inc dword ptr ss:[0xC0050000]; jmp .")
    arm_irq0(guest)
    guest.run("nop; nop; nop", limit=10)
    assert guest.word(DATA) == 1
    assert stack(guest, 1)[0] == BASE + CODE


@ALL
def test_an_interrupt_masked_before_it_is_taken_never_was(hypervisor: str) -> None:
    guest = started(hypervisor)
    handler(guest, IRQ0, "inc dword ptr ss:[0xC0050000]; jmp .")
    arm_irq0(guest)
    guest.machine.bus.port_write(0x21, 1, 0xFF)
    assert guest.call("EnableInterrupts").reason == "breakpoint"
    assert guest.word(DATA) == 0


@ALL
def test_set_interrupt_mask_and_iret_deliver_too(hypervisor: str) -> None:
    guest = started(hypervisor)
    handler(guest, IRQ0, "inc dword ptr ss:[0xC0050000]; jmp .")
    arm_irq0(guest)
    guest.call("SetInterruptMask", eax=0x200)
    assert guest.word(DATA) == 1

    guest = started(hypervisor)
    handler(guest, IRQ0, "inc dword ptr ss:[0xC0050000]; jmp .")
    arm_irq0(guest)
    to_user(guest, "jmp .")
    assert guest.word(DATA) == 1


@ALL
def test_halt_turns_interrupts_on_and_wakes(hypervisor: str) -> None:
    guest = started(hypervisor)
    handler(guest, IRQ0, "inc dword ptr [0xC0050000]; add esp, 12; ret")
    arm_irq0(guest)
    guest.machine.board.set_irq(0, False)
    # A timer raises the line while the guest sleeps.
    timer = guest.machine.clock.timer("test", lambda: guest.machine.board.set_irq(0, True))
    timer.arm(guest.machine.clock.now + 5_000_000)
    before = guest.machine.clock.now
    guest.call("Halt")
    assert guest.word(DATA) == 1
    assert guest.machine.clock.now >= before + 5_000_000


@ALL
def test_hlt_with_the_virtual_flag_off_never_wakes(hypervisor: str) -> None:
    guest = started(hypervisor)
    assert guest.run("hlt").reason == "halt"


@ALL
def test_sysenter_and_sysexit(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    for msr, value in ((0x174, 0x60), (0x175, BASE + STACK_TOP - 0x100), (0x176, BASE + HANDLERS + 16 * 0x90)):
        guest.run("wrmsr", ecx=msr, eax=value, edx=0)
    guest.run("rdmsr", ecx=0x176)
    assert guest.cpu.get("eax") == BASE + HANDLERS + 16 * 0x90
    handler(guest, 0x90, f"mov ebx, esp; mov eax, {guest.stub('SYSEXIT')}; jmp eax")
    to_user(guest, f"mov edx, {USER_AT + 12}; mov ecx, esp; sysenter; nop; nop; nop; mov esi, 77; jmp .")
    cpu = guest.cpu
    assert cpu.get("ebx") == BASE + STACK_TOP - 0x100
    assert (cpu.get("cpl"), cpu.get("esi"), cpu.get("esp")) == (3, 77, USER_STACK_AT)
    assert (cpu.get("cs"), cpu.get("ss")) == (0x73, 0x7B)
    assert guest.personality.virtual_if
    assert guest.personality.traps["sysenter"] == 1


@ALL
def test_sysenter_turns_the_virtual_flag_off(hypervisor: str) -> None:
    """The MSRs were set before VMI_Init: the processor's own must not lead to ring 0."""
    guest = PagedGuest(hypervisor)
    for msr, value in ((0x174, 0x60), (0x175, BASE + STACK_TOP - 0x100), (0x176, BASE + HANDLERS + 16 * 0x90)):
        guest.run("wrmsr", ecx=msr, eax=value, edx=0)
    guest.cpu.set("eflags", 0x202)
    assert guest.init() == 0
    handler(guest, 0x90, "mov ebx, esp; jmp .")
    to_user(guest, "sysenter")
    assert (guest.cpu.get("cpl"), guest.cpu.get("ebx")) == (1, BASE + STACK_TOP - 0x100)
    assert not guest.personality.virtual_if
    assert guest.cpu.eflags & 0x200


@ALL
def test_ring_3_begins_without_the_kernels_segments(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    to_user(guest, "mov eax, ds; mov ecx, es; mov esi, ss; jmp .")
    assert (guest.cpu.get("eax"), guest.cpu.get("ecx"), guest.cpu.get("esi")) == (0, 0, USER_DS)


@ALL
def test_single_step_and_breakpoints_come_to_the_guest(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    handler(guest, 1, "inc dword ptr ss:[0xC0050000]; jmp .")
    guest.call("SetDR", eax=0, edx=BASE + CODE + 1)
    guest.call("SetDR", eax=7, edx=3)
    guest.run("nop; nop; nop", limit=10)
    assert guest.word(DATA) == 1
    assert stack(guest, 1)[0] == BASE + CODE + 1
    guest.call("GetDR", eax=6)


@ALL
def test_virtual_8086_mode_and_back(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    handler(guest, 13, "mov ebx, esp; jmp .")
    guest.memory.write(USER_CODE, b"\xf4")
    frame = "".join(f"push {word}; " for word in (0, 0, 0, 0, USER_STACK_AT >> 4 & 0xFFFF, 0x100, 0x20202, 0, 0x10))
    target = guest.stub("IRET")
    # CS:IP 0000:0010 is not mapped: the page fault comes from virtual-8086 mode.
    handler(guest, 14, "mov ebx, esp; jmp .")
    guest.run(frame + f"mov eax, {target}; jmp eax", limit=300)
    assert guest.cpu.get("cpl") == 1
    words = stack(guest, 10)
    assert words[1:4] == (0x10, 0, 0x30202 if words[3] & 0x10000 else 0x20202)
    assert words[4] == 0x100
    assert guest.cpu.get("ds") & 0xFFFC == 0
