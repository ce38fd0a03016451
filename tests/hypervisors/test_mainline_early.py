"""What Linux 2.6.21 to 2.6.24 with CONFIG_VMI does behind VMI_Init, one test a demand; each names the kernel's file
and function. On every deprivileging hypervisor, with two-level tables and with PAE where the two differ.

These kernels live in arch/i386 up to 2.6.23, and in arch/x86 with names that end in _32 from 2.6.24 on.
"""

from __future__ import annotations

import struct

import pytest
from mainlineguest import ALL, BOTH, FREE, GP, PD, PDP, PF, PT, called, ran, started
from pagedguest import (
    BASE,
    DATA,
    DIRECTORY,
    GDT,
    HANDLERS,
    IDT,
    LDT,
    PDPT,
    STACK_TOP,
    TASK,
    TSS,
    USER_AT,
    USER_CODE,
    USER_CS,
    USER_DS,
    USER_STACK_AT,
    PagedGuest,
    code,
    segment,
)

HOST = 0xF8000000  # a frame of the hypervisor's
FIXMAP = 0xFBFFE000  # below virtual_top
LARGE_AT = 0xC0800000  # a large page of the direct map, above what pagedguest maps


def set_entry(guest: PagedGuest, physical: int, value: int, flags: int = PT) -> None:
    """vmi_set_pte, vmi_set_pmd, vmi_set_pud: SetPxE or SetPxELong with the level in the flags."""
    if guest.pae:
        called(guest, "SetPxELong", flags, eax=value & 0xFFFFFFFF, edx=value >> 32, ecx=BASE + physical)
    else:
        called(guest, "SetPxE", eax=value, edx=BASE + physical, ecx=flags)


def slot(guest: PagedGuest, linear: int) -> int:
    """The physical address of the directory entry of a kernel address."""
    if guest.pae:
        return DIRECTORY + (linear >> 30) * 4096 + (linear >> 21 & 0x1FF) * 8
    return DIRECTORY + (linear >> 22) * 4


def load(guest: PagedGuest, linear: int) -> int:
    ran(guest, f"mov eax, dword ptr [{linear:#x}]", limit=200)
    return guest.cpu.get("eax")


