"""Guests of every ABI call into every ROM under Unicorn: GetRelocationInfo, the interrupt calls, IRET, SYSEXIT.

Call numbers and state addresses are written here from the published tables, not taken from the specs.
"""

from __future__ import annotations

import pytest
from romguest import BASE, CODE, DEPRIVILEGED, PAIRS, REGISTERS, TOP, Guest, rom

from vmipatch.rombuild.inspect import relocations

# Enable, Disable, Get, Set of the interrupt mask; IRET; SYSEXIT with STI. Sources: Linux 2.6.32 asm/vmi.h (3.0),
# the patch series of 13 March 2006 (13.0; its extensions keep the numbers), the afterburner's 6.1 headers.
NUMBERS = {
    "vmi-3.0": (29, 30, 31, 32, 33, 34),
    "vmi-13.0": (35, 36, 37, 38, 39, 40),
    "vmi-13.3": (35, 36, 37, 38, 39, 40),
    "vmi-13.0-l4ka": (35, 36, 37, 38, 39, 40),
    "vmi-6.1": (58, 59, 55, 54, 60, 63),
}
COUNT = {"vmi-3.0": 74, "vmi-13.0": 85, "vmi-13.3": 88, "vmi-13.0-l4ka": 88, "vmi-6.1": 92}
SLOTS = ("vmi-13.0", "vmi-13.3", "vmi-13.0-l4ka", "vmi-6.1")
# Where the virtual interrupt flag and the pending word are, for a real guest of each (Xen: vcpu_info's mask byte 1
# and pending byte 0; lguest: lguest_data at 0 and 20; the others' are ours, docs/abis.md).
PENDING = {"xen": 0, "lguest": 20, "kvm": 0xE04, "vmware": 0xE04, "l4ka": 0xE04}


def virtual_flag(guest: Guest, hypervisor: str) -> bool:
    if hypervisor == "xen":
        return guest.uc.mem_read(TOP + 1, 1)[0] == 0
    return bool(guest.u32(TOP + (0 if hypervisor == "lguest" else 0xE00)) & 0x200)


def set_virtual_flag(guest: Guest, hypervisor: str, on: bool) -> None:
    if hypervisor == "xen":
        guest.write(TOP + 1, int(not on), 1)
    else:
        guest.write(TOP + (0 if hypervisor == "lguest" else 0xE00), 0x200 if on else 0)


def stub(hypervisor: str, abi: str, number: int) -> int:
    """Where a guest of the ABI finds a call."""
    return 32 * number if abi in SLOTS else relocations(rom(hypervisor, abi).data).of(number).offset


def unchanged(before: dict[str, int], after: dict[str, int], *but: str) -> None:
    for name in REGISTERS:
        if name not in but:
            assert after[name] == before[name], name


def marks(**given: int) -> dict[str, int]:
    return {name: given.get(name, 0xA0B0C000 + 0x11 * n) for n, name in enumerate(REGISTERS)}


@pytest.mark.parametrize(("hypervisor", "abi"), [p for p in PAIRS if p[1] in ("vmi-3.0", "vmi-13.3")])
@pytest.mark.parametrize("base", [BASE, 0xC00C0000, 0xD1234800 & ~0x7FF])
def test_get_relocation_info_agrees_with_the_table(hypervisor: str, abi: str, base: int) -> None:
    data = rom(hypervisor, abi).data
    table = relocations(data)
    entry = 0x88 if abi == "vmi-3.0" else 85 * 32
    for ring in (0, 1):
        guest = Guest(data, ring, base)
        for number in range(COUNT[abi]):
            after = guest.call(entry, eax=number)
            answer = table.of(number)
            assert after["edx"] == answer.type, number
            assert after["eax"] == (base + answer.offset if answer.type else 0), number
            unchanged(marks(), after, "eax", "ecx", "edx")
        for number in (COUNT[abi], 1000, 0xFFFFFFFF, 0x80000000):
            assert guest.call(entry, eax=number)["edx"] == 0


