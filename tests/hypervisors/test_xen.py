"""Xen's hypercalls, one by one, by their published numbers and structures (xen/include/public), at INT 0x82.

Numbers and layouts are written here from the public headers; tests/real/test_headers.py compiles those.
"""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    CODE,
    DATA,
    DIRECTORY,
    GDT,
    HANDLERS,
    IDT,
    KERNEL_CS,
    KERNEL_DS,
    LDT,
    LOCAL,
    MAPPED,
    PDPT,
    STACK_TOP,
    TABLES,
    USER_AT,
    USER_CODE,
    USER_CS,
    USER_DS,
    USER_STACK_AT,
    PagedGuest,
    code,
    segment,
)
from rulebreaking import FREE, HOLE, HOST, STATE, WINDOW, from_user

BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
SELF = 0x7FF0  # DOMID_SELF
EPERM, EFAULT, EINVAL, ENOSYS = 1, 14, 22, 38
UNMAPPED = 0x10000000
ARRAY, COUNT = DATA, DATA + 0x800  # physical places of arguments and of "how many were done"


def started(*, pae: bool = False, interrupts: bool = False) -> PagedGuest:
    guest = PagedGuest("xen", pae=pae)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    assert guest.init() == 0
    return guest


def hypercall(guest: PagedGuest, number: int, *arguments: int) -> int:
    """EAX as a signed number."""
    names = ("ebx", "ecx", "edx", "esi")
    registers = dict(zip(names, arguments, strict=False))
    outcome = guest.run(b"\xcd\x82", eax=number, **registers)
    assert outcome.reason == "breakpoint", (outcome, guest.personality.violation)
    value = guest.cpu.get("eax")
    return value - (1 << 32) if value >> 31 else value


def mmuext(guest: PagedGuest, *operations: tuple[int, int, int]) -> int:
    guest.memory.write(ARRAY, b"".join(struct.pack("<III", *operation) for operation in operations))
    return hypercall(guest, 26, BASE + ARRAY, len(operations), BASE + COUNT, SELF)


def mmu_update(guest: PagedGuest, *updates: tuple[int, int]) -> int:
    guest.memory.write(ARRAY, b"".join(struct.pack("<QQ", *update) for update in updates))
    return hypercall(guest, 1, BASE + ARRAY, len(updates), BASE + COUNT, SELF)


def place(guest: PagedGuest, linear: int) -> int:
    return TABLES + (linear - BASE >> 12) * (8 if guest.pae else 4)


def traps(guest: PagedGuest, *entries: tuple[int, int, int, int]) -> int:
    """set_trap_table: vector, flags, cs, address of each, then the empty one."""
    table = b"".join(struct.pack("<BBHI", *entry) for entry in entries) + bytes(8)
    guest.memory.write(ARRAY, table)
    return hypercall(guest, 0, BASE + ARRAY)


def answer_irq0(guest: PagedGuest) -> None:
    """The 8259A answers IRQ 0 with vector 0x20; the line is low."""
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        guest.machine.bus.port_write(port, 1, value)
    guest.machine.board.set_irq(0, False)


# --- traps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 4])
def test_the_trap_table(flags: int) -> None:
    guest = started(interrupts=True)
    handler = BASE + FREE + 1
    guest.memory.write(FREE + 1, b"\xeb\xfe")
    assert traps(guest, (6, flags, 0x61, handler)) == 0
    guest.run("ud2", limit=5)
    assert guest.cpu.get("eip") == handler
    # Flag 4 masks events on entry.
    assert guest.personality.virtual_if is (flags == 0)
    assert guest.memory.read(IDT + 8 * 6, 8) != struct.pack("<HHHH", handler & 0xFFFF, 0x61, 0, handler >> 16)


def test_a_selector_of_ring_0_becomes_one_of_ring_1() -> None:
    guest = started()
    guest.memory.write(FREE, b"\xeb\xfe")
    assert traps(guest, (6, 0, KERNEL_CS, BASE + FREE)) == 0
    guest.run("ud2", limit=5)
    assert (guest.cpu.get("eip"), guest.cpu.get("cs")) == (BASE + FREE, KERNEL_CS | 1)