def fixmap(guest: PagedGuest, table: int = FREE + 0x10000) -> int:
    """A page table for the fixmap; returns the physical address of the entry of FIXMAP."""
    size = 8 if guest.pae else 4
    guest.memory.write(table, bytes(4096))
    called(guest, "AllocatePage", 0, 0, eax=table >> 12, edx=PT, ecx=0)
    set_entry(guest, slot(guest, FIXMAP), table | 0x67, PD)
    return table + (FIXMAP >> 12) % (4096 // size) * size


# --- page tables ------------------------------------------------------------------------


@ALL
@BOTH
def test_a_page_becomes_a_table_before_it_is_filled(hypervisor: str, pae: bool) -> None:
    """2.6.21 to 2.6.24, mm/pageattr.c, split_large_page and set_pmd_pte (mark_rodata_ro at the end of a boot): a
    page of whatever was in it goes through AllocatePage, then its entries are set one by one, then it replaces a
    large page with the flags of a page table's entry."""
    guest = started(hypervisor, pae=pae)
    size = 8 if pae else 4
    reach = 0x200000 if pae else 0x400000
    set_entry(guest, slot(guest, LARGE_AT), 0x800000 | 0x1E3, PD)
    guest.memory.write(0x801000, b"here")
    assert load(guest, LARGE_AT + 0x1000) == int.from_bytes(b"here", "little")
    guest.memory.write(FREE, struct.pack("<I", HOST | 0x3003) * 1024)
    called(guest, "AllocatePage", 0, 0, eax=FREE >> 12, edx=PT, ecx=0)
    for n in range(reach >> 12):
        protection = 0x161 if n == 1 else 0x163
        set_entry(guest, FREE + n * size, 0x800000 + (n << 12) | protection)
    if pae:  # set_pte_atomic: set_64bit, and then UpdatePxELong
        at = BASE + slot(guest, LARGE_AT)
        ran(
            guest,
            f"mov eax, dword ptr [edi]; mov edx, dword ptr [edi + 4]; mov ebx, {FREE | 0x163}; xor ecx, ecx; "
            "again: lock cmpxchg8b qword ptr [edi]; jne again",
            edi=at,
        )
        called(guest, "UpdatePxELong", eax=at, edx=PT)
    else:
        set_entry(guest, slot(guest, LARGE_AT), FREE | 0x163, PT)
    called(guest, "FlushTLB", eax=3)
    assert load(guest, LARGE_AT + 0x1000) == int.from_bytes(b"here", "little")
    guest.memory.write(HANDLERS + 16 * PF, b"\xeb\xfe")
    guest.run(f"mov dword ptr [{LARGE_AT + 0x1000:#x}], 0", limit=100)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * PF, "the page is read-only now"
    assert guest.memory.read(0x801000, 4) == b"here"
    # revert_page, after ReleasePage: a large page again.
    called(guest, "ReleasePage", eax=FREE >> 12, edx=PT)
    if pae:
        ran(guest, f"mov dword ptr [{BASE + slot(guest, LARGE_AT):#x}], {0x800000 | 0x1E3}")
    else:
        set_entry(guest, slot(guest, LARGE_AT), 0x800000 | 0x1E3, PT)
    called(guest, "FlushTLB", eax=3)
    ran(guest, f"mov dword ptr [{LARGE_AT + 0x1000:#x}], 5")
    assert guest.word(0x801000) == 5


@ALL
def test_what_a_page_had_in_it_never_maps(hypervisor: str) -> None:
    """The other side of it: an entry that was in the page before AllocatePage is judged when the page is used."""
    guest = started(hypervisor)
    guest.memory.write(FREE, struct.pack("<I", HOST | 3) * 1024)
    called(guest, "AllocatePage", 0, 0, eax=FREE >> 12, edx=PT, ecx=0)
    assert guest.call("SetPxE", eax=FREE | 3, edx=BASE + slot(guest, 0xD0000000), ecx=PD).reason == "violation"
    assert guest.personality.violation is not None
    assert guest.personality.violation.rule == "forged-page-table"


@ALL
def test_a_flush_reads_the_pointers_again(hypervisor: str) -> None:
    """2.6.21, mm/init.c, zap_low_mappings of an SMP kernel with PAE: entries of the live page directory pointer
    table, then flush_tlb_all, which is a load of CR3 on the bare machine (asm-i386/tlbflush.h, __native_flush_tlb)
    and so loads the four pointers (SDM 3A, "PDPTE registers")."""
    guest = started(hypervisor, pae=True)
    zero = FREE
    guest.memory.write(zero, bytes(4096))
    guest.memory.write(USER_CODE, b"here")
    assert load(guest, USER_AT) == int.from_bytes(b"here", "little")
    for n in range(3):
        set_entry(guest, PDPT + 8 * n, zero | 1, PDP)
    called(guest, "FlushTLB", eax=3)
    guest.memory.write(HANDLERS + 16 * PF, b"\xeb\xfe")
    guest.run(f"mov eax, dword ptr [{USER_AT:#x}]", limit=100)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * PF


@ALL
@BOTH
def test_the_write_protect_bit_works(hypervisor: str, pae: bool) -> None:
    """2.6.21 to 2.6.24, mm/init.c, test_wp_bit: the page directory, read-only in the fixmap; a write there must
    fault, at ring 1 as at ring 0, with CR0.WP as head.S has set it."""
    guest = started(hypervisor, pae=pae)
    called(guest, "SetCR0", eax=0x80050033)
    set_entry(guest, fixmap(guest), DIRECTORY | 0x21)
    called(guest, "InvalPage", eax=FIXMAP)
    guest.memory.write(HANDLERS + 16 * PF, b"\xeb\xfe")
    guest.run(f"mov al, byte ptr [{FIXMAP:#x}]; mov byte ptr [{FIXMAP:#x}], al", limit=200)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * PF
    error = guest.cpu.read_linear(guest.cpu.get("esp"), 4)
    assert error == b"\3\0\0\0", "a write by the supervisor to a page that is there"
    called(guest, "GetCR2")
    assert guest.cpu.get("eax") == FIXMAP


@ALL
@BOTH
def test_tables_up_to_the_very_top(hypervisor: str, pae: bool) -> None:
    """2.6.21, mm/init.c, pagetable_init: page_table_range_init(fixmap, 0, pgd) gives every directory entry up to
    4 GiB a page table, the hypervisor's region included; the state page and the hole are where they were."""
    guest = started(hypervisor, pae=pae)
    step = 0x200000 if pae else 0x400000
    for n, linear in enumerate(range(FIXMAP & -step, 0x1_0000_0000, step)):
        table = FREE + n * 4096
        called(guest, "AllocatePage", 0, 0, eax=table >> 12, edx=PT, ecx=0)
        set_entry(guest, slot(guest, linear), table | 0x67, PD)
    size = 8 if pae else 4
    set_entry(guest, FREE + (FIXMAP >> 12) % (4096 // size) * size, DATA | 0x63)
    guest.memory.write(DATA, b"here")
    assert load(guest, FIXMAP) == int.from_bytes(b"here", "little")
    called(guest, "GetCR0")
    assert guest.cpu.get("eax") == 0x80010011
    called(guest, "FlushTLB", eax=3)
    called(guest, "SetCR3", eax=guest.cr3)
    assert load(guest, FIXMAP) == int.from_bytes(b"here", "little")


# --- descriptors and tasks --------------------------------------------------------------


@ALL
def test_a_task_gate_for_double_faults(hypervisor: str) -> None:
    """2.6.21 to 2.6.24, traps.c, set_task_gate(8, 31), by WriteIDTEntry and then by load_idt in cpu_init; the TSS
    behind it by WriteGDTEntry (cpu/common.c, cpu_init). No harm, and the other gates stand."""
    guest = started(hypervisor)
    called(guest, "WriteIDTEntry", 0x8500, eax=BASE + IDT, edx=8, ecx=0xF8 << 16)
    low, high = struct.unpack("<II", segment(0x89, base=BASE + TSS, limit=0x67, flags=0))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=31, ecx=low)
    guest.memory.write(DATA, struct.pack("<HI", 0x7FF, BASE + IDT))
    called(guest, "SetIDT", eax=BASE + DATA)
    assert guest.memory.read(IDT + 64, 8) == struct.pack("<II", 0xF8 << 16, 0x8500)
    guest.memory.write(HANDLERS + 16 * 6, b"\xeb\xfe")
    guest.run(b"\x0f\x0b", limit=100)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * 6


@ALL
def test_no_ldt_is_a_descriptor_all_the_same(hypervisor: str) -> None:
    """2.6.21, vmi.c, vmi_set_ldt with no entries (load_LDT of init_mm in cpu_init): a descriptor with limit
    0xFFFFF at NULL, and SetLDT(0)."""
    guest = started(hypervisor)
    called(guest, "WriteGDTEntry", 0x000F8200, eax=BASE + GDT, edx=17, ecx=0x0000FFFF)
    called(guest, "SetLDT", eax=0)
    assert guest.memory.read(GDT + 8 * 17, 8) == struct.pack("<II", 0xFFFF, 0xF8200)
    guest.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    guest.run("mov ecx, 0x0f; mov gs, ecx", limit=100)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * GP, "there is no LDT"


def to_user(guest: PagedGuest, text: str | bytes, flags: int = 0x202, limit: int = 500) -> None:
    guest.memory.write(USER_CODE, text if isinstance(text, bytes) else code(text))
    frame = f"push {USER_DS}; push {USER_STACK_AT}; push {flags}; push {USER_CS}; push {USER_AT}; "
    guest.run(frame + f"mov eax, {guest.stub('IRET')}; jmp eax", limit=limit)


@ALL
def test_a_port_bitmap_that_comes_late(hypervisor: str) -> None:
    """2.6.21, traps.c, do_general_protection, and process.c, __switch_to: the bitmap's offset is 0x9000, past the
    TSS, until a port faults; the handler then copies the bitmap, sets the offset to 104 and returns to the same
    instruction."""
    guest = PagedGuest(hypervisor)
    guest.cpu.set_segment("tr", 0, 0, 0, 0x8B)  # cpu_init comes long after VMI_Init
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x1000)
    task = FREE  # the TSS with its bitmap is three pages
    guest.memory.write(task, guest.memory.read(TSS, 102) + struct.pack("<H", 0x9000) + b"\xff" * 0x2001)
    low, high = struct.unpack("<II", segment(0x89, base=BASE + task, limit=0x2068, flags=0))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=TASK // 8, ecx=low)
    called(guest, "SetTR", eax=TASK)
    called(guest, "UpdateKernelStack", eax=0x68, edx=BASE + STACK_TOP)
    handler = code(
        f".byte 0x1e; mov esi, ss; mov ds, esi; inc dword ptr [{BASE + DATA:#x}]; "
        f"mov word ptr [{BASE + task + 102:#x}], 104; mov byte ptr [{BASE + task + 104 + (0x80 >> 3):#x}], 0xfe; "
        f".byte 0x1f; add esp, 4; mov ecx, {guest.stub('IRET')}; jmp ecx"
    )
    guest.memory.write(DATA + 0x100, handler)
    guest.memory.write(HANDLERS + 16 * GP, b"\xe9" + struct.pack("<i", DATA + 0x100 - HANDLERS - 16 * GP - 5))
    guest.memory.write(DATA, bytes(4))
    # The next port stays barred: for it the handler has nothing to give, and the fault comes again and again.
    to_user(guest, "mov al, 7; out 0x80, al; mov edi, 1; out 0x81, al; mov edi, 2; jmp .")
    assert guest.cpu.get("edi") == 1
    assert guest.word(DATA) > 5
    assert guest.personality.violation is None


# --- time -------------------------------------------------------------------------------

ONESHOT, PERIODIC, LVTT = 0, 0x100, 0x10000
LVT_TIMER, SPURIOUS, EOI = 0x320, 0xF0, 0xB0


def counting(guest: PagedGuest, vector: int, done: str) -> None:
    """A handler that counts in DATA, acknowledges and returns by the ROM's IRET."""
    text = (
        f"push eax; push edx; inc dword ptr ss:[{BASE + DATA:#x}]; {done}; pop edx; pop eax; "
        f"push {guest.stub('IRET')}; ret"
    )
    at = DATA + 0x200
    guest.memory.write(at, code(text))
    guest.memory.write(HANDLERS + 16 * vector, b"\xe9" + struct.pack("<i", at - HANDLERS - 16 * vector - 5))
    guest.memory.write(DATA, bytes(4))


@ALL
@pytest.mark.parametrize("vector", [0x20, 0x31])
def test_the_clock_moves_from_irq_0_to_the_apic(hypervisor: str, vector: int) -> None:
    """2.6.22, vmiclock.c: vmi_time_init stops the PIT with mode 5 and sets a periodic alarm on IRQ 0 whose expiry is
    "now" (vmi_timer_set_mode); vmi_time_bsp_init cancels it, writes LVTT with vmi_get_timer_vector, by APICWrite with
    the register's offset, and sets the same alarm wired to LVTT, where EOI alone ends an interrupt."""
    guest = started(hypervisor)
    bus = guest.machine.bus
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0xA1, 0xFF)):
        bus.port_write(port, 1, value)
    ran(guest, "mov al, 0x3a; out 0x43, al")
    counting(guest, 0x20, "mov al, 0x60; out 0x20, al")
    period = 20_000

    def alarm(flags: int) -> None:
        called(guest, "GetCycleCounter", eax=0)
        low, high = guest.cpu.get("eax"), guest.cpu.get("edx")
        called(guest, "SetAlarm", period, 0, eax=flags, edx=low, ecx=high)

    def wait(count: int) -> int:
        before = guest.word(DATA)
        text = f"again: push {guest.stub('Halt')}; pop eax; call eax; dec edi; jne again"
        ran(guest, text, limit=10_000, edi=count)
        called(guest, "DisableInterrupts")
        return guest.word(DATA) - before

    alarm(PERIODIC)
    assert wait(5) == 5
    called(guest, "CancelAlarm", eax=PERIODIC)
    assert guest.cpu.get("eax") == 1
    called(guest, "APICWrite", eax=SPURIOUS, edx=0x1FF)
    called(guest, "APICWrite", eax=LVT_TIMER, edx=vector)
    called(guest, "APICRead", eax=LVT_TIMER)
    assert guest.cpu.get("eax") == vector
    counting(
        guest,
        vector,
        f"xor edx, edx; mov eax, {EOI}; push ecx; push {guest.stub('APICWrite')}; pop ecx; call ecx; pop ecx",
    )
    ran(guest, "mov al, 0xff; out 0x21, al")
    if vector == 0x31:
        # Between setup_IO_APIC (io_apic.c, check_timer with no_timer_check) and vmi_time_bsp_init the alarm on IRQ 0
        # comes by the I/O APIC's input 2, with the same vector, and the handler's EOI is the local APIC's.
        for register, value in ((0x15, 0), (0x14, vector)):
            bus.memory_write(0xFEC00000, 4, register)
            bus.memory_write(0xFEC00010, 4, value)
        alarm(PERIODIC)
        assert wait(5) == 5
        called(guest, "CancelAlarm", eax=PERIODIC)
    alarm(PERIODIC | LVTT)
    assert wait(5) == 5
    called(guest, "CancelAlarm", eax=PERIODIC | LVTT)
    # One-shot, as NO_HZ sets it: vmi_timer_next_event.
    called(guest, "GetCycleCounter", eax=0)
    expiry = (guest.cpu.get("edx") << 32 | guest.cpu.get("eax")) + 1
    called(guest, "SetAlarm", 0, 0, eax=ONESHOT | LVTT, edx=expiry & 0xFFFFFFFF, ecx=expiry >> 32)
    assert wait(1) == 1
    called(guest, "CancelAlarm", eax=ONESHOT | LVTT)
    assert guest.cpu.get("eax") == 0


