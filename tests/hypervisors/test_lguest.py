"""lguest's hypercalls, one by one, by their published numbers (Linux 2.6.32, asm/lguest_hcall.h), at INT 0x1F.

What each does is Linux 2.6.32's drivers/lguest; numbers and the offsets of struct lguest_data are written here from
its headers.
"""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    DATA,
    DIRECTORY,
    GDT,
    HANDLERS,
    IDT,
    KERNEL_CS,
    KERNEL_DS,
    PDPT,
    STACK_TOP,
    TABLES,
    USER_AT,
    PagedGuest,
    code,
    gate,
    segment,
)
from rulebreaking import FREE, HOLE, HOST, STATE, WINDOW, from_user

BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
FLUSH_ASYNC, SHUTDOWN, NEW_PGTABLE, FLUSH_TLB, LOAD_IDT_ENTRY, SET_STACK, TS, HALT = 0, 2, 4, 5, 6, 7, 8, 10
SET_PMD, SET_PTE, SET_PGD, LOAD_GDT_ENTRY, SEND_INTERRUPTS = 13, 14, 15, 18, 19
SET_CLOCKEVENT, LOAD_TLS = 9, 16
# struct lguest_data
IRQ_ENABLED, CR2, TIME, IRQ_PENDING, HCALL_STATUS, HCALLS, RESERVE_MEM, TSC_KHZ = 0, 8, 12, 20, 24, 88, 1368, 1372


def started(*, pae: bool = False, interrupts: bool = False) -> PagedGuest:
    guest = PagedGuest("lguest", pae=pae)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    assert guest.init() == 0
    return guest


def hypercall(guest: PagedGuest, number: int, *arguments: int) -> str:
    """Why the run ended; EAX must be as it was."""
    registers = dict(zip(("ebx", "ecx", "edx", "esi"), arguments, strict=False))
    outcome = guest.run(b"\xcd\x1f", eax=number, **registers)
    if outcome.reason == "breakpoint":
        assert guest.cpu.get("eax") == number
    return outcome.reason


def killed(guest: PagedGuest, *call: int) -> str:
    """The rule that the guest was killed by."""
    assert hypercall(guest, *call) == "violation"
    assert guest.personality.violation is not None
    return guest.personality.violation.rule


def field(guest: PagedGuest, offset: int) -> int:
    raw = guest.cpu.read_linear(STATE + offset, 4)
    assert raw is not None
    return int.from_bytes(raw, "little")


def words(raw: bytes) -> tuple[int, int]:
    low, high = struct.unpack("<II", raw)
    return low, high


def place(guest: PagedGuest, linear: int) -> int:
    return TABLES + (linear - BASE >> 12) * (8 if guest.pae else 4)


def answer_irq0(guest: PagedGuest) -> None:
    """The 8259A answers IRQ 0 with vector 0x20; the line is low."""
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        guest.machine.bus.port_write(port, 1, value)
    guest.machine.board.set_irq(0, False)


# --- descriptors ------------------------------------------------------------------------------


