"""Direct paging: what the guest writes into its page tables is what the processor walks, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from pagedguest import BASE, CODE, DATA, DEPRIVILEGED, DIRECTORY, PDPT, STACK_TOP, TABLES, PagedGuest

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
FREE = 0x300000  # physical pages that nothing uses
AT = BASE + 0x3F0000  # a page of the direct map that the tests map elsewhere
HOST = 0xF8000000


def started(hypervisor: str, pae: bool) -> PagedGuest:
    guest = PagedGuest(hypervisor, pae=pae)
    assert guest.init() == 0
    return guest


def place(guest: PagedGuest, linear: int) -> int:
    """The physical address of the page-table entry of an address in the direct map."""
    return TABLES + ((linear - BASE) >> 12) * (8 if guest.pae else 4)


def set_pxe(guest: PagedGuest, physical: int, value: int, flags: int = 1) -> str:
    if guest.pae:
        return guest.call("SetPxELong", flags, eax=value, edx=0, ecx=BASE + physical).reason
    return guest.call("SetPxE", eax=value, edx=BASE + physical, ecx=flags).reason


@ALL
@BOTH
def test_an_entry_set_by_a_call_maps(hypervisor: str, pae: bool) -> None:
    guest = started(hypervisor, pae)
    guest.memory.write(FREE, b"\x11\x22\x33\x44")
    assert set_pxe(guest, place(guest, AT), FREE | 3) == "breakpoint"
    assert guest.call("InvalPage", eax=AT).reason == "breakpoint"
    guest.run(f"mov eax, dword ptr [{AT:#x}]")
    assert guest.cpu.get("eax") == 0x44332211


@ALL
@BOTH
def test_an_entry_written_directly_maps(hypervisor: str, pae: bool) -> None:
    guest = started(hypervisor, pae)
    guest.memory.write(FREE, b"\x11\x22\x33\x44")
    guest.run(f"mov dword ptr [{BASE + place(guest, AT):#x}], {FREE | 3}")
    guest.call("FlushTLB", eax=3)
    guest.run(f"mov eax, dword ptr [{AT:#x}]")
    assert guest.cpu.get("eax") == 0x44332211
    # The processor marks entries where the guest looks for the marks.
    guest.run(f"mov dword ptr [{AT:#x}], 1")
    assert guest.word(place(guest, AT)) & 0x60 == 0x60


@ALL
@BOTH
def test_an_unmapped_page_is_gone_after_the_flush(hypervisor: str, pae: bool) -> None:
    guest = started(hypervisor, pae)
    guest.run(f"mov eax, dword ptr [{AT:#x}]")
    set_pxe(guest, place(guest, AT), 0)
    guest.call("InvalPage", eax=AT)
    guest.run(f"mov eax, dword ptr [{AT:#x}]", limit=20)
    assert guest.word(STACK_TOP - 20) == 14


@ALL
@BOTH
def test_a_new_address_space(hypervisor: str, pae: bool) -> None:
    """A second directory shares the kernel; the two see different user pages."""
    guest = started(hypervisor, pae)
    if pae:
        top, low, table = FREE, FREE + 0x1000, FREE + 0x2000
        guest.memory.write(top, guest.memory.read(PDPT, 32))
        guest.memory.write(top, struct.pack("<Q", low | 1))
        guest.memory.write(low, bytes(4096))
        guest.memory.write(low + (0x08048000 >> 21) * 8, struct.pack("<Q", table | 7))
        guest.memory.write(table + (0x48) * 8, struct.pack("<Q", 0x71000 | 7))
        other = top
    else:
        other, table = FREE, FREE + 0x1000
        guest.memory.write(other, guest.memory.read(DIRECTORY, 4096))
        guest.memory.write(other + (0x08048000 >> 22) * 4, struct.pack("<I", table | 7))
        guest.memory.write(table + 0x48 * 4, struct.pack("<I", 0x71000 | 7))
    for flags, page in ((1, table), (2, other)):
        assert guest.call("AllocatePage", 0, 0, eax=page >> 12, edx=flags, ecx=0).reason == "breakpoint"
    guest.memory.write(0x60000, b"one.")
    guest.memory.write(0x71000, b"two.")
    seen = []
    for root in (other, guest.cr3, other):
        assert guest.call("SetCR3", eax=root).reason == "breakpoint", guest.personality.violation
        guest.run("mov eax, dword ptr [0x08048000]")
        seen.append(guest.cpu.get("eax").to_bytes(4, "little"))
    assert seen == [b"two.", b"one.", b"two."]
    guest.call("SetCR3", eax=guest.cr3)
    for flags, page in ((1, table), (2, other)):
        guest.call("ReleasePage", eax=page >> 12, edx=flags)
    # Ordinary pages again: writing anything to them is nobody's business, and costs no exit where we were told.
    before = guest.personality.traps["guarded write"]
    guest.run(f"mov dword ptr [{BASE + table:#x}], {HOST | 3:#x}; mov dword ptr [{BASE + table + 8:#x}], 1")
    assert guest.personality.violation is None
    if hypervisor != "lguest":  # which has no such call
        assert guest.personality.traps["guarded write"] == before


@ALL
@BOTH
def test_a_table_hung_into_the_directory_is_guarded_from_then_on(hypervisor: str, pae: bool) -> None:
    guest = started(hypervisor, pae)
    each = 512 if pae else 1024
    linear = 0xD0000000
    index = (linear >> 12) // each
    slot = DIRECTORY + (3 * 4096 if pae else 0) + index % each * (8 if pae else 4)
    guest.memory.write(FREE, (DATA | 3).to_bytes(8 if pae else 4, "little"))
    assert set_pxe(guest, slot, FREE | 3, flags=2) == "breakpoint"
    guest.memory.write(DATA, b"here")
    guest.run(f"mov eax, dword ptr [{linear:#x}]")
    assert guest.cpu.get("eax") == int.from_bytes(b"here", "little")
    outcome = guest.run(f"mov dword ptr [{BASE + FREE:#x}], {HOST | 3:#x}")
    assert outcome.reason == "violation"
    assert guest.personality.violation is not None
    assert guest.personality.violation.rule == "forged-page-table"
    assert guest.word(FREE) == DATA | 0x23, "the entry is as it was, but for the processor's mark"


@ALL
@BOTH
def test_string_instructions_write_tables_too(hypervisor: str, pae: bool) -> None:
    """A REP STOS over a page table is let through once it is found harmless."""
    guest = started(hypervisor, pae)
    first = BASE + place(guest, BASE + 0x3E0000)
    guest.run("cld; rep stosd dword ptr es:[edi], eax", edi=first, eax=0, ecx=8 * (2 if pae else 1))
    assert guest.personality.violation is None
    assert guest.memory.read(first - BASE, 32) == bytes(32)
    guest.call("FlushTLB", eax=1)
    guest.run(f"mov eax, dword ptr [{BASE + 0x3E0000:#x}]", limit=20)
    assert guest.word(STACK_TOP - 20) == 14


@ALL
def test_large_pages(hypervisor: str) -> None:
    guest = started(hypervisor, False)
    linear = 0xD0000000
    set_pxe(guest, DIRECTORY + (linear >> 22) * 4, 0x83, flags=2)
    guest.memory.write(DATA, b"here")
    guest.run(f"mov eax, dword ptr [{linear + DATA:#x}]")
    assert guest.cpu.get("eax") == int.from_bytes(b"here", "little")


@ALL
@BOTH
def test_the_hole_is_never_the_guests(hypervisor: str, pae: bool) -> None:
    """What the guest's directory says of the hole does not count: the state page stays where it is."""
    guest = started(hypervisor, pae)
    slot = DIRECTORY + (3 * 4096 + (0xFC000000 >> 21) % 512 * 8 if pae else (0xFC000000 >> 22) * 4)
    set_pxe(guest, slot, FREE | 3, flags=2)
    guest.call("SetCR3", eax=guest.cr3)
    guest.call("GetCR0")
    assert guest.cpu.get("eax") == 0x80010011
    assert guest.run("nop", at=CODE).reason == "breakpoint"


@ALL
def test_many_address_spaces(hypervisor: str) -> None:
    """More directories than the hypervisor keeps copies of."""
    guest = started(hypervisor, False)
    kernel = guest.memory.read(DIRECTORY, 4096)
    for n in range(150):
        guest.memory.write(FREE + n * 4096, kernel)
        assert guest.call("SetCR3", eax=FREE + n * 4096).reason == "breakpoint"
    assert guest.call("SetCR3", eax=guest.cr3).reason == "breakpoint"
    guest.run("mov eax, dword ptr [0x08048000]")
    assert guest.personality.violation is None