# --- returns that fault -----------------------------------------------------------------

NOT_PRESENT, STACK_NOT_PRESENT = 0x3B, 0x4B


@ALL
@pytest.mark.parametrize(
    ("cs", "ss", "vector", "error"),
    [
        (0x33, USER_DS, GP, 0x30),  # an empty descriptor: its type is wrong before it is not present
        (NOT_PRESENT, USER_DS, 11, 0x38),
        (USER_CS, STACK_NOT_PRESENT, 12, 0x48),
        (USER_CS, 3, GP, 0),
    ],
    ids=["no code", "code not present", "stack not present", "null stack"],
)
def test_a_return_to_segments_that_are_gone(hypervisor: str, cs: int, ss: int, vector: int, error: int) -> None:
    """2.6.21 to 2.6.24, entry.S: a bad frame (a signal handler's, or an LDT entry that is gone) makes INTERRUPT_RETURN
    fault, which __ex_table turns into SIGSEGV by way of iret_exc; patched, the faulting IRET is the ROM's, and
    fixup_exception (mm/extable.c) knows no such address: die. So it must come as a fault of the user's, for which
    do_general_protection and do_trap (traps.c) send the same signal."""
    guest = started(hypervisor, interrupts=True)
    for selector, access in ((0x38, 0x7B), (0x48, 0x73)):  # not present, otherwise good
        low, high = struct.unpack("<II", segment(access))
        called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=selector // 8, ecx=low)
    guest.memory.write(HANDLERS + 16 * vector, b"\xeb\xfe")
    frame = f"push {ss}; push {USER_STACK_AT}; push 0x202; push {cs}; push {USER_AT}; "
    top = BASE + STACK_TOP  # as in Linux, the frame ends at the kernel stack's top
    guest.run(f"mov esp, {top}; " + frame + f"mov eax, {guest.stub('IRET')}; jmp eax", limit=100)
    assert guest.personality.violation is None
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * vector
    assert guest.cpu.get("esp") == top - 24
    words = struct.unpack("<6I", guest.cpu.read_linear(top - 24, 24) or b"")
    assert words == (error, USER_AT, cs, 0x202, USER_STACK_AT, ss)
    assert not guest.personality.virtual_if, "the handler's gate is an interrupt gate"
    assert guest.cpu.get("cpl") == 1


