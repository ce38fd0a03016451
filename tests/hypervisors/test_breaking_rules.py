"""Guests that break the rules: stopped and reported, or given the fault that the real hypervisor would give.

Here: writes to the hypervisor's memory, and page tables that would reach it.  In every case that memory is as it
was before.  Each case runs under all five deprivileged personalities.
"""

from __future__ import annotations

import struct

import pytest
from pagedguest import (
    BASE,
    DATA,
    DEPRIVILEGED,
    DIRECTORY,
    GDT,
    KERNEL_DS,
    LDT,
    PDPT,
    TABLES,
    USER_CODE,
    USER_DS,
    PagedGuest,
)
from rulebreaking import (
    FREE,
    HOLE,
    HOST,
    STATE,
    WINDOW,
    Action,
    After,
    Ends,
    Fault,
    Harmless,
    Stopped,
    call,
    from_user,
    judge,
    raw,
    text,
    then,
    through_gate,
    with_memory,
)

from vmipatch.emu.machine.machine import Outcome

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)


def hole(at: int | None = None) -> Stopped:
    return Stopped("hole-write", at)


FORGED, POINTER, RING0 = Stopped("forged-page-table"), Stopped("bad-pointer"), Stopped("ring-0")


# --- writes to the hole -----------------------------------------------------------------