def test_gdt_entries() -> None:
    guest = started()
    assert hypercall(guest, LOAD_GDT_ENTRY, 6, *words(segment(0xF3, base=0x1234000))) == "breakpoint"
    guest.run("mov eax, 0x33; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x1234000
    # Of ring 0 becomes of ring 1; a segment in use is loaded anew, as lguest does on its way back.
    low, high = words(segment(0x93, base=0x5000))
    assert hypercall(guest, LOAD_GDT_ENTRY, 6, low, high) == "breakpoint"
    assert guest.cpu.get("fs_base") == 0x5000
    assert killed(guest, LOAD_GDT_ENTRY, 8192, low, high) == "bad-call"


def test_tls() -> None:
    """Entries 6 to 8 of the GDT, from three descriptors in memory."""
    guest = started()
    guest.memory.write(DATA, b"".join(segment(0xF3, base=0x1000 * n) for n in (1, 2, 3)))
    assert hypercall(guest, LOAD_TLS, BASE + DATA) == "breakpoint"
    for n in (1, 2, 3):
        guest.run(f"mov eax, {(5 + n) * 8 + 3}; mov gs, eax")
        assert guest.cpu.get("gs_base") == 0x1000 * n
    assert killed(started(), LOAD_TLS, HOLE) == "bad-pointer"
    assert killed(started(), LOAD_TLS, 0x10000000) == "bad-pointer"


def test_the_clock() -> None:
    guest = started()
    answer_irq0(guest)
    guest.memory.write(HANDLERS + 16 * 0x20, code("inc dword ptr [0xC0050000]; add esp, 12; jmp esi"))
    before = guest.machine.clock.now
    assert hypercall(guest, SET_CLOCKEVENT, 3_000_000) == "breakpoint"
    guest.run(b"\xcd\x1f", eax=HALT, esi=BASE + 0x40002)
    assert guest.word(DATA) == 1
    assert before + 3_000_000 <= guest.machine.clock.now < before + 3_100_000
    hypercall(guest, SET_CLOCKEVENT, 3_000_000)
    hypercall(guest, SET_CLOCKEVENT, 0)
    assert guest.run(b"\xcd\x1f", eax=HALT).reason == "asleep"


def test_idt_entries() -> None:
    guest = started(interrupts=True)
    guest.memory.write(FREE, b"\xeb\xfe")
    assert hypercall(guest, LOAD_IDT_ENTRY, 6, *words(gate(BASE + FREE))) == "breakpoint"
    guest.run("ud2", limit=5)
    assert guest.cpu.get("eip") == BASE + FREE
    assert not guest.personality.virtual_if


def test_entries_that_are_the_hosts_own() -> None:
    """NMI, double fault, 15 and the hypercall's own vector are silently not taken."""
    guest = started()
    for vector in (2, 8, 15, 0x1F):
        before = guest.personality.tables.gates[vector]
        assert hypercall(guest, LOAD_IDT_ENTRY, vector, *words(gate(BASE + FREE))) == "breakpoint"
        assert guest.personality.tables.gates[vector] == before
    assert hypercall(guest, LOAD_IDT_ENTRY, 2, 0, 0x8500) == "breakpoint"


def test_entries_that_kill() -> None:
    assert killed(started(), LOAD_IDT_ENTRY, 256, *words(gate(BASE))) == "bad-call"
    assert killed(started(), LOAD_IDT_ENTRY, 0x40, *words(gate(BASE, 0x85))) == "bad-descriptor"
    assert killed(started(), LOAD_IDT_ENTRY, 0x40, *words(gate(BASE, 0xEC))) == "bad-descriptor"
    # Not present: only forgotten.
    guest = started()
    assert hypercall(guest, LOAD_IDT_ENTRY, 6, 0, 0) == "breakpoint"
    assert guest.run("ud2", limit=20).reason == "halt"
    assert guest.word(STACK_TOP - 20) in (11, 13)


def test_the_roms_tables_arrive_whole() -> None:
    guest = started(interrupts=True)
    table = guest.memory.read(IDT, 0x800)
    guest.memory.write(FREE, table[: 8 * 6] + gate(BASE + FREE + 0x900) + table[8 * 7 :])
    guest.memory.write(FREE + 0x900, b"\xeb\xfe")
    guest.memory.write(DATA, struct.pack("<HI", 0x7FF, BASE + FREE))
    assert guest.call("SetIDT", eax=BASE + DATA).reason == "breakpoint"
    assert guest.personality.hypercalls["LOAD_IDT_ENTRY"] == 256
    guest.run("ud2", limit=5)
    assert guest.cpu.get("eip") == BASE + FREE + 0x900
    guest = started()
    guest.memory.write(FREE, guest.memory.read(GDT, 0x100))
    guest.memory.write(FREE + 0x30, segment(0xF3, base=0x99000))
    guest.memory.write(DATA, struct.pack("<HI", 0xFF, BASE + FREE))
    assert guest.call("SetGDT", eax=BASE + DATA).reason == "breakpoint"
    guest.run("mov eax, 0x33; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x99000
    assert guest.personality.view()["gdtr_base"] == BASE + FREE


# --- the kernel's stack, TS, the end ------------------------------------------------------------


def test_set_stack() -> None:
    guest = started(interrupts=True)
    assert hypercall(guest, SET_STACK, KERNEL_DS | 1, BASE + STACK_TOP - 0x400, 2) == "breakpoint"
    guest.memory.write(HANDLERS + 16 * 0x80, b"\xeb\xfe")
    from_user("int 0x80")(guest)
    assert guest.cpu.get("esp") == BASE + STACK_TOP - 0x400 - 20
    for arguments in ((KERNEL_DS, BASE, 2), (0x7B, BASE, 2), (KERNEL_DS | 1, BASE, 3)):
        assert killed(started(), SET_STACK, *arguments) == "bad-call"
    assert killed(started(), SET_STACK, KERNEL_DS | 1, HOLE + 4, 2) == "bad-pointer"


def test_ts() -> None:
    guest = started()
    assert hypercall(guest, TS, 8) == "breakpoint"
    guest.run("fld1", limit=20)
    assert guest.word(STACK_TOP - 16) == 7
    guest = started()
    hypercall(guest, TS, 8)
    assert hypercall(guest, TS, 0) == "breakpoint"
    assert guest.run("fninit; fld1").reason == "breakpoint"


@pytest.mark.parametrize(("kind", "end"), [(1, "poweroff"), (2, "reset")])
def test_shutdown(kind: int, end: str) -> None:
    assert hypercall(started(), SHUTDOWN, 0, kind) == end


def test_halt_wakes_with_interrupts_on() -> None:
    guest = started()
    answer_irq0(guest)
    guest.memory.write(HANDLERS + 16 * 0x20, code("inc dword ptr [0xC0050000]; add esp, 12; jmp esi"))
    timer = guest.machine.clock.timer("test", lambda: guest.machine.board.set_irq(0, True))
    timer.arm(guest.machine.clock.now + 2_000_000)
    before = guest.machine.clock.now
    guest.run(b"\xcd\x1f", eax=HALT, esi=BASE + 0x40002)
    assert guest.word(DATA) == 1
    assert guest.machine.clock.now >= before + 2_000_000


# --- page tables --------------------------------------------------------------------------------


@BOTH
def test_new_pgtable(pae: bool) -> None:
    guest = started(pae=pae)
    size, reach = (8, 21) if pae else (4, 22)
    low, table, other = FREE, FREE + 0x1000, FREE + 0x2000
    guest.memory.write(low, guest.memory.read(DIRECTORY, 4096))
    guest.memory.write(low + (USER_AT >> reach) * size, (table | 7).to_bytes(size, "little"))
    guest.memory.write(table + (USER_AT >> 12) % (4096 // size) * size, (DATA | 7).to_bytes(size, "little"))
    root = low
    if pae:
        guest.memory.write(other + 0x40, guest.memory.read(PDPT, 32))
        guest.memory.write(other + 0x40, struct.pack("<Q", low | 1))
        root = other + 0x40
    assert hypercall(guest, NEW_PGTABLE, root) == "breakpoint"
    guest.memory.write(DATA, b"mine")
    guest.run(f"mov eax, dword ptr [{USER_AT:#x}]")
    assert guest.cpu.get("eax").to_bytes(4, "little") == b"mine"
    assert guest.personality.view()["cr3"] == root
    assert killed(started(pae=pae), NEW_PGTABLE, 0x40000000) == "forged-page-table"


@BOTH
def test_the_guest_writes_and_then_says_so(pae: bool) -> None:
    """SET_PTE with an address forgets that one, FLUSH_TLB all; before, the old translation may still serve."""
    for tell in ("pte", "flush", "invalidate"):
        guest = started(pae=pae)
        guest.run(f"mov eax, dword ptr [{WINDOW:#x}]")
        guest.memory.write(FREE, b"new.")
        guest.run(f"mov dword ptr [{BASE + place(guest, WINDOW):#x}], {FREE | 3:#x}")
        call = {
            "pte": (SET_PTE, guest.cr3, WINDOW, FREE | 3, 0),
            "flush": (FLUSH_TLB, 1),
            "invalidate": (SET_PTE, guest.cr3, WINDOW, 0),
        }[tell]
        assert hypercall(guest, *call) == "breakpoint"
        guest.run(f"mov eax, dword ptr [{WINDOW:#x}]")
        assert guest.cpu.get("eax").to_bytes(4, "little") == b"new."


@BOTH
def test_a_forged_entry_kills(pae: bool) -> None:
    assert killed(started(pae=pae), SET_PTE, 0x8000, WINDOW, HOST | 3, 0) == "forged-page-table"
    # A high half makes it another address, where there is nothing.
    if pae:
        assert hypercall(started(pae=True), SET_PTE, 0x8000, WINDOW, HOST | 3, 1) == "breakpoint"
    for number in (SET_PGD, SET_PMD):
        assert hypercall(started(pae=pae), number, DIRECTORY, 3) == "breakpoint"
        assert killed(started(pae=pae), number, 0x40000000, 3) == "forged-page-table"


# --- the ring and lguest_data -------------------------------------------------------------------


def leave(guest: PagedGuest, slot: int, number: int, *arguments: int) -> None:
    """Put a call into the asynchronous ring, as a lazy guest does: arguments, then status 0."""
    words = (number, *arguments, *([0] * (4 - len(arguments))))
    guest.cpu.write_linear(STATE + HCALLS + 20 * slot, struct.pack("<5I", *words))
    guest.cpu.write_linear(STATE + HCALL_STATUS + slot, b"\0")


def test_the_asynchronous_ring() -> None:
    guest = started()
    assert guest.cpu.read_linear(STATE + HCALL_STATUS, 64) == b"\xff" * 64
    leave(guest, 0, TS, 8)
    leave(guest, 1, LOAD_GDT_ENTRY, 6, *words(segment(0xF3, base=0x1000)))
    leave(guest, 2, LOAD_GDT_ENTRY, 6, *words(segment(0xF3, base=0x2000)))
    assert hypercall(guest, FLUSH_ASYNC) == "breakpoint"
    assert guest.cpu.read_linear(STATE + HCALL_STATUS, 64) == b"\xff" * 64
    guest.run("mov eax, 0x33; mov fs, eax")
    assert guest.cpu.get("fs_base") == 0x2000, "in the guest's order"
    guest.call("GetCR0")
    # Round the ring: the next slot is 3, and what is before it waits for its turn.
    leave(guest, 2, TS, 0)
    leave(guest, 4, TS, 0)
    hypercall(guest, SEND_INTERRUPTS)
    assert guest.cpu.read_linear(STATE + HCALL_STATUS + 2, 3) == b"\0\xff\0"
    for slot in range(3, 64):
        leave(guest, slot, FLUSH_TLB, 0)
    leave(guest, 0, FLUSH_TLB, 0)
    leave(guest, 1, FLUSH_TLB, 0)
    hypercall(guest, FLUSH_ASYNC)
    assert guest.cpu.read_linear(STATE + HCALL_STATUS, 64) == b"\xff" * 64
    leave(guest, 3, 9999)
    assert killed(guest, FLUSH_ASYNC) == "bad-call"


def test_lguest_data() -> None:
    guest = started(interrupts=True)
    assert field(guest, IRQ_ENABLED) == 0x200
    assert field(guest, IRQ_PENDING) == 0
    assert field(guest, RESERVE_MEM) == 0x100000000 - HOLE
    assert field(guest, TSC_KHZ) == 1_000_000 // guest.machine.clock.ns_per_instruction
    born = int(guest.machine.options.date.timestamp())
    assert field(guest, TIME) == born
    guest.machine.sleep_until(3_500_000_000)
    hypercall(guest, SEND_INTERRUPTS)
    assert field(guest, TIME) == born + 3
    assert 500_000_000 <= field(guest, TIME + 4) < 501_000_000
    guest.call("GetWallclockTime")
    now = guest.cpu.get("edx") << 32 | guest.cpu.get("eax")
    assert 0 <= now - (born * 1_000_000_000 + 3_500_000_000) < 1_000_000
    guest.memory.write(HANDLERS + 16 * 14, b"\xeb\xfe")
    guest.run("mov eax, dword ptr [0x7654321]", limit=5)
    assert field(guest, CR2) == 0x7654321


def test_pending_interrupts_come_with_any_hypercall() -> None:
    guest = started()
    answer_irq0(guest)
    guest.memory.write(HANDLERS + 16 * 0x20, b"\xeb\xfe")
    guest.machine.board.set_irq(0, True)
    guest.run("nop")
    assert field(guest, IRQ_PENDING) == 0x200
    guest.cpu.write_linear(STATE + IRQ_ENABLED, struct.pack("<I", 0x200))
    guest.run(b"\xcd\x1f", limit=5, eax=SEND_INTERRUPTS)
    assert guest.cpu.get("eip") == BASE + HANDLERS + 16 * 0x20
    assert (field(guest, IRQ_PENDING), field(guest, IRQ_ENABLED)) == (0, 0)


def test_numbers_that_kill() -> None:
    # 1 is LGUEST_INIT, which kills a second time; 17 is NOTIFY, which kills where there is no such device.
    for number in (1, 3, 11, 12, 17, 20, 0xFFFFFFFF):
        assert killed(started(), number) == "bad-call"


def test_the_kernels_own_segments_are_ring_1() -> None:
    guest = started()
    guest.run("mov eax, cs")
    assert guest.cpu.get("eax") == KERNEL_CS | 1