@ALL
def test_the_kernels_own_return_faults_where_it_is(hypervisor: str) -> None:
    """Outside the ROM the kernel has an __ex_table entry for its IRET."""
    guest = started(hypervisor, interrupts=True)
    guest.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    frame = f"push {USER_DS}; push {USER_STACK_AT}; push 0x202; push 0x33; push {USER_AT}; "
    guest.run(frame + "iretd", limit=100)
    words = struct.unpack("<3I", guest.cpu.read_linear(guest.cpu.get("esp"), 12) or b"")
    assert words[0] == 0x30
    assert BASE + 0x40000 <= words[1] < BASE + 0x41000
    assert words[2] & 0xFFFC == 0x60


# --- thread-local storage ----------------------------------------------------------------

TLS = 6  # GDT_ENTRY_TLS_MIN


@ALL
def test_thread_local_storage_below_its_base(hypervisor: str) -> None:
    """2.6.21 to 2.6.24, process.c, sys_set_thread_area, and vmi.c, vmi_load_tls: glibc asks for a segment of 4 GiB
    (limit 0xFFFFF pages) at its thread's descriptor, and has errno and all __thread variables below it: offsets from
    the end of the segment that wrap round to linear addresses below the base (ELF TLS, variant II). A limit cut
    below the hole must not take that away; what reaches into the hole stays out of reach."""
    guest = started(hypervisor, interrupts=True)
    base = USER_AT + 0x800
    low, high = struct.unpack("<II", segment(0xF2, base=base))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=TLS, ecx=low)
    guest.memory.write(USER_CODE + 0x7F8, b"errnself")
    guest.memory.write(USER_CODE + 0x800, b"tcb.....")
    text = (
        b"\xb9\x33\0\0\0\x8e\xe9"  # mov ecx, 33h; mov gs, ecx
        b"\x65\xa1\xf8\xff\xff\xff"  # mov eax, gs:[-8]
        b"\x65\x8b\x1d\0\0\0\0"  # mov ebx, gs:[0]
        b"\xbe\xfc\xff\xff\xff\x65\x8b\x16"  # mov esi, -4; mov edx, gs:[esi]
        b"\x65\xc7\x06ERRN"  # mov dword ptr gs:[esi], "ERRN"
        b"\x65\xff\x35\x04\0\0\0\x5f"  # push dword ptr gs:[4]; pop edi
        b"\x65\x80\x04\x25\xf8\xff\xff\xff\x01"  # add byte ptr gs:[-8], 1
        b"\xeb\xfe"
    )
    to_user(guest, text)
    cpu = guest.cpu
    assert cpu.get("cpl") == 3
    assert cpu.linear_eip == USER_AT + len(text) - 2
    words = {name: cpu.get(name).to_bytes(4, "little") for name in ("eax", "ebx", "edx", "edi")}
    assert words == {"eax": b"errn", "ebx": b"tcb.", "edx": b"self", "edi": b"...."}
    assert guest.memory.read(USER_CODE + 0x7F8, 8) == b"frrnERRN"
    assert guest.personality.violation is None