@pytest.mark.parametrize(("flags", "vector"), [(3, 0x40), (1, 13), (0, 13)])
def test_the_privilege_level_says_who_may_enter(flags: int, vector: int) -> None:
    guest = started(interrupts=True)
    guest.memory.write(FREE, b"\xeb\xfe")
    assert traps(guest, (0x40, flags, 0x61, BASE + FREE)) == 0
    from_user("int 0x40")(guest)
    assert guest.cpu.get("eip") == BASE + FREE if vector == 0x40 else guest.word(STACK_TOP - 28) == 13


def test_the_empty_entry_ends_the_table() -> None:
    guest = started()
    before = list(guest.personality.tables.gates)
    entries = ((6, 0, 0x61, BASE + FREE), (5, 0, 0x61, BASE + FREE), (0, 0, 0, 0), (7, 0, 0x61, BASE + FREE))
    assert traps(guest, *entries) == 0
    after = guest.personality.tables.gates
    assert [n for n in range(256) if after[n] != before[n]] == [5, 6]


def test_an_empty_table_forgets_all() -> None:
    guest = started()
    assert hypercall(guest, 0, 0) == 0
    assert guest.run("ud2", limit=20).reason == "triple fault"


def test_trap_tables_that_are_not_there() -> None:
    guest = started()
    assert hypercall(guest, 0, UNMAPPED) == -EFAULT
    assert guest.run(b"\xcd\x82", eax=0, ebx=HOLE).reason == "violation"


# --- page tables ------------------------------------------------------------------------------


@BOTH
def test_mmu_update(pae: bool) -> None:
    guest = started(pae=pae)
    guest.memory.write(FREE, b"one.")
    guest.memory.write(FREE + 0x1000, b"two.")
    updates = ((place(guest, WINDOW), FREE | 3), (place(guest, WINDOW + 0x1000), FREE + 0x1000 | 3))
    assert mmu_update(guest, *updates) == 0
    assert guest.word(COUNT) == 2
    hypercall(guest, 26, 0, 0, 0, SELF)
    assert mmuext(guest, (6, 0, 0)) == 0
    guest.run(f"mov eax, dword ptr [{WINDOW:#x}]; mov ecx, dword ptr [{WINDOW + 0x1000:#x}]")
    seen = [guest.cpu.get(name).to_bytes(4, "little") for name in ("eax", "ecx")]
    assert seen == [b"one.", b"two."]
    assert guest.personality.hypercalls["mmu_update"] == 1