@pytest.mark.parametrize(("hypervisor", "abi"), PAIRS)
def test_slots_are_where_a_guest_looks(hypervisor: str, abi: str) -> None:
    answers = relocations(rom(hypervisor, abi).data)
    if abi in SLOTS:
        assert answers.slot_size == 32
        for number in range(4, COUNT[abi]):
            assert answers.of(number).offset == 32 * number
            assert answers.of(number).type == 1
    else:
        # What section 10 of the notes demands of a ROM that boots mainline Linux.
        assert answers.of(33).type == answers.of(34).type == 2
        if answers.of(66).type:
            assert [answers.of(n).type for n in (67, 68, 69, 70)] == [1, 1, 1, 1]


@pytest.mark.parametrize(("hypervisor", "abi"), PAIRS)
def test_interrupt_calls_before_init(hypervisor: str, abi: str) -> None:
    """At CPL 0 they work on the processor's own flag."""
    enable, disable, get, put = (stub(hypervisor, abi, n) for n in NUMBERS[abi][:4])
    guest = Guest(rom(hypervisor, abi).data)
    unchanged(marks(), guest.call(enable))
    assert guest["eflags"] & 0x200
    after = guest.call(get)
    assert after["eax"] & 0x200
    unchanged(marks(), after, "eax")
    unchanged(marks(), guest.call(disable))
    assert not guest["eflags"] & 0x200
    assert not guest.call(get)["eax"] & 0x200
    unchanged(marks(eax=0x202), guest.call(put, eax=0x202))
    assert guest["eflags"] & 0x200
    unchanged(marks(eax=0x2), guest.call(put, eax=0x2))
    assert not guest["eflags"] & 0x200
    assert guest.traps == []


@pytest.mark.parametrize(("hypervisor", "abi"), [p for p in PAIRS if p[0] != "native"])
def test_interrupt_calls_after_init(hypervisor: str, abi: str) -> None:
    """At CPL 1 they work on the state page, and take what is pending when they let interrupts in."""
    enable, disable, get, put = (stub(hypervisor, abi, n) for n in NUMBERS[abi][:4])
    guest = Guest(rom(hypervisor, abi).data, ring=1)
    set_virtual_flag(guest, hypervisor, False)
    for offset, given, wanted in (
        (enable, {}, True),
        (disable, {}, False),
        (put, {"eax": 0x246}, True),
        (put, {"eax": 0x46}, False),
    ):
        unchanged(marks(**given), guest.call(offset, **given))
        assert virtual_flag(guest, hypervisor) is wanted
        after = guest.call(get)
        assert bool(after["eax"] & 0x200) is wanted
        unchanged(marks(), after, "eax")
    assert guest.traps == [], "nothing was pending, nothing traps"
    for offset, given, traps in (
        (enable, {}, 1),
        (put, {"eax": 0x200}, 1),
        (put, {"eax": 0}, 0),
        (disable, {}, 0),
        (get, {}, 0),
    ):
        guest.traps.clear()
        set_virtual_flag(guest, hypervisor, False)
        guest.write(TOP + PENDING[hypervisor], 1, 1)
        after = guest.call(offset, **given)
        unchanged(marks(**given), after, *(["eax"] if offset == get else []))
        assert len(guest.traps) == traps
        if traps:
            deliver(hypervisor, guest)


def deliver(hypervisor: str, guest: Guest) -> None:
    """The trap was the hypervisor's own way to take pending interrupts."""
    kind, registers = guest.traps[-1]
    if hypervisor == "xen":
        assert (kind, registers["eax"], registers["ebx"], registers["ecx"]) == ("int 0x82", 17, 0, 0)
    elif hypervisor == "lguest":
        assert (kind, registers["eax"]) == ("int 0x1f", 19)
    elif hypervisor == "kvm":
        assert (kind, registers["eax"]) == ("vmcall", 1)
    else:
        frame = registers["ebx"]
        assert kind == ("in 0x5658" if hypervisor == "vmware" else "int 0x30")
        assert guest.u32(frame + 32) == 0x10000


@pytest.mark.parametrize(("hypervisor", "abi"), PAIRS)
def test_iret_before_init(hypervisor: str, abi: str) -> None:
    offset = stub(hypervisor, abi, NUMBERS[abi][4])
    guest = Guest(rom(hypervisor, abi).data)
    extra = [0xDEAD] if abi in SLOTS else []
    after = guest.jump(offset, [*extra, CODE + 0x800, 8, 0x246])
    unchanged(marks(), after)
    assert guest["eip"] == CODE + 0x800
    assert guest["eflags"] & 0x200
    assert guest["esp"] == 0x00201000 + 4 * (len(extra) + 3)