@ALL
@pytest.mark.parametrize("offset", [0xFC001000 - USER_AT - 0x800, 0xFFFF_FFFF - USER_AT - 0x800])
def test_the_hole_is_not_reached_through_such_a_segment(hypervisor: str, offset: int) -> None:
    """Nor by user code, nor by a kernel that loads the same segment."""
    guest = started(hypervisor, interrupts=True)
    low, high = struct.unpack("<II", segment(0xF2, base=USER_AT + 0x800))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=TLS, ecx=low)
    guest.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    text = b"\xb9\x33\0\0\0\x8e\xe9\x65\xa1\xf8\xff\xff\xff\x65\xa1" + struct.pack("<I", offset)
    guest.run(text, limit=100)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * GP
    to = guest.cpu.read_linear(guest.cpu.get("esp"), 8)
    assert to is not None
    assert struct.unpack("<II", to)[0] == 0
    other = started(hypervisor, interrupts=True)
    called(other, "WriteGDTEntry", high, eax=BASE + GDT, edx=TLS, ecx=low)
    other.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    to_user(other, text)
    assert other.cpu.get("eip") == BASE + HANDLERS + 16 * GP


@ALL
def test_a_segment_that_ends_ends(hypervisor: str) -> None:
    """Only a limit of 4 GiB reaches round: one of the guest's own is kept to."""
    guest = started(hypervisor, interrupts=True)
    low, high = struct.unpack("<II", segment(0xF2, base=USER_AT + 0x800, limit=0xFFF, flags=4))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=TLS, ecx=low)
    guest.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    to_user(guest, b"\xb9\x33\0\0\0\x8e\xe9\x65\xa1\xf8\xff\xff\xff\xeb\xfe")
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * GP


