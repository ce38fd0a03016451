"""Guests with three-level page tables under every hypervisor: what a PAE kernel does with them, by the ROM's calls."""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    CODE,
    DATA,
    DEPRIVILEGED,
    DIRECTORY,
    HANDLERS,
    PDPT,
    TABLES,
    USER_AT,
    USER_CODE,
    PagedGuest,
    code,
)
from rulebreaking import FREE, WINDOW, from_user

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
PT, PD, PDP = 1, 2, 4  # page types of API 3.0; 0x10 says PAE


def started(hypervisor: str, *, interrupts: bool = False) -> PagedGuest:
    guest = PagedGuest(hypervisor, pae=True)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    return guest


def set_long(guest: PagedGuest, physical: int, value: int, flags: int = PT) -> None:
    low, high = value & 0xFFFFFFFF, value >> 32
    outcome = guest.call("SetPxELong", flags, eax=low, edx=high, ecx=BASE + physical)
    assert outcome.reason == "breakpoint", guest.personality.violation


def place(linear: int) -> int:
    return TABLES + (linear - BASE >> 12) * 8


def load(guest: PagedGuest, linear: int) -> bytes:
    guest.run(f"mov eax, dword ptr [{linear:#x}]", limit=30)
    return guest.cpu.get("eax").to_bytes(4, "little")


@ALL
def test_an_entry_in_two_halves(hypervisor: str) -> None:
    """As a kernel writes one by itself: high half, then low, and the call that says so."""
    guest = started(hypervisor)
    guest.memory.write(FREE, b"here")
    at = BASE + place(WINDOW)
    guest.run(f"mov dword ptr [{at:#x}], 0; mov dword ptr [{at + 4:#x}], 0; mov dword ptr [{at:#x}], {FREE | 3:#x}")
    assert guest.call("UpdatePxELong", eax=at, edx=WINDOW | 0x10 | PT).reason == "breakpoint"
    guest.call("InvalPage", eax=WINDOW)
    assert load(guest, WINDOW) == b"here"
    assert guest.memory.read(place(WINDOW), 8) == struct.pack("<Q", FREE | 0x23), "marked as accessed"


@ALL
def test_large_pages_of_two_megabytes(hypervisor: str) -> None:
    guest = started(hypervisor)
    slot = DIRECTORY + 3 * 4096 + (0xD0000000 >> 21) % 512 * 8
    set_long(guest, slot, 0x200000 | 0x83, PD)
    guest.memory.write(FREE, b"here")
    assert load(guest, 0xD0000000 + FREE - 0x200000) == b"here"


@ALL
def test_a_new_directory_by_its_pointer(hypervisor: str) -> None:
    """The pointers count when CR3 is loaded, as on the processor (SDM 3A, PAE paging)."""
    guest = started(hypervisor)
    directory, table = FREE, FREE + 0x1000
    guest.call("AllocatePage", 0, 0, eax=directory >> 12, edx=PD | 0x10, ecx=0)
    guest.call("AllocatePage", 0, 0, eax=table >> 12, edx=PT | 0x10, ecx=0)
    set_long(guest, table, DATA | 7)
    set_long(guest, directory, table | 7, PD)
    set_long(guest, PDPT + 8, directory | 1, PDP)
    guest.memory.write(DATA, b"here")
    guest.call("SetCR3", eax=PDPT)
    assert load(guest, 0x40000000) == b"here"
    # And away again.
    set_long(guest, PDPT + 8, DIRECTORY + 4096 | 1, PDP)
    guest.call("SetCR3", eax=PDPT)
    for page, kind in ((table, PT), (directory, PD)):
        guest.call("ReleasePage", eax=page >> 12, edx=kind)
    guest.memory.write(HANDLERS + 16 * 14, b"\xeb\xfe")
    load(guest, 0x40000000)
    guest.call("GetCR2")
    assert guest.cpu.get("eax") == 0x40000000
    assert guest.personality.violation is None


@ALL
def test_users_and_their_faults(hypervisor: str) -> None:
    guest = started(hypervisor, interrupts=True)
    guest.memory.write(HANDLERS + 16 * 14, b"\xeb\xfe")
    from_user("mov esi, 77; call next; next: mov eax, ss; mov ds, eax; mov dword ptr [0x08049000], 1")(guest)
    assert guest.cpu.get("esi") == 77
    error, eip = struct.unpack("<II", guest.cpu.read_linear(guest.cpu.get("esp"), 8) or b"")
    assert (error, guest.cpu.get("cpl")) == (6, 1), "a user's write to a page that is not there"
    assert eip < USER_AT + 0x40


@ALL
def test_a_page_is_copied_on_write(hypervisor: str) -> None:
    """Fork-like: a page read-only for users, the fault's handler gives them a copy, and the write is done again."""
    guest = started(hypervisor, interrupts=True)
    entry = guest.user_table + (USER_AT >> 12) % 512 * 8
    set_long(guest, entry, USER_CODE | 5)
    guest.call("InvalPage", eax=USER_AT)
    copy = FREE
    stub, inval = guest.stub("SetPxELong"), guest.stub("InvalPage")
    handler = code(
        "mov esi, ds; mov ebp, es; mov eax, ss; mov ds, eax; mov es, eax; "
        f"push {PT}; mov eax, {copy | 7:#x}; xor edx, edx; mov ecx, {BASE + entry:#x}; mov ebx, {stub:#x}; call ebx; "
        f"pop eax; mov eax, {USER_AT:#x}; mov ebx, {inval:#x}; call ebx; mov es, ebp; mov ds, esi; add esp, 4; "
        f"mov ebx, {guest.stub('IRET'):#x}; jmp ebx"
    )
    guest.memory.write(HANDLERS + 16 * 14, b"\xe9" + struct.pack("<i", DATA - HANDLERS - 16 * 14 - 5))
    guest.memory.write(DATA, handler)
    user = code(f"mov eax, ss; mov ds, eax; mov dword ptr [{USER_AT + 0x100:#x}], 0x55; mov edi, 1; jmp .")
    guest.memory.write(copy, user)
    from_user(user)(guest)
    cpu = guest.cpu
    assert (cpu.get("cpl"), cpu.get("edi")) == (3, 1)
    assert (guest.word(copy + 0x100), guest.word(USER_CODE + 0x100)) == (0x55, 0)
    assert guest.personality.violation is None


@ALL
def test_many_address_spaces(hypervisor: str) -> None:
    """More pointers and directories than the hypervisor keeps copies of."""
    guest = started(hypervisor)
    low = guest.memory.read(DIRECTORY, 4096)
    pointers = guest.memory.read(PDPT, 32)
    first = 0x400000
    for n in range(150):
        directory, table, root = (first + (3 * n + k) * 4096 for k in range(3))
        guest.memory.write(table, bytes(4096))
        guest.memory.write(table + (USER_AT >> 12) % 512 * 8, struct.pack("<Q", 0x600000 + n * 4096 | 7))
        guest.memory.write(directory, low)
        guest.memory.write(directory + (USER_AT >> 21) * 8, struct.pack("<Q", table | 7))
        guest.memory.write(root, struct.pack("<Q", directory | 1) + pointers[8:])
        guest.memory.write(0x600000 + n * 4096, struct.pack("<I", n))
    for n in (*range(150), 3, 149, 0):
        assert guest.call("SetCR3", eax=first + (3 * n + 2) * 4096).reason == "breakpoint"
        assert load(guest, USER_AT) == struct.pack("<I", n)
    assert guest.personality.violation is None
    assert guest.run("nop", at=CODE).reason == "breakpoint"