@pytest.mark.parametrize(("hypervisor", "abi"), [p for p in PAIRS if p[0] != "native"])
@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("user", [True, False])
def test_iret_after_init(hypervisor: str, abi: str, on: bool, user: bool) -> None:
    offset = stub(hypervisor, abi, NUMBERS[abi][4])
    guest = Guest(rom(hypervisor, abi).data, ring=1)
    guest.on_trap = lambda kind, g: g.uc.emu_stop()
    extra = [0xDEAD] if abi in SLOTS else []
    flags = 0x246 if on else 0x46
    frame = [CODE + 0x800, 0x2B, flags, 0x00400800, 0x33] if user else [CODE + 0x800, 0x19, flags]
    set_virtual_flag(guest, hypervisor, not on)
    after = guest.jump(offset, [*extra, *frame])
    if hypervisor == "xen":
        # HYPERVISOR_iret: EAX, then the frame, from the stack.
        kind, registers = guest.traps[0]
        assert (kind, registers["eax"]) == ("int 0x82", 23)
        assert [guest.u32(registers["esp"] + 4 * n) for n in range(4)] == [marks()["eax"], *frame[:3]]
        unchanged(marks(), registers, "eax")
        return
    unchanged(marks(), after)
    assert guest["eip"] == CODE + 0x800
    assert virtual_flag(guest, hypervisor) is on
    assert guest["esp"] == (0x00400800 if user else 0x00201000 + 4 * (len(extra) + 3))
    assert guest.traps == []


@pytest.mark.parametrize("hypervisor", [h for h in DEPRIVILEGED if h != "xen"])
def test_iret_takes_what_is_pending(hypervisor: str) -> None:
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    guest.write(TOP + PENDING[hypervisor], 1, 1)
    after = guest.jump(stub(hypervisor, "vmi-3.0", 33), [CODE + 0x800, 0x2B, 0x202, 0x00400800, 0x33])
    unchanged(marks(), after)
    assert len(guest.traps) == 1
    deliver(hypervisor, guest)


@pytest.mark.parametrize("hypervisor", [h for h in DEPRIVILEGED if h != "xen"])
def test_iret_to_virtual_8086_mode_is_the_hypervisors(hypervisor: str) -> None:
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    guest.on_trap = lambda kind, g: g.uc.emu_stop()
    frame = [0x1234, 0x7C0, 0x20202, 0x800, 0x9000, 1, 2, 3, 4]
    guest.jump(stub(hypervisor, "vmi-3.0", 33), frame)
    _, registers = guest.traps[0]
    at = registers["ebx"]
    assert guest.u32(at + 32) == 33
    assert [guest.u32(at + 36 + 4 * n) for n in range(9)] == frame
    assert guest.u32(at + 28) == marks()["eax"]


@pytest.mark.parametrize(("hypervisor", "abi"), [p for p in PAIRS if p[0] != "native"])
def test_sysexit_after_init(hypervisor: str, abi: str) -> None:
    """To ring 3 with the selectors that SYSEXIT makes from the kernel's CS, interrupts on."""
    guest = Guest(rom(hypervisor, abi).data, ring=1)
    guest.on_trap = lambda kind, g: g.uc.emu_stop()
    set_virtual_flag(guest, hypervisor, False)
    given = {"edx": CODE + 0x800, "ecx": 0x00400800}
    after = guest.jump(stub(hypervisor, abi, NUMBERS[abi][5]), [0xDEAD], **given)
    if hypervisor == "xen":
        kind, registers = guest.traps[0]
        assert (kind, registers["eax"]) == ("int 0x82", 23)
        words = [guest.u32(registers["esp"] + 4 * n) for n in range(6)]
        assert words[:3] == [marks()["eax"], CODE + 0x800, 0x2B]
        assert words[3] & 0x200
        assert words[4:] == [0x00400800, 0x33]
        return
    unchanged(marks(**given), after)
    assert guest["eip"] == CODE + 0x800
    assert guest["esp"] == 0x00400800
    assert virtual_flag(guest, hypervisor)