@BOTH
def test_mmu_update_of_a_directory(pae: bool) -> None:
    guest = started(pae=pae)
    size, reach = (8, 21) if pae else (4, 22)
    linear = 0xD0000000
    slot = DIRECTORY + (3 * 4096 if pae else 0) + (linear >> reach) % (4096 // size) * size
    guest.memory.write(FREE, (DATA | 3).to_bytes(size, "little"))
    assert mmu_update(guest, (slot, FREE | 3)) == 0
    guest.memory.write(DATA + 0x400, b"here")
    guest.run(f"mov eax, dword ptr [{linear + 0x400:#x}]")
    assert guest.cpu.get("eax").to_bytes(4, "little") == b"here"


def test_no_execution_and_high_halves_are_kept() -> None:
    guest = started(pae=True)
    value = 1 << 63 | FREE | 3
    assert mmu_update(guest, (place(guest, WINDOW), value)) == 0
    assert guest.memory.read(place(guest, WINDOW), 8) == value.to_bytes(8, "little")


def test_two_level_entries_are_the_low_half() -> None:
    guest = started()
    assert mmu_update(guest, (place(guest, WINDOW), 0x1234567800000000 | FREE | 3)) == 0
    assert guest.word(place(guest, WINDOW)) == FREE | 3
    assert guest.word(place(guest, WINDOW) + 4) == WINDOW - BASE + 0x1000 | 3


@BOTH
@pytest.mark.parametrize(
    ("pointer", "error"),
    [
        (0x40000000, EINVAL),  # no memory
        (1 << 40, EINVAL),
        (FREE | 1, ENOSYS),  # MMU_MACHPHYS_UPDATE: guest frames are machine frames here
        (FREE | 3, ENOSYS),
    ],
)
def test_mmu_update_stops_at_what_it_cannot_do(pae: bool, pointer: int, error: int) -> None:
    guest = started(pae=pae)
    assert mmu_update(guest, (place(guest, WINDOW), FREE | 3), (pointer, 3), (place(guest, WINDOW), 0)) == -error
    assert guest.word(COUNT) == 1
    assert guest.word(place(guest, WINDOW)) == FREE | 3


def test_wrong_arguments_of_updates() -> None:
    guest = started()
    for number in (1, 26):
        assert hypercall(guest, number, UNMAPPED, 1, 0, SELF) == -EFAULT
        assert hypercall(guest, number, BASE + ARRAY, 1, 0, 0) == -EPERM
        assert hypercall(guest, number, BASE + ARRAY, 1, 0, 0x7FF1) == -EPERM
        assert hypercall(guest, number, BASE + ARRAY, 0x7FFFFFFF, 0, SELF) == -EINVAL
        assert hypercall(guest, number, BASE + ARRAY, 0, UNMAPPED, SELF) == -EFAULT
        assert hypercall(guest, number, 0, 0, 0, SELF) == 0


@BOTH
def test_pinned_tables_are_guarded_until_they_are_unpinned(pae: bool) -> None:
    forged = f"mov dword ptr [{BASE + FREE:#x}], {HOST | 3:#x}"
    guest = started(pae=pae)
    assert mmuext(guest, (0, FREE >> 12, 0), (4, FREE >> 12, 0)) == 0
    assert guest.word(COUNT) == 2
    assert guest.run(forged).reason == "breakpoint"
    guest = started(pae=pae)
    assert mmuext(guest, (0, FREE >> 12, 0)) == 0
    assert guest.run(forged).reason == "violation"
    for command in (0, 1, 2, 4):
        guest = started(pae=pae)
        assert mmuext(guest, (command, 0x40000, 0)) == -EINVAL, "no memory"
        guest.memory.write(ARRAY, struct.pack("<III", command, HOST >> 12, 0))
        outcome = guest.run(b"\xcd\x82", eax=26, ebx=BASE + ARRAY, ecx=1, edx=0, esi=SELF)
        assert outcome.reason == "violation"


@BOTH
def test_a_new_base_pointer(pae: bool) -> None:
    guest = started(pae=pae)
    size, reach = (8, 21) if pae else (4, 22)
    low, table, other = FREE, FREE + 0x1000, FREE + 0x2000
    guest.memory.write(low, guest.memory.read(DIRECTORY, 4096))
    guest.memory.write(low + (USER_AT >> reach) * size, (table | 7).to_bytes(size, "little"))
    guest.memory.write(table + (USER_AT >> 12) % (4096 // size) * size, (DATA | 7).to_bytes(size, "little"))
    root = low
    if pae:
        guest.memory.write(other, guest.memory.read(PDPT, 32))
        guest.memory.write(other, struct.pack("<Q", low | 1))
        root = other
    assert mmuext(guest, (5, root >> 12, 0)) == 0
    guest.memory.write(DATA, b"mine")
    guest.run(f"mov eax, dword ptr [{USER_AT:#x}]")
    assert guest.cpu.get("eax").to_bytes(4, "little") == b"mine"
    assert mmuext(guest, (5, 0x40000, 0)) == -EINVAL


def test_pointers_of_pae_need_no_page_of_their_own() -> None:
    """CR3 has 32-byte steps with PAE: SetCR3 keeps them, though the hypercall names a page."""
    guest = started(pae=True)
    guest.memory.write(FREE + 0x20, guest.memory.read(PDPT, 32))
    guest.memory.write(FREE, bytes(32))
    assert guest.call("SetCR3", eax=FREE + 0x20).reason == "breakpoint"
    guest.call("GetCR3")
    assert guest.cpu.get("eax") == FREE + 0x20


def test_translations_are_forgotten() -> None:
    for forget in ((6, 0, 0), (7, WINDOW, 0)):
        guest = started()
        guest.run(f"mov eax, dword ptr [{WINDOW:#x}]")
        guest.memory.write(FREE, b"new.")
        assert mmu_update(guest, (place(guest, WINDOW), FREE | 3)) == 0
        assert mmuext(guest, forget, (12, 0, 0)) == 0
        guest.run(f"mov eax, dword ptr [{WINDOW:#x}]")
        assert guest.cpu.get("eax").to_bytes(4, "little") == b"new."


def test_extended_operations_that_there_are_not() -> None:
    guest = started()
    assert mmuext(guest, (6, 0, 0), (99, 0, 0)) == -ENOSYS
    assert guest.word(COUNT) == 1


# --- descriptors ----------------------------------------------------------------------------


def test_update_descriptor() -> None:
    guest = started()
    low, high = struct.unpack("<II", segment(0xF3, base=0x1234000))
    assert hypercall(guest, 10, GDT + 0x30, 0, low, high) == 0
    assert guest.memory.read(GDT + 0x30, 8) == struct.pack("<II", low, high)
    guest.run("mov eax, 0x33; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x1234000
    # The LDT in force follows too.
    assert hypercall(guest, 10, LDT + 8, 0, low, high) == 0
    guest.run("mov eax, 0x0F; mov gs, eax")
    assert guest.cpu.get("gs_base") == 0x1234000
    assert hypercall(guest, 10, GDT + 0x31, 0, low, high) == -EINVAL
    assert hypercall(guest, 10, 0x40000000, 0, low, high) == -EINVAL
    assert hypercall(guest, 10, GDT, 1, low, high) == -EINVAL
    assert guest.run(b"\xcd\x82", eax=10, ebx=HOST, ecx=0).reason == "violation"


def test_set_gdt() -> None:
    guest = started()
    guest.memory.write(FREE, guest.memory.read(GDT, 0x100))
    guest.memory.write(FREE + 0x30, segment(0xF3, base=0x55000))
    # The state page's field, which the ROM's stub writes first, says where the frames are in linear memory.
    guest.memory.write(DATA, struct.pack("<HI", 0xFF, BASE + FREE))
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    assert guest.call("SetGDT", eax=BASE + DATA).reason == "breakpoint"
    assert guest.personality.hypercalls["set_gdt"] == 1
    guest.run("mov eax, 0x33; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x55000
    assert guest.personality.view()["gdtr_base"] == BASE + FREE
    guest.memory.write(DATA, struct.pack("<I", FREE >> 12))
    assert hypercall(guest, 2, BASE + DATA, 0x20) == 0
    guest.memory.write(DATA, struct.pack("<I", GDT >> 12))
    assert hypercall(guest, 2, BASE + DATA, 0x20) == -EINVAL, "frames that are not the ones of the field"
    guest.memory.write(DATA, struct.pack("<I", 0x40000))
    assert hypercall(guest, 2, BASE + DATA, 0x20) == -EINVAL
    assert hypercall(guest, 2, UNMAPPED, 0x20) == -EFAULT
    # FIRST_RESERVED_GDT_ENTRY is 14 * 512.
    assert hypercall(guest, 2, BASE + DATA, 7169) == -EINVAL


def test_a_gdt_of_several_pages() -> None:
    guest = started()
    table = bytearray(0x2000)
    table[:0x100] = guest.memory.read(GDT, 0x100)
    table[0x1100:0x1108] = segment(0xF3, base=0x66000)
    guest.memory.write(FREE, bytes(table))
    # What the ROM's stub writes before the call.
    guest.personality.state.put_table("gdt", BASE + FREE, 0x1107)
    frames = (FREE >> 12, (FREE >> 12) + 1)
    guest.memory.write(DATA, struct.pack("<II", *reversed(frames)))
    assert hypercall(guest, 2, BASE + DATA, 0x221) == -EINVAL
    guest.memory.write(DATA, struct.pack("<II", *frames))
    assert hypercall(guest, 2, BASE + DATA, 0x220) == -EINVAL
    assert hypercall(guest, 2, BASE + DATA, 0x221) == 0
    guest.run("mov eax, 0x1103; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x66000
    guest.memory.write(DATA, struct.pack("<II", FREE >> 12, HOST >> 12))
    outcome = guest.run(b"\xcd\x82", eax=2, ebx=BASE + DATA, ecx=0x221)
    assert outcome.reason == "violation"


def test_set_ldt() -> None:
    guest = started()
    guest.memory.write(FREE, bytes(8) + segment(0xF3, base=0x77000) * 3)
    guest.memory.write(GDT + LOCAL, segment(0x82, base=BASE + FREE, limit=0x1F, flags=0))
    assert guest.call("SetLDT", eax=LOCAL).reason == "breakpoint"
    guest.run("mov eax, 0x0F; mov gs, eax")
    assert guest.cpu.get("gs_base") == 0x77000
    assert mmuext(guest, (13, 0, 0)) == 0
    guest.run("xor eax, eax; mov gs, eax; mov eax, 0x0F; mov gs, eax", limit=20)
    assert guest.word(STACK_TOP - 20) == 13
    assert mmuext(started(), (13, BASE + FREE, 8193)) == -EINVAL


# --- registers ------------------------------------------------------------------------------


def test_stack_switch() -> None:
    guest = started(interrupts=True)
    assert hypercall(guest, 3, KERNEL_DS, BASE + STACK_TOP - 0x800) == 0
    guest.memory.write(HANDLERS + 16 * 0x80, b"\xeb\xfe")
    from_user("int 0x80")(guest)
    assert guest.cpu.get("ss") == KERNEL_DS | 1
    assert guest.cpu.get("esp") == BASE + STACK_TOP - 0x800 - 20


def test_fpu_taskswitch() -> None:
    guest = started()
    assert hypercall(guest, 5, 1) == 0
    guest.call("GetCR0")
    assert guest.cpu.get("eax") & 8
    guest.run("fld1", limit=20)
    assert guest.word(STACK_TOP - 16) == 7  # device not available
    guest = started()
    hypercall(guest, 5, 1)
    assert hypercall(guest, 5, 0) == 0
    assert guest.run("fninit; fld1").reason == "breakpoint"


def test_debug_registers() -> None:
    guest = started()
    for number, value in ((0, 0x08048000), (3, BASE), (7, 0x401), (6, 0xFFFF0FF0)):
        assert hypercall(guest, 8, number, value) == 0
        assert hypercall(guest, 9, number) & 0xFFFFFFFF == value
    for number in (4, 5, 8, 0xFFFFFFFF):
        assert hypercall(guest, 8, number, 0) == -EINVAL
        assert hypercall(guest, 9, number) == -EINVAL
    assert hypercall(guest, 8, 1, HOLE) == -EPERM


def test_xen_version() -> None:
    guest = started()
    assert hypercall(guest, 17, 0, 0) == 3 << 16
    assert hypercall(guest, 17, 99, 0) == -ENOSYS


def test_numbers_that_there_are_not() -> None:
    guest = started()
    for number in (4, 6, 11, 39, 1000, 0xFFFFFFFF):
        assert hypercall(guest, number) == -ENOSYS


# --- iret -------------------------------------------------------------------------------------


def to_frame(guest: PagedGuest, *words: int) -> None:
    pushes = "; ".join(f"push {word:#x}" for word in reversed(words))
    guest.run(code(pushes) + b"\xcd\x82", limit=200, eax=23)


@pytest.mark.parametrize("flags", [0x202, 2, 0x3202])
def test_iret_to_a_user(flags: int) -> None:
    guest = started()
    guest.memory.write(USER_CODE, b"\x90\xeb\xfe")
    to_frame(guest, 0x1234, USER_AT, USER_CS, flags, USER_STACK_AT, USER_DS)
    cpu = guest.cpu
    assert (cpu.get("eax"), cpu.get("cs"), cpu.get("ss"), cpu.get("esp")) == (0x1234, USER_CS, USER_DS, USER_STACK_AT)
    assert cpu.get("cpl") == 3
    # The mask is the frame's IF; the real flags are not the guest's.
    assert guest.memory.read(guest.personality.state.physical + 1, 1)[0] == (0 if flags & 0x200 else 1)
    assert cpu.eflags & 0x3200 == 0x200


def test_iret_within_the_kernel() -> None:
    guest = started()
    guest.memory.write(FREE, b"\xeb\xfe")
    before = guest.cpu.get("esp")
    to_frame(guest, 7, BASE + FREE, 0x61, 0x246)
    cpu = guest.cpu
    assert (cpu.get("eax"), cpu.get("eip"), cpu.get("esp"), cpu.get("cpl")) == (7, BASE + FREE, before, 1)
    assert guest.personality.virtual_if
    assert cpu.eflags & 0x44 == 0x44


def test_iret_takes_no_more_than_its_frame() -> None:
    guest = started()
    guest.memory.write(FREE, b"\xeb\xfe")
    guest.cpu.set("esp", BASE + MAPPED)
    to_frame(guest, 7, BASE + FREE, 0x61, 0x202)
    assert guest.personality.violation is None
    assert (guest.cpu.get("eip"), guest.cpu.get("esp")) == (BASE + FREE, BASE + MAPPED)


def test_iret_to_virtual_8086_mode() -> None:
    guest = started()
    # Real-mode addresses need a mapping of low memory for users: the first page table, at linear 0.
    assert mmu_update(guest, (DIRECTORY, guest.user_table | 7)) == 0
    table = guest.user_table
    assert mmu_update(guest, (table + 0x50 * 4, DATA | 7), (table + 0x51 * 4, FREE | 7)) == 0
    guest.memory.write(DATA, b"\xeb\xfe")
    to_frame(guest, 5, 0, 0x5000, 0x23202, 0x800, 0x5100, 0x1111, 0x2222, 0x3333, 0x4444)
    cpu = guest.cpu
    assert (cpu.mode, cpu.get("cpl"), cpu.get("eax")) == ("v86", 3, 5)
    selectors = [cpu.get(name) for name in ("cs", "ss", "es", "ds", "fs", "gs")]
    assert selectors == [0x5000, 0x5100, 0x1111, 0x2222, 0x3333, 0x4444]
    assert (cpu.get("eip"), cpu.get("esp"), cpu.get("cs_base")) == (0, 0x800, 0x50000)
    assert guest.personality.virtual_if
    assert cpu.eflags & 0x3000 == 0
    assert guest.personality.calls["IRET"] == 1


def test_iret_delivers_what_waits() -> None:
    guest = started()
    answer_irq0(guest)
    guest.memory.write(HANDLERS + 16 * 0x20, b"\xeb\xfe")
    guest.machine.board.set_irq(0, True)
    state = guest.personality.state.physical
    guest.run("nop")
    assert guest.memory.read(state, 2) == b"\1\1", "pending, and masked"
    to_frame(guest, 0, BASE + FREE, 0x61, 0x202)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * 0x20
    assert guest.memory.read(state, 2) == b"\0\1"


@pytest.mark.parametrize("selector", [0x6B, 0x33, 0x63, 0x1003])
def test_a_users_frame_that_iret_faults_on(selector: int) -> None:
    """docs/abis.md: the fault comes as from where the frame would have led."""
    guest = started()
    to_frame(guest, 7, USER_AT, selector, 2, USER_STACK_AT, USER_DS)
    # Handler's number, error code, and the frame, on the kernel's stack.
    top = struct.unpack("<7I", guest.cpu.read_linear(BASE + STACK_TOP - 28, 28) or b"")
    assert top == (13, selector & 0xFFFC, USER_AT, selector, 2, USER_STACK_AT, USER_DS)
    assert guest.cpu.get("esp") == BASE + STACK_TOP - 28
    assert (guest.cpu.get("cpl"), guest.cpu.get("eax")) == (1, 7)


@pytest.mark.parametrize("selector", [0x32])
def test_a_frame_that_iret_faults_on(selector: int) -> None:
    guest = started()
    before = guest.cpu.get("esp")
    to_frame(guest, 7, USER_AT, selector, 2, USER_STACK_AT, USER_DS)
    # Handler's number, error code, EIP, CS, EFLAGS; under them the frame, whose EAX is gone.
    top = struct.unpack("<6I", guest.cpu.read_linear(guest.cpu.get("esp"), 24) or b"")
    assert top[:2] == (13, selector & 0xFFFC)
    assert top[5] == USER_AT
    assert guest.cpu.get("esp") == before - 20 - 20
    assert guest.cpu.get("eax") == 7


# --- scheduling, ports, CPUID -----------------------------------------------------------------


def test_yield_and_block() -> None:
    guest = started()
    assert hypercall(guest, 29, 0, 0) == 0
    assert not guest.personality.virtual_if
    answer_irq0(guest)
    guest.memory.write(HANDLERS + 16 * 0x20, code("inc ecx; add esp, 12; jmp esi"))
    timer = guest.machine.clock.timer("test", lambda: guest.machine.board.set_irq(0, True))
    timer.arm(guest.machine.clock.now + 1_000_000)
    before = guest.machine.clock.now
    guest.run(b"\xcd\x82", eax=29, ebx=1, ecx=0, esi=BASE + CODE + 2)
    assert guest.cpu.get("ecx") == 1
    assert guest.cpu.get("eax") == 0
    assert guest.machine.clock.now >= before + 1_000_000


@pytest.mark.parametrize(("reason", "end"), [(0, "poweroff"), (1, "reset")])
def test_shutdown(reason: int, end: str) -> None:
    guest = started()
    guest.memory.write(DATA, struct.pack("<I", reason))
    assert guest.run(b"\xcd\x82", eax=29, ebx=2, ecx=BASE + DATA).reason == end
    assert hypercall(started(), 29, 2, UNMAPPED) == -EFAULT
    assert hypercall(started(), 29, 77, 0) == -ENOSYS


def test_set_iopl() -> None:
    guest = started(interrupts=True)
    guest.memory.write(DATA, struct.pack("<I", 3))
    assert hypercall(guest, 33, 6, BASE + DATA) == 0
    from_user("mov edx, 0x80; mov eax, 0x5A; out dx, al; jmp .")(guest)
    assert guest.cpu.get("cpl") == 3
    guest = started(interrupts=True)
    from_user("mov edx, 0x80; mov eax, 0x5A; out dx, al; jmp .")(guest)
    assert guest.word(STACK_TOP - 28) == 13
    guest = started()
    guest.memory.write(DATA, struct.pack("<I", 4))
    assert hypercall(guest, 33, 6, BASE + DATA) == -EINVAL
    assert hypercall(guest, 33, 6, UNMAPPED) == -EFAULT
    assert hypercall(guest, 33, 5, BASE + DATA) == -ENOSYS


def test_cpuid_with_xens_prefix() -> None:
    for ring in (1, 3):
        guest = started(interrupts=True)
        # mov eax, 1; cpuid; mov edi, edx; mov eax, 1; the prefix; cpuid; jmp $
        text = bytes.fromhex("b801000000 0fa2 89d7 31d2 b801000000 0f0b78656e0fa2 ebfe".replace(" ", ""))
        if ring == 3:
            from_user(text)(guest)
        else:
            guest.run(text, limit=20)
        assert guest.cpu.get("edx") == guest.cpu.get("edi") != 0
        assert guest.cpu.get("cpl") == ring
    guest = started()
    guest.run(bytes.fromhex("0f0b78656e0fa3"), limit=20)  # not CPUID behind it: an undefined instruction
    assert guest.word(STACK_TOP - 16) == 6


# --- shared_info --------------------------------------------------------------------------------


def test_shared_info() -> None:
    guest = started(interrupts=True)
    page = guest.cpu.read_linear(STATE, 0xA00)
    assert page is not None
    assert page[:2] == b"\0\0", "nothing pending, nothing masked"
    assert page[0x880:0x900] == b"\xff" * 128, "event channels: all masked"
    version, seconds, nanoseconds = struct.unpack_from("<III", page, 0x900)
    assert version % 2 == 0
    assert (seconds, nanoseconds) == (int(guest.machine.options.date.timestamp()), 0)
    # vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift.
    version, _, stamp, then, multiplier, shift = struct.unpack_from("<IIQQIb", page, 32)
    assert version % 2 == 0
    guest.run(b"\x90" * 1000)
    ahead = guest.cpu.time_stamp() - stamp
    scaled = ahead << shift if shift >= 0 else ahead >> -shift
    assert abs(then + (scaled * multiplier >> 32) - guest.machine.clock.now) <= 10