@ALL
def test_segments_that_grow_down(hypervisor: str) -> None:
    """2.6.21 to 2.6.24, ldt.c, write_ldt with MODIFY_LDT_CONTENTS_STACK (contents 1): an expand-down segment, here of
    16 bits; one of 32 bits at 0 would reach into the hole and is not there."""
    guest = started(hypervisor, interrupts=True)
    for index, base, flags in ((2, USER_AT - 0x1000, 0), (3, 0, 4)):
        low, high = struct.unpack("<II", segment(0xF6, base=base, limit=0xFFF, flags=flags))
        called(guest, "WriteLDTEntry", high, eax=BASE + LDT, edx=index, ecx=low)
    load_17 = b"\xb9\x17\0\0\0\x8e\xe1"  # mov ecx, 17h; mov fs, ecx
    guest.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    text = load_17 + b"\x64\xa1\x00\x10\0\0\x64\x8b\x1d\xfc\x0f\0\0"  # mov eax, fs:[1000h]; mov ebx, fs:[0FFCh]
    to_user(guest, text)
    assert guest.cpu.get("eax") == int.from_bytes(text[:4], "little")
    eip = guest.cpu.read_linear(guest.cpu.get("esp") + 4, 4)
    assert (guest.cpu.get("eip"), eip) == (BASE + HANDLERS + 16 * GP, (USER_AT + 13).to_bytes(4, "little"))
    other = started(hypervisor, interrupts=True)
    called(other, "WriteLDTEntry", high, eax=BASE + LDT, edx=3, ecx=low)
    other.memory.write(HANDLERS + 16 * GP, b"\xeb\xfe")
    other.run("mov ecx, 0x1f; mov fs, ecx", limit=100)
    assert other.cpu.get("eip") == BASE + HANDLERS + 16 * GP


