"""Guests that break the rules, continued: bad pointers, forged descriptors, ways to ring 0, calls that there are not.

As in test_breaking_rules.py, each case runs under all five deprivileged personalities, and the hypervisor's own
memory is as it was before.
"""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    CODE,
    DATA,
    DEPRIVILEGED,
    GDT,
    HANDLERS,
    IDT,
    KERNEL_CS,
    KERNEL_DS,
    LDT,
    LOCAL,
    MAPPED,
    TASK,
    USER_AT,
    PagedGuest,
    code,
    gate,
    segment,
)
from rulebreaking import (
    FREE,
    HOLE,
    Action,
    After,
    Dead,
    Ends,
    Fault,
    Harmless,
    Stopped,
    call,
    exit_to,
    frame,
    from_user,
    judge,
    owned,
    raw,
    text,
    then,
    through_gate,
    with_memory,
)

from vmipatch.emu.machine.machine import Outcome

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
POINTER, RING0, BAD_CALL = Stopped("bad-pointer"), Stopped("ring-0"), Stopped("bad-call")
UNMAPPED = 0x10000000
LAST = BASE + MAPPED  # the first address behind the direct map
# Calls by number in API 3.0 (Linux 2.6.32, asm/vmi.h).
SET_GDT, SET_LDT, SET_IDT, SET_TR, WRITE_GDT, IRET, SET_PXE, SET_PXE_LONG = 3, 4, 5, 6, 11, 33, 38, 39
SET_AP_STATE, APIC_WRITE, SET_ALARM, CALLS = 62, 63, 68, 74


# --- bad pointers -----------------------------------------------------------------------


def gate_frame(at: int) -> Action:
    """The call gate with its frame at a linear address."""
    return lambda guest: exit_to(guest, 0x564D, ebx=at)


def frame_at_the_end(number: int, **registers: int) -> Action:
    """A frame whose last word is the last that is mapped."""

    def act(guest: PagedGuest) -> Outcome:
        guest.memory.write(MAPPED - 40, frame(guest, number, **registers))
        return exit_to(guest, 0x564D, ebx=LAST - 40)

    return act


def table(base: int, limit: int, action: Action) -> Action:
    """A descriptor-table operand in memory, for a call with its address."""
    return with_memory(DATA + 0x100, struct.pack("<HI", limit, base), action)