HOLE_WRITES: dict[str, tuple[Action | After, Ends]] = {
    "mov": (text(f"mov dword ptr [{HOLE:#x}], eax"), hole(HOLE)),
    "mov a byte": (text(f"mov byte ptr [{HOLE:#x}], al"), hole(HOLE)),
    "mov to the shadow gdt": (text("mov dword ptr [0xFC010064], 0x00CF9B00"), hole(0xFC010064)),
    "mov to the shadow idt": (text("mov eax, 0xFC001008; mov dword ptr [eax], ecx"), hole(0xFC001008)),
    "mov to the shadow tss": (text("mov ebp, 0xFC002004; mov dword ptr [ebp], ecx"), hole(0xFC002004)),
    "mov to the last word": (text("mov dword ptr [0xFFFFFFFC], eax"), hole(0xFFFFFFFC)),
    "mov across the edge": (text(f"mov dword ptr [{HOLE - 2:#x}], eax"), hole()),
    "mov with an index": (text("mov ebx, 0xFC000000; mov ecx, 0x400; mov dword ptr [ebx + ecx*4], eax"), hole(HOLE)),
    "push": (text(f"mov esp, {HOLE + 0x1000:#x}; push eax"), hole(HOLE + 0xFFC)),
    "pushad": (text(f"mov esp, {HOLE + 0x1000:#x}; pushad"), hole()),
    "push across the edge": (text(f"mov esp, {HOLE + 2:#x}; push eax"), hole()),
    "call": (text(f"mov esp, {HOLE + 0x1000:#x}; call next", "next: nop"), hole(HOLE + 0xFFC)),
    "enter": (raw(f"mov ebp, 0; mov esp, {HOLE + 0x1000:#x}", "c8080000"), hole()),
    "pop to memory": (raw("push eax", f"8f05{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "stosd": (raw(f"cld; mov edi, {HOLE:#x}", "ab"), hole(HOLE)),
    "rep stosd": (raw(f"cld; mov ecx, 4; mov edi, {HOLE:#x}", "f3ab"), hole(HOLE)),
    "rep stosd from the state page on": (raw(f"cld; mov ecx, 64; mov edi, {HOLE - 64:#x}", "f3ab"), hole(HOLE)),
    "rep stosd downwards": (raw(f"std; mov ecx, 4; mov edi, {HOLE + 0x1000:#x}", "f3ab"), hole(HOLE + 0x1000)),
    "movsb": (raw(f"cld; mov esi, {BASE + DATA:#x}; mov edi, {HOLE:#x}", "a4"), hole(HOLE)),
    "rep movsd": (raw(f"cld; mov ecx, 9; mov esi, {BASE + DATA:#x}; mov edi, {HOLE + 4:#x}", "f3a5"), hole(HOLE + 4)),
    "insb": (raw(f"cld; mov edx, 0x80; mov edi, {HOLE:#x}", "6c"), POINTER),
    "xchg": (text(f"xchg dword ptr [{HOLE:#x}], eax"), hole(HOLE)),
    "lock cmpxchg": (raw(f"mov edx, {HOLE:#x}", "f00fb10a"), hole(HOLE)),
    "lock cmpxchg8b": (raw(f"mov edi, {HOLE:#x}", "f00fc70f"), hole(HOLE)),
    "or": (text(f"or dword ptr [{HOLE:#x}], 1"), hole(HOLE)),
    "inc": (text(f"inc dword ptr [{HOLE:#x}]"), hole(HOLE)),
    "bts far away": (text(f"mov eax, {8 * 4096}; bts dword ptr [{STATE:#x}], eax"), hole()),
    "setz": (text(f"setz byte ptr [{HOLE:#x}]"), hole(HOLE)),
    "shld": (text(f"shld dword ptr [{HOLE:#x}], eax, 4"), hole(HOLE)),
    "sgdt": (raw("nop", f"0f0105{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "sldt": (raw("nop", f"0f0005{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "mov from a segment register": (raw("nop", f"8c1d{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "fnsave": (raw("nop", f"dd35{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "fist": (raw("fninit; fld1", f"db15{struct.pack('<I', HOLE).hex()}"), hole(HOLE)),
    "fxsave": (raw("nop", f"0fae05{struct.pack('<I', HOLE + 15 & ~15).hex()}"), hole()),
    "fxsave across the edge": (raw("nop", f"0fae05{struct.pack('<I', HOLE - 128).hex()}"), hole()),
    "fnsave across the edge": (raw("nop", f"dd35{struct.pack('<I', HOLE - 96).hex()}"), hole()),
    "fnstenv across the edge": (raw("nop", f"d935{struct.pack('<I', HOLE - 20).hex()}"), hole()),
    "sgdt across the edge": (raw("nop", f"0f0105{struct.pack('<I', HOLE - 5).hex()}"), hole()),
    "through a segment with a shifted base": (
        After(
            call("WriteGDTEntry", 0xFCCF9300, eax=BASE + GDT, edx=6, ecx=0x0000FFFF),
            text("mov eax, 0x31; mov fs, eax; mov dword ptr fs:[0x1000], eax"),
        ),
        hole(HOLE),
    ),
    "through a 16-bit segment behind the edge": (
        After(
            call("WriteGDTEntry", 0xFC009300, eax=BASE + GDT, edx=6, ecx=0x0800FFFF),
            text("mov eax, 0x31; mov gs, eax; mov dword ptr gs:[0x800], eax"),
        ),
        hole(HOLE),
    ),
    "through a segment that begins in the hole": (
        After(
            call("WriteGDTEntry", 0xFCCF9301, eax=BASE + GDT, edx=6, ecx=0x0000FFFF),
            text("mov eax, 0x31; mov fs, eax"),
        ),
        {"": Fault(11, 0x30)},
    ),
    "through a segment of the ldt": (
        After(
            call("WriteLDTEntry", 0xFCCF9300, eax=BASE + LDT, edx=2, ecx=0x0000FFFF),
            text("mov eax, 0x15; mov es, eax; mov dword ptr es:[0x1000], eax"),
        ),
        hole(HOLE),
    ),
    "through an expand-down segment": (
        After(
            call("WriteGDTEntry", 0x00CF9700, eax=BASE + GDT, edx=6, ecx=0x00000000),
            text("mov eax, 0x31; mov fs, eax"),
        ),
        Fault(13, 0x30),
    ),
    "code in the hole": (text(f"mov eax, {HOLE:#x}; jmp eax"), Fault(13, 0)),
    "by a user": (from_user(f"mov eax, {USER_DS}; mov ds, eax; mov dword ptr [{HOLE:#x}], eax"), Fault(13, 0)),
    "the state page by a user": (
        from_user(f"mov eax, {USER_DS}; mov ds, eax; mov dword ptr [{STATE:#x}], eax"),
        Fault(14, 7),
    ),
}


@ALL
@pytest.mark.parametrize("name", HOLE_WRITES)
def test_writes_to_the_hole(hypervisor: str, name: str) -> None:
    judge(hypervisor, *HOLE_WRITES[name])


# --- forged page tables -----------------------------------------------------------------


def pte(linear: int = WINDOW, *, pae: bool = False) -> int:
    """The physical address of the page-table entry of an address of the direct map."""
    return TABLES + (linear - BASE >> 12) * (8 if pae else 4)


def pde(linear: int, *, pae: bool = False) -> int:
    """The physical address of a directory's entry."""
    return DIRECTORY + ((linear >> 30) * 4096 + (linear >> 21) % 512 * 8 if pae else (linear >> 22) * 4)


def set_pxe(physical: int, value: int, flags: int = 1) -> Action:
    def act(guest: PagedGuest) -> Outcome:
        if guest.pae:
            return guest.call("SetPxELong", flags, eax=value & 0xFFFFFFFF, edx=value >> 32, ecx=BASE + physical)
        return guest.call("SetPxE", eax=value, edx=BASE + physical, ecx=flags)

    return act


def put(physical: int, value: int) -> Action:
    return text(f"mov dword ptr [{BASE + physical:#x}], {value:#x}")


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def hang(table: int, linear: int = 0xD0000000) -> Action:
    """Put a table into the directory."""
    return set_pxe(pde(linear), table | 3, 2)


def fw_cfg_dma(physical: int) -> Action:
    """Have the firmware configuration device store its first four bytes at a physical address."""
    request = struct.pack(">IIQ", 0x0A, 4, physical)
    start = int.from_bytes(FREE.to_bytes(4, "big"), "little")
    lines = ("xor eax, eax; mov edx, 0x514; out dx, eax", f"mov eax, {start:#x}; mov edx, 0x518; out dx, eax")
    return with_memory(FREE, request, text(*lines))


SPARE = words(*([0] * 7), HOST | 3)  # a prepared table
ALIAS = 0xC03E0000
FORGERIES: dict[str, tuple[Action | After, Ends]] = {
    "SetPxE": (set_pxe(pte(), HOST | 3), FORGED),
    "SetPxE, the last machine-owned frame": (set_pxe(pte(), HOST + 0x7FF000 | 7), FORGED),
    "SetPxE with an address": (set_pxe(pte(), HOST | 3, WINDOW | 0x11), FORGED),
    "SetPxE of a directory's entry": (set_pxe(pde(0xD0000000), HOST | 3, 2), FORGED),
    "SetPxE of a large page": (set_pxe(pde(0xD0000000), HOST | 0x83, 2), FORGED),
    "SetPxE of the second large page": (set_pxe(pde(0xD0000000), HOST + 0x400000 | 0x83, 2), FORGED),
    "a table that is no memory": (set_pxe(pde(0xD0000000), 0x40000003, 2), FORGED),
    "a table in video memory": (set_pxe(pde(0xD0000000), 0xB8003, 2), FORGED),
    "a table in rom": (set_pxe(pde(0xD0000000), 0xC0003, 2), FORGED),
    "mov": (put(pte(), HOST | 3), FORGED),
    "mov of a directory's entry": (put(pde(0xD0000000), HOST | 3), FORGED),
    "mov of a large page": (put(pde(0xD0000000), HOST | 0x83), FORGED),
    "mov of bytes": (
        text(f"mov byte ptr [{BASE + pte() + 3:#x}], 0xF8", f"mov word ptr [{BASE + pte() + 1:#x}], 0"),
        FORGED,
    ),
    "mov across two entries": (text(f"mov dword ptr [{BASE + pte() - 2:#x}], 0x0003FFFF"), Harmless()),
    "the address first, the present bit later": (
        then(put(pte(), HOST | 2), text(f"or dword ptr [{BASE + pte():#x}], 1")),
        FORGED,
    ),
    "xchg": (text(f"mov eax, {HOST | 3:#x}; xchg dword ptr [{BASE + pte():#x}], eax"), FORGED),
    "lock cmpxchg": (
        raw(f"mov edx, {BASE + pte():#x}; mov eax, dword ptr [edx]; mov ecx, {HOST | 3:#x}", "f00fb10a"),
        {"": FORGED},
    ),
    "push": (text(f"mov esp, {BASE + pte() + 4:#x}; push {HOST | 3:#x}"), FORGED),
    "rep movsd": (
        with_memory(
            FREE,
            words(0, HOST | 3, HOST | 3, 0),
            raw(f"cld; mov esi, {BASE + FREE:#x}; mov edi, {BASE + pte():#x}; mov ecx, 4", "f3a5"),
        ),
        FORGED,
    ),
    "rep stosd on through the page that it forges": (
        raw(f"cld; mov edi, {BASE + TABLES + 0xC00:#x}; mov eax, {HOST | 3:#x}; mov ecx, 0x800", "f3ab"),
        FORGED,
    ),
    "through a second mapping of the table": (
        then(set_pxe(pte(ALIAS), TABLES | 3), put(ALIAS - BASE + (pte() - TABLES), HOST | 3)),
        FORGED,
    ),
    "through a large mapping of the table": (
        After(set_pxe(pde(0xD0000000), 0x83, 2), text(f"mov dword ptr [{0xD0000000 + pte():#x}], {HOST | 3:#x}")),
        FORGED,
    ),
    "a prepared table into the directory": (with_memory(FREE, SPARE, hang(FREE)), FORGED),
    "a prepared table into the directory by mov": (
        with_memory(FREE, SPARE, put(pde(0xD0000000), FREE | 3)),
        FORGED,
    ),
    "AllocatePage of a prepared table": (
        with_memory(FREE, SPARE, then(call("AllocatePage", 0, 0, eax=FREE >> 12, edx=1, ecx=0), hang(FREE))),
        FORGED,
    ),
    "AllocatePage of a machine-owned page": (
        then(call("AllocatePage", 0, 0, eax=HOST >> 12, edx=1, ecx=0), hang(HOST)),
        FORGED,
    ),
    "AllocatePage of no page at all": (through_gate(44, eax=0xFFFFFFFF, edx=1), FORGED),
    "SetCR3 to a machine-owned page": (call("SetCR3", eax=HOST), FORGED),
    "SetCR3 past memory": (call("SetCR3", eax=0x40000000), {"": FORGED, "xen": Harmless((("eax", -22),))}),
    "SetCR3 to a prepared directory": (
        with_memory(FREE, bytes(0xD00) + words(HOST | 0x83), call("SetCR3", eax=FREE)),
        FORGED,
    ),
    "SetCR3 to a directory with a prepared table": (
        with_memory(
            FREE, bytes(0xD00) + words(FREE + 0x1000 | 3), with_memory(FREE + 0x1000, SPARE, call("SetCR3", eax=FREE))
        ),
        FORGED,
    ),
    "mov cr3 to a machine-owned page": (text(f"mov eax, {HOST:#x}; mov cr3, eax"), FORGED),
    "mov cr3 to a prepared directory": (
        with_memory(FREE, bytes(0xD00) + words(HOST | 0x83), text(f"mov eax, {FREE:#x}; mov cr3, eax")),
        FORGED,
    ),
    "the hole's own directory entry": (
        then(set_pxe(pde(HOLE), FREE | 3, 2), text("mov eax, cr3; mov cr3, eax")),
        Harmless(),
    ),
    "the kernel's stack in a page table": (
        After(
            then(
                call("UpdateKernelStack", eax=KERNEL_DS, edx=BASE + pte() + 20),
                set_pxe(pde(0xF8000000), FREE | 7, 2),
                with_memory(FREE, words(USER_CODE | 7), text("nop")),
            ),
            # User code at a linear address that makes a good entry: what the processor pushes is that address.
            from_user(bytes.fromhex("eb039 0 0f0b b8 030000f8 ffe0".replace(" ", ""))),
        ),
        FORGED,
    ),
    "rep stosd on through an entry that it writes": (
        After(
            set_pxe(pte(), TABLES | 3),
            raw(f"cld; mov edi, {WINDOW + 0xFC0:#x}; mov eax, {HOST | 3:#x}; mov ecx, 0x20", "f3ab"),
        ),
        FORGED,
    ),
    "fw_cfg's dma to a page table": (fw_cfg_dma(pte()), Harmless()),
    "fw_cfg's dma to a machine-owned page": (fw_cfg_dma(HOST), Harmless()),
    "address line 20 off": (
        # A good table in an odd megabyte, and where it would be without the line, a forged one.
        After(
            with_memory(FREE ^ 0x100000, words(HOST | 3), with_memory(FREE, words(FREE + 0x2000 | 3), hang(FREE))),
            with_memory(
                FREE + 0x2000,
                b"mine",
                text(
                    "in al, 0x92; and al, 0xFD; out 0x92, al",
                    "mov eax, cr3; mov cr3, eax",
                    "mov eax, dword ptr [0xD0000000]",
                ),
            ),
        ),
        Harmless((("eax", int.from_bytes(b"mine", "little")),)),
    ),
    "the local apic over the hypervisor's pages": (
        raw(f"mov ecx, 0x1B; mov eax, {HOST | 0x900:#x}; xor edx, edx", "0f30", "mov eax, cr3; mov cr3, eax"),
        Harmless(),
    ),
}


@ALL
@pytest.mark.parametrize("name", FORGERIES)
def test_forged_page_tables(hypervisor: str, name: str) -> None:
    judge(hypervisor, *FORGERIES[name])


PAE_FORGERIES: dict[str, tuple[Action | After, Ends]] = {
    "SetPxELong": (set_pxe(pte(pae=True), HOST | 3), FORGED),
    "SetPxELong, no execution": (set_pxe(pte(pae=True), 1 << 63 | HOST | 3), FORGED),
    "SetPxELong of a directory's entry": (set_pxe(pde(0xD0000000, pae=True), HOST | 3, 2), FORGED),
    "SetPxELong of a large page": (set_pxe(pde(0xD0000000, pae=True), HOST | 0x83, 2), FORGED),
    "SetPxELong of the last large page": (set_pxe(pde(0xD0000000, pae=True), HOST + 0x600000 | 0x83, 2), FORGED),
    "mov": (put(pte(pae=True), HOST | 3), FORGED),
    "the high half last": (
        then(put(pte(pae=True) + 4, 1), put(pte(pae=True), HOST | 3), put(pte(pae=True) + 4, 0)),
        FORGED,
    ),
    "above four gigabytes": (set_pxe(pte(pae=True), 1 << 32 | HOST | 3), Harmless()),
    "cmpxchg8b": (
        raw(
            f"mov edi, {BASE + pte(pae=True):#x}; mov eax, [edi]; mov edx, [edi + 4]; mov ebx, {HOST | 3:#x}"
            "; xor ecx, ecx",
            "f00fc70f",
        ),
        FORGED,
    ),
    "a prepared table": (
        with_memory(FREE, struct.pack("<4Q", 0, 0, 0, HOST | 3), set_pxe(pde(0xD0000000, pae=True), FREE | 3, 2)),
        FORGED,
    ),
    "a pointer to a machine-owned directory": (
        with_memory(FREE, struct.pack("<4Q", HOST | 1, 0, 0, 0), call("SetCR3", eax=FREE)),
        FORGED,
    ),
    "pointers to a prepared directory": (
        with_memory(
            FREE,
            struct.pack("<4Q", FREE + 0x1000 | 1, *(DIRECTORY + 4096 * n | 1 for n in (1, 2, 3))),
            with_memory(FREE + 0x1000, struct.pack("<2Q", 0, HOST | 0x83), call("SetCR3", eax=FREE)),
        ),
        FORGED,
    ),
    "mov cr3 to such pointers": (
        with_memory(FREE, struct.pack("<4Q", HOST | 1, 0, 0, 0), text(f"mov eax, {FREE:#x}; mov cr3, eax")),
        FORGED,
    ),
    "the pointers behind the kernel's back": (
        then(put(PDPT, HOST | 1), text(f"mov eax, dword ptr [{BASE + DATA:#x}]")),
        Harmless(),
    ),
    "the hole's own directory entry": (
        then(set_pxe(pde(HOLE, pae=True), FREE | 3, 2), text("mov eax, cr3; mov cr3, eax")),
        Harmless(),
    ),
    "pae off": (text("mov eax, cr4; and eax, 0xFFFFFFDF; mov cr4, eax"), Stopped("paging-off")),
    "a write to the hole": (text(f"mov dword ptr [{HOLE:#x}], eax"), hole(HOLE)),
}


@ALL
@pytest.mark.parametrize("name", PAE_FORGERIES)
def test_forged_page_tables_with_pae(hypervisor: str, name: str) -> None:
    judge(hypervisor, *PAE_FORGERIES[name], pae=True)