@ALL
def test_an_ldt_that_this_address_space_does_not_map_yet(hypervisor: str) -> None:
    """2.6.21 to 2.6.24, ldt.c, alloc_ldt: one of more than 512 entries is vmalloc's, whose page directory entries
    come to each address space by vmalloc_fault (mm/fault.c). switch_mm loads it all the same; the processor would
    fault when it is used, here the call that loads it does, and is made again."""
    guest = started(hypervisor, interrupts=True)
    linear = 0xF8800000
    guest.memory.write(FREE, bytes(4096))
    guest.memory.write(FREE + 0x1000, bytes(8) + segment(0xF2, base=0x77000))
    at = FREE + (linear >> 12) % 1024 * 4
    guest.memory.write(at, struct.pack("<II", FREE + 0x1000 | 3, FREE + 0x2000 | 3))
    low, high = struct.unpack("<II", segment(0x82, base=linear, limit=0x1FFF, flags=0))
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=0x88 // 8, ecx=low)
    handler = code(
        f"push eax; push ecx; push edx; inc dword ptr [{BASE + DATA:#x}]; mov eax, {FREE | 3}; "
        f"mov edx, {BASE + slot(guest, linear)}; mov ecx, {PD}; push {guest.stub('SetPxE')}; call dword ptr [esp]; "
        f"add esp, 4; pop edx; pop ecx; pop eax; add esp, 4; push {guest.stub('IRET')}; ret"
    )
    guest.memory.write(DATA, bytes(4))
    guest.memory.write(DATA + 0x400, handler)
    guest.memory.write(HANDLERS + 16 * PF, b"\xe9" + struct.pack("<i", DATA + 0x400 - HANDLERS - 16 * PF - 5))
    called(guest, "SetLDT", eax=0x88)
    assert guest.word(DATA) == 1
    called(guest, "GetCR2")
    assert guest.cpu.get("eax") == linear
    ran(guest, "mov eax, 0x0f; mov gs, eax")
    assert guest.cpu.get("gs_base") == 0x77000