OPERAND = BASE + DATA + 0x100
POINTERS: dict[str, tuple[Action | After, Ends]] = {
    "a frame in the hole": (gate_frame(HOLE), POINTER),
    "a frame that is not mapped": (gate_frame(UNMAPPED), POINTER),
    "a null frame": (gate_frame(0), POINTER),
    "a frame across the edge of the hole": (gate_frame(HOLE - 16), POINTER),
    "a frame that wraps": (gate_frame(0xFFFFFFF0), POINTER),
    "a frame across the end of what is mapped": (gate_frame(LAST - 16), POINTER),
    "stack arguments past the end": (frame_at_the_end(SET_ALARM), POINTER),
    "an iret frame past the end": (frame_at_the_end(IRET), POINTER),
    "SetGDT in the hole": (through_gate(SET_GDT, eax=HOLE), POINTER),
    "SetGDT not mapped": (through_gate(SET_GDT, eax=UNMAPPED), POINTER),
    "SetGDT across the edge": (through_gate(SET_GDT, eax=HOLE - 3), POINTER),
    "a gdt in the hole": (table(HOLE, 0xFF, through_gate(SET_GDT, eax=OPERAND)), POINTER),
    "a gdt that is not mapped": (table(UNMAPPED, 0xFF, through_gate(SET_GDT, eax=OPERAND)), POINTER),
    "a gdt that ends in nothing": (table(LAST - 0x80, 0xFF, through_gate(SET_GDT, eax=OPERAND)), POINTER),
    "a gdt across the edge": (table(HOLE - 0x80, 0xFF, through_gate(SET_GDT, eax=OPERAND)), POINTER),
    "a gdt in the hole, as the rom says it": (
        table(HOLE, 0xFF, call("SetGDT", eax=OPERAND)),
        {"": POINTER, "lguest": Fault(13, 0)},
    ),
    "SetIDT in the hole": (through_gate(SET_IDT, eax=HOLE), POINTER),
    "an idt in the hole": (table(HOLE, 0x7FF, through_gate(SET_IDT, eax=OPERAND)), POINTER),
    "an idt that is not mapped": (table(UNMAPPED, 0x7FF, through_gate(SET_IDT, eax=OPERAND)), POINTER),
    "an idt across the edge": (table(HOLE - 8, 0x7FF, through_gate(SET_IDT, eax=OPERAND)), POINTER),
    "lgdt of the hole": (table(HOLE, 0xFF, raw("nop", f"0f0115{struct.pack('<I', OPERAND).hex()}")), POINTER),
    "lidt of the hole": (table(HOLE, 0x7FF, raw("nop", f"0f011d{struct.pack('<I', OPERAND).hex()}")), POINTER),
    "lidt with its operand in the hole": (raw("nop", f"0f011d{struct.pack('<I', HOLE).hex()}"), POINTER),
    "an ldt in the hole": (
        After(
            with_memory(GDT + LOCAL, segment(0x82, base=HOLE, limit=0xFF, flags=0), text("nop")),
            through_gate(SET_LDT, eax=LOCAL),
        ),
        POINTER,
    ),
    "an ldt in the hole, as the rom says it": (
        After(
            with_memory(GDT + LOCAL, segment(0x82, base=HOLE, limit=0xFF, flags=0), text("nop")),
            call("SetLDT", eax=LOCAL),
        ),
        POINTER,
    ),
    "a tss in the hole": (
        After(
            with_memory(GDT + TASK, segment(0x89, base=HOLE, limit=0x67, flags=0), text("nop")),
            through_gate(SET_TR, eax=TASK),
        ),
        POINTER,
    ),
    "SetPxE in the hole": (through_gate(SET_PXE, eax=3, edx=HOLE, ecx=1), POINTER),
    "SetPxE in the hole, as the rom says it": (
        call("SetPxE", eax=3, edx=HOLE, ecx=1),
        {"": POINTER, "xen": Stopped("hole-write", HOLE), "lguest": Stopped("hole-write", HOLE)},
    ),
    "SetPxE not mapped": (through_gate(SET_PXE, eax=3, edx=UNMAPPED, ecx=1), POINTER),
    "SetPxE across the edge": (through_gate(SET_PXE, eax=3, edx=HOLE - 2, ecx=1), POINTER),
    "SetPxELong across the edge": (through_gate(SET_PXE_LONG, eax=3, ecx=HOLE - 4), POINTER),
    "WriteGDTEntry in the hole": (through_gate(WRITE_GDT, eax=HOLE, edx=0), POINTER),
    "WriteGDTEntry by an index into the hole": (
        through_gate(WRITE_GDT, eax=BASE + GDT, edx=(HOLE - BASE - GDT) // 8),
        POINTER,
    ),
    "WriteGDTEntry in the hole, as the rom says it": (
        call("WriteGDTEntry", 0, eax=HOLE, edx=0, ecx=0),
        {"": POINTER, "xen": Stopped("hole-write", HOLE), "lguest": Stopped("hole-write", HOLE)},
    ),
    "SetInitialAPState in the hole": (call("SetInitialAPState", eax=HOLE, edx=1), POINTER),
    "SetInitialAPState across the end": (call("SetInitialAPState", eax=LAST - 8, edx=1), POINTER),
    "GetGDT into the hole": (call("GetGDT", eax=HOLE), Stopped("hole-write", HOLE)),
    "GetIDT into the hole": (call("GetIDT", eax=HOLE + 0x100), Stopped("hole-write", HOLE + 0x100)),
    "the kernel's stack in the hole": (
        After(
            lambda guest: guest.run("nop") if guest.personality.name == "lguest" else to_the_hole(guest),
            lambda guest: to_the_hole(guest) if guest.personality.name == "lguest" else from_user("int 0x21")(guest),
        ),
        {"": Dead("triple fault"), "lguest": POINTER},
    ),
    "APICWrite of a strange register": (call("APICWrite", eax=0xFFFFF0F0, edx=0xFF), Harmless()),
}


def to_the_hole(guest: PagedGuest) -> Outcome:
    return guest.call("UpdateKernelStack", eax=KERNEL_DS, edx=HOLE + 0x800)


@ALL
@pytest.mark.parametrize("name", POINTERS)
def test_bad_pointers(hypervisor: str, name: str) -> None:
    judge(hypervisor, *POINTERS[name])


# --- forged descriptors -----------------------------------------------------------------


def call_gate(address: int, kind: int = 0xEC) -> bytes:
    """A call gate to the kernel's code segment at RPL 0."""
    return gate(address, kind)


def descriptor(index: int, raw_bytes: bytes, *, base: int = GDT, name: str = "WriteGDTEntry") -> Action:
    low, high = struct.unpack("<II", raw_bytes)
    return call(name, high, eax=BASE + base, edx=index, ecx=low)


def far(opcode: str, selector: int, offset: int = 0) -> str:
    """JMP (ea) or CALL (9a) to selector:offset."""
    return opcode + struct.pack("<IH", offset, selector).hex()


def idt_entry(vector: int, raw_bytes: bytes) -> Action:
    low, high = struct.unpack("<II", raw_bytes)
    return call("WriteIDTEntry", high, eax=BASE + IDT, edx=vector, ecx=low)


HERE = BASE + CODE + 8  # behind a far jump at CODE + 1
DESCRIPTORS: dict[str, tuple[Action | After, Ends]] = {
    "a call gate": (After(descriptor(6, call_gate(HERE)), raw("nop", far("9a", 0x30))), Fault(13, 0x30)),
    "a 16-bit call gate": (After(descriptor(6, call_gate(HERE, 0xE4)), raw("nop", far("9a", 0x30))), Fault(13, 0x30)),
    "a call gate in the ldt": (
        After(descriptor(2, call_gate(HERE), base=LDT, name="WriteLDTEntry"), raw("nop", far("9a", 0x14))),
        Fault(13, 0x14),
    ),
    "a jump to the tss": (raw("nop", far("ea", TASK)), Fault(13, TASK)),
    "a jump through a task gate": (
        After(descriptor(6, struct.pack("<HHHH", 0, TASK, 0xE500, 0)), raw("nop", far("ea", 0x30))),
        Fault(13, 0x30),
    ),
    "a task gate for an interrupt": (
        After(
            lambda guest: (
                idt_entry(0x21, struct.pack("<HHHH", 0, TASK, 0xE500, 0))(guest)
                if guest.personality.name != "lguest"
                else guest.run("nop")
            ),
            lambda guest: (
                text("int 0x21")(guest)
                if guest.personality.name != "lguest"
                else idt_entry(0x21, struct.pack("<HHHH", 0, TASK, 0xE500, 0))(guest)
            ),
        ),
        # Xen's traps have an address, and 0 ends their list; lguest kills the guest.
        {"": Fault(13), "xen": Fault(0x21), "lguest": Stopped("bad-descriptor")},
    ),
    "a code segment of ring 0": (
        After(descriptor(6, segment(0x9B)), raw("nop", far("ea", 0x30, HERE), "mov eax, cs")),
        Harmless((("eax", 0x31), ("cpl", 1))),
    ),
    "a conforming code segment of ring 0": (
        After(descriptor(6, segment(0x9F)), raw("nop", far("ea", 0x30, HERE), "mov eax, cs")),
        Harmless((("eax", 0x31), ("cpl", 1))),
    ),
    "a segment that was never used": (
        After(descriptor(6, segment(0xF2)), text("mov eax, 0x33; mov fs, eax")),
        Harmless((("cpl", 1),)),
    ),
    "code that was never used": (
        After(descriptor(6, segment(0x9A)), raw("nop", far("ea", 0x30, HERE), "mov eax, cs")),
        Harmless((("eax", 0x31), ("cpl", 1))),
    ),
    "a stack segment with RPL 0": (
        After(descriptor(6, segment(0x93)), text("mov eax, 0x30; mov ss, eax")),
        Fault(13, 0x30),
    ),
    "an interrupt gate to ring 0": (
        After(idt_entry(0x21, gate(BASE + HANDLERS + 16 * 0x21)), text("int 0x21")),
        Fault(0x21),
    ),
    "an interrupt gate into the hole": (After(idt_entry(0x21, gate(HOLE)), text("int 0x21")), Fault(13, 0)),
    "an interrupt gate to no segment": (
        After(idt_entry(0x21, gate(BASE + HANDLERS, selector=0)), text("int 0x21")),
        Fault(13),
    ),
    "an interrupt gate to a data segment": (
        After(idt_entry(0x21, gate(BASE + HANDLERS, selector=KERNEL_DS)), text("int 0x21")),
        Fault(13),
    ),
    "an interrupt gate to user code": (
        After(idt_entry(0x21, gate(USER_AT, selector=0x73)), text("int 0x21")),
        Fault(13),
    ),
    "a gdt with nothing in it": (
        After(table(BASE + GDT, 7, call("SetGDT", eax=OPERAND)), text(f"mov eax, {KERNEL_DS}; mov ds, eax")),
        Dead("triple fault"),
    ),
    "an idt with nothing in it": (
        After(table(BASE + IDT, 7, call("SetIDT", eax=OPERAND)), text("ud2")),
        # lguest is told of entries, never that there are fewer: the old ones stay.
        {"": Dead("triple fault"), "lguest": Fault(6)},
    ),
}


@ALL
@pytest.mark.parametrize("name", DESCRIPTORS)
def test_forged_descriptors(hypervisor: str, name: str) -> None:
    judge(hypervisor, *DESCRIPTORS[name])


# --- ways to ring 0 ---------------------------------------------------------------------


def wrmsr(index: int, value: int, high: int = 0) -> Action:
    return raw(f"mov ecx, {index:#x}; mov eax, {value:#x}; mov edx, {high:#x}", "0f30")


def iret_stub(*words: int) -> Action:
    """A jump to the ROM's IRET with these words on the stack, the first on top."""
    pushes = "; ".join(f"push {word:#x}" for word in reversed(words))
    return lambda guest: guest.run(f"{pushes}; mov eax, {guest.stub('IRET'):#x}; jmp eax", limit=2000)


TARGET = BASE + DATA
RETURNS: dict[str, tuple[Action | After, Ends]] = {
    "iret": (text(f"push 2; push {KERNEL_CS}; push {TARGET:#x}; iretd"), RING0),
    "iret with the virtual-8086 flag": (text(f"push 0x20002; push {KERNEL_CS}; push {TARGET:#x}; iretd"), RING0),
    "the rom's iret": (iret_stub(TARGET, KERNEL_CS, 2), RING0),
    "the gate's iret": (
        lambda guest: with_memory(
            DATA, frame(guest, IRET)[:36] + struct.pack("<3I", TARGET, KERNEL_CS, 2), gate_frame(BASE + DATA)
        )(guest),
        RING0,
    ),
    "far return": (raw(f"push {KERNEL_CS}; push {TARGET:#x}", "cb"), RING0),
    "far return with arguments": (raw(f"push 0; push {KERNEL_CS}; push {TARGET:#x}", "ca0400"), RING0),
    "iret as a task switch": (
        text("pushfd; or dword ptr [esp], 0x4000; popfd; push 2; push 0x61; push 0xC0040000; iretd"),
        Fault(10),
    ),
    "iret to no segment": (text(f"push 2; push 0x31; push {TARGET:#x}; iretd"), Fault(13, 0x30)),
    "sysexit to the kernel's segment": (
        After(wrmsr(0x174, KERNEL_CS - 16), raw(f"mov edx, {TARGET:#x}; mov ecx, esp", "0f35")),
        Fault(13, 0),
    ),
    "sysexit without a segment": (After(wrmsr(0x174, 0), raw("nop", "0f35")), Fault(13, 0)),
    "sysenter": (
        After(
            then(wrmsr(0x174, KERNEL_CS), wrmsr(0x175, BASE + DATA + 0x800), wrmsr(0x176, HERE)),
            raw("nop", "0f34", "nop; nop; nop; nop; nop; mov eax, cs"),
        ),
        Harmless((("eax", KERNEL_CS | 1), ("cpl", 1))),
    ),
    "IOPL by popf": (
        text("pushfd; or dword ptr [esp], 0x3000; popfd; pushfd; pop eax; and eax, 0x3000"),
        Harmless((("eax", 0), ("cpl", 1))),
    ),
    "virtual-8086 mode by popf": (
        text("pushfd; or dword ptr [esp], 0x20000; popfd; pushfd; pop eax; and eax, 0x20000"),
        Harmless((("eax", 0), ("cpl", 1))),
    ),
    "protection off": (text("mov eax, cr0; and eax, 0xFFFFFFFE; mov cr0, eax"), Stopped("paging-off")),
    "paging off": (text("mov eax, cr0; and eax, 0x7FFFFFFF; mov cr0, eax"), Stopped("paging-off")),
    "paging off by the rom": (call("SetCR0", eax=0x11), Stopped("paging-off")),
    "pae on": (text("mov eax, cr4; or eax, 0x20; mov cr4, eax"), Stopped("paging-off")),
    "a bit of cr4 that there is not": (text("mov eax, cr4; or eax, 0x80000000; mov cr4, eax"), Fault(13, 0)),
    "long mode": (wrmsr(0xC0000080, 0x100), Fault(13, 0)),
    "an msr that there is not": (wrmsr(0x12345678, 1), Fault(13, 0)),
    "general detect": (
        text("mov eax, 0x2400; mov dr7, eax; mov eax, dr7; and eax, 0x2000"),
        Harmless((("eax", 0), ("cpl", 1))),
    ),
}


@ALL
@pytest.mark.parametrize("name", RETURNS)
def test_ways_to_ring_0(hypervisor: str, name: str) -> None:
    judge(hypervisor, *RETURNS[name])


# --- calls that there are not, and callers that may not -----------------------------------

UNKNOWN: Ends = {
    "vmware": Harmless((("eax", -1),)),
    "kvm": Harmless((("eax", -1000),)),  # KVM_ENOSYS
    "xen": Harmless((("eax", -38),)),  # ENOSYS
    "lguest": BAD_CALL,  # kill_guest("Bad hypercall")
    "l4ka": BAD_CALL,
}
EXITS = {
    "vmware": code("in eax, dx"),
    "kvm": b"\x0f\x01\xc1",
    "xen": b"\xcd\x82",
    "lguest": b"\xcd\x1f",
    "l4ka": b"\xcd\x30",
}


def user_exit(guest: PagedGuest, behind: str = "nop") -> Outcome:
    """The hypervisor's own exit with the gate's number, by a user."""
    name = guest.personality.name
    setup = "mov eax, 0x564D5868; mov ecx, 0x564D; mov edx, 0x5658; " if name == "vmware" else "mov eax, 0x564D; "
    return from_user(code(setup + f"mov ebx, {BASE + DATA:#x}") + EXITS[name] + code(behind))(guest)


CALLERS: dict[str, tuple[Action | After, Ends]] = {
    "an unknown number": (lambda guest: exit_to(guest, 0x1234), UNKNOWN),
    "a negative number": (
        lambda guest: exit_to(guest, 0xFFFF8000 if guest.personality.name != "vmware" else 0x8000),
        UNKNOWN,
    ),
    "one past the last call": (through_gate(CALLS), BAD_CALL),
    "no call of the gate": (through_gate(0xFFFF), BAD_CALL),
    "a huge number": (through_gate(0xFFFFFFFF), BAD_CALL),
    "init once more": (
        text(f"mov eax, 0x696D5663; mov edx, 0x564D; mov ebx, {BASE + 0xC0000:#x}; in eax, dx"),
        Harmless((("eax", 0xFFFFFFFF), ("cpl", 1))),
    ),
    "a user's call": (
        user_exit,
        {
            "vmware": Fault(13, 0),
            "kvm": Fault(6),
            "xen": Fault(13, 0x82 * 8 + 2),
            "lguest": Fault(13, 0x1F * 8 + 2),
            "l4ka": Fault(13, 0x30 * 8 + 2),
        },
    ),
    "a user's call with IOPL 3": (
        After(
            call("SetIOPLMask", eax=0x3000),
            lambda guest: (
                user_exit(guest)
                if guest.personality.name != "vmware"
                else from_user("mov eax, 0x564D5868; mov ecx, 0x564D; mov edx, 0x5658; in eax, dx; mov esi, eax; ud2")(
                    guest
                )
            ),
        ),
        {
            "vmware": Fault(6),
            "kvm": Fault(6),
            "xen": Fault(13, 0x82 * 8 + 2),
            "lguest": Fault(13, 0x1F * 8 + 2),
            "l4ka": Fault(13, 0x30 * 8 + 2),
        },
    ),
    "a user in the rom": (
        lambda guest: from_user(f"mov eax, {guest.stub('DisableInterrupts'):#x}; jmp eax")(guest),
        Fault(14),
    ),
    "a user with the kernel's segments": (from_user(f"mov eax, {KERNEL_DS | 1}; mov ds, eax"), Fault(13, KERNEL_DS)),
    "a user's far call to the kernel": (from_user(bytes.fromhex(far("9a", KERNEL_CS, HERE))), Fault(13, KERNEL_CS)),
    "another hypervisor's call": (
        lambda guest: guest.run(EXITS["xen" if guest.personality.name != "xen" else "l4ka"], limit=50, eax=0x564D),
        {"": Fault(0x82), "xen": Fault(0x30)},
    ),
    "vmcall elsewhere": (
        lambda guest: guest.run(EXITS["kvm"], limit=50, eax=0x1234),
        {"": Fault(6), "kvm": Harmless((("eax", -1000),))},
    ),
}


@ALL
@pytest.mark.parametrize("name", CALLERS)
def test_calls_that_there_are_not(hypervisor: str, name: str) -> None:
    judge(hypervisor, *CALLERS[name])


# --- the init call ------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    ("what", "offset", "size", "value"),
    [
        ("a field past the state page", None, 2, 0x2000),
        ("a field across the end of the state page", None, 2, 0xFF0),
        ("a field of another name", None, 6, 0),
        ("no such abi", 0x30, 2, 0x200),
        ("a table past the image", 0x2A, 2, 0xFFFF),
        ("another virtual_top in the header", 0x10, 4, 0xF8000000),
        ("an image that is longer than what is mapped", 0x02, 1, 0xFF),
    ],
)
def test_forged_roms(hypervisor: str, what: str, offset: int | None, size: int, value: int) -> None:
    """The init call looks at a ROM that the guest has made: nothing happens, and the guest is told so."""
    guest = PagedGuest(hypervisor)
    forged = bytearray(guest.rom.data)
    if offset is None:
        offset = forged.index(b"\x04maps") - 4  # u16 offset, u16 size, u8 length, name
    forged[offset : offset + size] = value.to_bytes(size, "little")
    at = MAPPED - len(forged) if "mapped" in what else FREE
    guest.memory.write(at, bytes(forged))
    before = owned(guest)
    outcome = guest.run("in eax, dx", eax=0x696D5663, edx=0x564D, ebx=BASE + at)
    assert outcome.reason == "breakpoint", (outcome, guest.personality.violation)
    assert guest.cpu.get("eax") not in (0, 0xFFFFFFFF), what
    assert guest.cpu.get("cpl") == 0
    assert owned(guest) == before