# --- single steps -------------------------------------------------------------------------


@ALL
def test_a_single_step_over_sysenter_finds_the_kernels_stack(hypervisor: str) -> None:
    """2.6.21 to 2.6.24, entry.S: sysenter_entry's first instruction takes the kernel's stack from the TSS; a debug
    trap in front of it is on a stack of a few words, which FIX_STACK repairs only if the pushed CS is __KERNEL_CS
    itself, ring 0. At ring 1 the trap must not come before that instruction."""
    guest = started(hypervisor, interrupts=True)
    small, entry = BASE + TSS + 0x1000 - 8, BASE + HANDLERS + 16 * 0x90
    guest.memory.write(small - BASE + 4, struct.pack("<I", BASE + STACK_TOP - 0x200))
    for msr, value in ((0x174, 0x60), (0x175, small), (0x176, entry)):
        ran(guest, "wrmsr", ecx=msr, eax=value, edx=0)
    first = code("mov esp, dword ptr [esp + 4]")
    guest.memory.write(HANDLERS + 16 * 0x90, first + b"\x90\xeb\xfe")
    guest.memory.write(HANDLERS + 16, b"\xeb\xfe")
    to_user(guest, "sysenter", flags=0x302)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16
    assert guest.cpu.get("esp") == BASE + STACK_TOP - 0x200 - 12
    eip, cs, flags = struct.unpack("<3I", guest.cpu.read_linear(guest.cpu.get("esp"), 12) or b"")
    assert (eip, cs & 0xFFFC, flags & 0x100) == (entry + len(first), 0x60, 0x100)
    # do_debug (traps.c) asks DR6 whether it was a step.
    called(guest, "GetDR", eax=6)
    assert guest.cpu.get("eax") & 0x4000


# --- ports for users ----------------------------------------------------------------------


@ALL
@BOTH
@pytest.mark.parametrize(
    ("target", "error"),
    [(BASE + FREE, 7), (USER_STACK_AT - 4096, 7), (0x08100000, 6)],
    ids=["the kernel's", "read-only", "not there"],
)
def test_string_input_writes_where_the_user_may(hypervisor: str, pae: bool, target: int, error: int) -> None:
    """2.6.21 to 2.6.24, ioport.c, sys_iopl: a process with IOPL 3 uses INS as any store; a page that is shared until
    it is written to must fault, and the kernel's pages must not be reached."""
    guest = started(hypervisor, pae=pae, interrupts=True)
    called(guest, "SetIOPLMask", eax=0x3000)
    size = 8 if pae else 4
    entry = guest.user_table + ((USER_STACK_AT >> 12) - 1) % (4096 // size) * size
    physical = guest.word(entry) & 0xFFFFF000
    set_entry(guest, entry, physical | 5)
    called(guest, "FlushTLB", eax=3)
    guest.memory.write(HANDLERS + 16 * PF, b"\xeb\xfe")
    before = guest.memory.read(physical, 64), guest.memory.read(FREE, 64)
    # mov ecx, ss; mov es, ecx; mov edi, target; mov edx, 3FDh; insb
    text = b"\x8c\xd1\x8e\xc1\xbf" + struct.pack("<I", target) + b"\xba\xfd\x03\0\0\x6c\xeb\xfe"
    to_user(guest, text)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * PF
    assert guest.cpu.read_linear(guest.cpu.get("esp"), 8) == struct.pack("<II", error, USER_AT + 14)
    assert guest.personality.view()["cr2"] == target
    assert (guest.memory.read(physical, 64), guest.memory.read(FREE, 64)) == before
