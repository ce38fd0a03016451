"""What Linux 2.6.25 to 2.6.36 with CONFIG_VMI does behind VMI_Init and earlier kernels do not, one test a demand; each
names the kernel's file and function.  On every deprivileging hypervisor.
"""

from __future__ import annotations

import struct

import pytest
from mainlineguest import ALL, BOTH, CLONE, FREE, GP, PD, PDP, PF, PT, begin, called, ran, started
from pagedguest import (
    BASE,
    DATA,
    DIRECTORY,
    GDT,
    HANDLERS,
    PDPT,
    USER_AT,
    USER_CODE,
    PagedGuest,
    segment,
)

PERCPU, CANARY = 27 * 8, 28 * 8  # GDT_ENTRY_PERCPU, GDT_ENTRY_STACK_CANARY (2.6.32, asm/segment.h)


def load(guest: PagedGuest, linear: int) -> int:
    ran(guest, f"mov eax, dword ptr [{linear:#x}]", limit=200)
    return guest.cpu.get("eax")


def set_entry(guest: PagedGuest, physical: int, value: int, flags: int = PT) -> None:
    """vmi_set_pte, vmi_set_pmd, vmi_set_pud: SetPxE or SetPxELong with the level in the flags."""
    if guest.pae:
        called(guest, "SetPxELong", flags, eax=value & 0xFFFFFFFF, edx=value >> 32, ecx=BASE + physical)
    else:
        called(guest, "SetPxE", eax=value, edx=BASE + physical, ecx=flags)


def faults_at(guest: PagedGuest, vector: int, text: str | bytes) -> bool:
    guest.memory.write(HANDLERS + 16 * vector, b"\xeb\xfe")
    guest.run(text, limit=100)
    return guest.cpu.get("eip") == BASE + HANDLERS + 16 * vector


# --- segments ---------------------------------------------------------------------------


def descriptor(guest: PagedGuest, selector: int, raw: bytes) -> None:
    low, high = struct.unpack("<II", raw)
    called(guest, "WriteGDTEntry", high, eax=BASE + GDT, edx=selector // 8, ecx=low)


@ALL
@pytest.mark.parametrize("base", [0, 0x00C00000, 0x38000000, 0xFFD00000, 0xFC800000])
def test_the_processors_own_data(hypervisor: str, base: int) -> None:
    """2.6.32, setup_percpu.c, setup_percpu_segment: FS of 0xFFFFF pages (flags 8: G alone), based at where the first
    chunk lies less __per_cpu_start: above 0 if the chunk is above the kernel's image, and near 4 GiB if it is below (a
    machine with little memory). %fs:symbol must then reach the chunk, round the end of the address space."""
    guest = started(hypervisor)
    descriptor(guest, PERCPU, segment(0x92, base=base, flags=8))
    guest.memory.write(DATA, b"mine")
    offset = BASE + DATA - base & 0xFFFFFFFF
    ran(guest, b"\xb9" + struct.pack("<I", PERCPU) + b"\x8e\xe1\x64\xa1" + struct.pack("<I", offset))
    assert guest.cpu.get("eax") == int.from_bytes(b"mine", "little")
    ran(guest, b"\x64\xc7\x05" + struct.pack("<I", offset) + b"ours")
    assert guest.memory.read(DATA, 4) == b"ours"
    # An interrupt's SAVE_ALL and RESTORE_REGS (entry_32.S) load it again and again.
    ran(guest, b"\x0f\xa0\x0f\xa1\x64\x8b\x15" + struct.pack("<I", offset))
    assert guest.cpu.get("edx") == int.from_bytes(b"ours", "little")
    assert guest.personality.violation is None


@ALL
@pytest.mark.parametrize("base", [0xFFD00000, 0xFC800000, 0xFC001000, 0xFC010000])
@pytest.mark.parametrize("target", [0xFC001000, 0xFC00F000, 0xFC000FFE])
def test_such_a_segment_does_not_reach_the_hole(hypervisor: str, base: int, target: int) -> None:
    """Wherever it begins: a read there is a fault (docs/hypervisors.md), never the hypervisor's bytes."""
    guest = started(hypervisor)
    descriptor(guest, PERCPU, segment(0x92, base=base, flags=8))
    for vector in (11, GP, PF):
        guest.memory.write(HANDLERS + 16 * vector, b"\xeb\xfe")
    offset = target - base & 0xFFFFFFFF
    guest.cpu.set("eax", 0x12345678)
    load_fs = b"\xb9" + struct.pack("<I", PERCPU) + b"\x8e\xe1"
    # First the data that it is for, so that the register has whatever part it gets.
    guest.memory.write(DATA, b"mine")
    near = BASE + DATA - base & 0xFFFFFFFF
    guest.run(load_fs + b"\x64\x8b\x15" + struct.pack("<I", near) + b"\x64\xa1" + struct.pack("<I", offset), limit=100)
    assert guest.cpu.get("eip") in [BASE + HANDLERS + 16 * vector for vector in (11, GP, PF)]
    assert guest.cpu.get("eax") == 0x12345678


@ALL
def test_the_stack_canary(hypervisor: str) -> None:
    """2.6.30 to 2.6.36, asm/stackprotector.h, setup_stack_canary_segment: GS of 24 bytes, DPL 0, 20 below the canary;
    loaded with RPL 0 by SET_KERNEL_GS (entry_32.S)."""
    guest = started(hypervisor)
    guest.memory.write(DATA + 20, b"bird")
    descriptor(guest, CANARY, segment(0x90, base=BASE + DATA, limit=0x18, flags=4))
    ran(guest, b"\xb9" + struct.pack("<I", CANARY) + b"\x8e\xe9\x65\xa1\x14\0\0\0")
    assert guest.cpu.get("eax") == int.from_bytes(b"bird", "little")
    assert faults_at(guest, GP, b"\x65\xa1\x18\0\0\0")


@ALL
@BOTH
def test_the_linear_mapping_is_longer_than_memory(hypervisor: str, pae: bool) -> None:
    """2.6.32, vmi_32.c, vmi_bringup: MAXMEM_PFN pages from PAGE_OFFSET on, whatever memory there is; behind the end of
    memory, in the range that was told, vmalloc's addresses begin, and an LDT of more than 512 entries is vmalloc's
    (ldt.c, alloc_ldt). write_ldt and load_LDT must find it all the same; so must load_gdt a table that lies there
    (setup_percpu.c: a first chunk of the page allocator's)."""
    guest = PagedGuest(hypervisor, pae=pae)
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x33BFE)
    size, per = (8, 512) if pae else (4, 1024)
    table, there = FREE, 0xF0000000
    assert there < BASE + 0x33BFE000
    guest.memory.write(table, bytes(4096))
    called(guest, "AllocatePage", 0, 0, eax=table >> 12, edx=PT, ecx=0)
    directory = DIRECTORY + 3 * 4096 if pae else DIRECTORY
    set_entry(guest, directory + (there >> 12) // per * size % 4096, table | 0x67, PD)
    for n in range(3):
        page = FREE + 0x1000 + n * 4096
        guest.memory.write(page, bytes(4096))
        set_entry(guest, table + ((there >> 12) + n) % per * size, page | 0x63)
    descriptor(guest, 0x88, segment(0x82, base=there, limit=0x1FFF, flags=0))

    def written(index: int, base: int) -> None:
        low, high = struct.unpack("<II", segment(0xF2, base=base))
        called(guest, "WriteLDTEntry", high, eax=there, edx=index, ecx=low)
        assert guest.memory.read(FREE + 0x1000 + 8 * index, 8) == struct.pack("<II", low, high)

    written(1, 0x11000)
    called(guest, "SetLDT", eax=0x88)
    written(600, 0x22000)
    ran(guest, "mov ecx, 0x0f; mov gs, ecx; mov ecx, 0x12c7; mov fs, ecx")
    assert (guest.cpu.get("gs_base"), guest.cpu.get("fs_base")) == (0x11000, 0x22000)
    guest.memory.write(FREE + 0x3000, guest.memory.read(GDT, 0x100))
    guest.memory.write(FREE + 0x3000 + PERCPU, segment(0x92, base=0x33000))
    guest.memory.write(DATA, struct.pack("<HI", 0xFF, there + 0x2000))
    called(guest, "SetGDT", eax=BASE + DATA)
    ran(guest, f"mov ecx, {PERCPU}; mov fs, ecx")
    assert guest.cpu.get("fs_base") == 0x33000
    low, high = struct.unpack("<II", segment(0xF2, base=0x44000))
    called(guest, "WriteGDTEntry", high, eax=there + 0x2000, edx=6, ecx=low)
    ran(guest, "mov ecx, 0x33; mov gs, ecx")
    assert guest.cpu.get("gs_base") == 0x44000
    assert guest.personality.violation is None


@ALL
@BOTH
def test_the_linear_mapping_is_of_no_length(hypervisor: str, pae: bool) -> None:
    """vmi_bringup of kernels before that tells max_low_pfn, which is 0 where vmi_init has come to stand in front of
    find_low_pfn_range (setup.c): then no address is known, and the calls must work all the same."""
    guest = PagedGuest(hypervisor, pae=pae)
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0)
    descriptor(guest, PERCPU, segment(0x92, base=0x33000))
    ran(guest, f"mov ecx, {PERCPU}; mov fs, ecx")
    assert guest.cpu.get("fs_base") == 0x33000
    guest.memory.write(FREE, b"here")
    size, per = (8, 512) if pae else (4, 1024)
    at = guest.user_table + (USER_AT >> 12) % per * size
    set_entry(guest, at, FREE | 0x67, PT | 0x10 | USER_AT)
    called(guest, "InvalPage", eax=USER_AT)
    assert load(guest, USER_AT) == int.from_bytes(b"here", "little")
    set_entry(guest, at, 0, PT | 0x10 | USER_AT)
    called(guest, "FlushTLB", eax=1)
    assert faults_at(guest, PF, f"mov eax, dword ptr [{USER_AT:#x}]")
    assert guest.personality.violation is None


# --- page tables ------------------------------------------------------------------------


def shared_boot_tables(guest: PagedGuest) -> None:
    """One page directory for the first gigabyte and for the kernel's: what head_32.S leaves behind."""
    guest.memory.write(DIRECTORY, guest.memory.read(DIRECTORY + 3 * 4096, 4096))
    guest.memory.write(PDPT, struct.pack("<4Q", DIRECTORY | 1, 0, 0, DIRECTORY | 1))
    guest.cpu.pdpte = [DIRECTORY | 1, 0, 0, DIRECTORY | 1, 0, 0, 0, 0]


@ALL
def test_the_boot_directory_is_there_twice(hypervisor: str) -> None:
    """2.6.32 with PAE, head_32.S, swapper_pg_dir: its pointers 0 and 3 both name swapper_pg_pmd, so one page
    is a directory in the first gigabyte and in the one with the hole. mm/init_32.c then fills it (one_page_table_init,
    kernel_physical_mapping_init), and zap_low_mappings makes empty_zero_page of the lower pointers."""
    guest = PagedGuest(hypervisor, pae=True)
    shared_boot_tables(guest)
    begin(guest)
    guest.memory.write(DATA, b"here")
    here = int.from_bytes(b"here", "little")
    assert load(guest, BASE + DATA) == here
    assert load(guest, DATA) == here
    # A page table for the fixmap's region (early_ioremap_init: bm_pte), which is inside virtual_top's last 2 MiB below.
    table = FREE
    guest.memory.write(table, bytes(4096))
    called(guest, "AllocatePage", 0, 0, eax=table >> 12, edx=PT, ecx=0)
    set_entry(guest, DIRECTORY + (0xFBFFE000 >> 21 & 511) * 8, table | 0x67, PD)
    set_entry(guest, table + (0xFBFFE000 >> 12 & 511) * 8, DATA | 0x63)
    assert load(guest, 0xFBFFE000) == here
    # The direct map in large pages, over the page tables of the boot.
    for n in range(2):
        set_entry(guest, DIRECTORY + n * 8, n << 21 | 0x1E3, PD)
    called(guest, "FlushTLB", eax=3)
    assert load(guest, BASE + DATA) == load(guest, DATA) == here
    zero = FREE + 0x1000
    guest.memory.write(zero, bytes(4096))
    for n in range(3):
        set_entry(guest, PDPT + 8 * n, zero | 1, PDP)
    called(guest, "FlushTLB", eax=3)
    assert load(guest, BASE + DATA) == here
    assert faults_at(guest, PF, f"mov eax, dword ptr [{DATA:#x}]")
    called(guest, "GetCR2")
    assert guest.cpu.get("eax") == DATA


@ALL
@BOTH
def test_an_address_space_is_born_lives_and_dies(hypervisor: str, pae: bool) -> None:
    """2.6.32, mm/pgtable.c: pgd_alloc clones the kernel's entries (pgd_ctor, AllocatePage with VMI_PAGE_CLONE) and,
    with PAE, puts empty directories under it (pgd_prepopulate_pmd); vmi_32.c, vmi_pgd_free: ReleasePage of the root as
    VMI_PAGE_L2, after its tables. The page is then anything, and a root again."""
    guest = started(hypervisor, pae=pae)
    size, per = (8, 512) if pae else (4, 1024)
    root, middle, table, page = FREE, FREE + 0x1000, FREE + 0x5000, FREE + 0x6000
    old = guest.cr3
    for life in range(3):
        text = b"lif%d" % life
        for at in (root, middle, middle + 0x1000, middle + 0x2000, table):
            ran(guest, b"\xf3\xab", edi=BASE + at, ecx=1024, eax=0, limit=3000)
        kernel = guest.memory.read(old, 32 if pae else 4096)
        if pae:
            set_entry(guest, root + 24, int.from_bytes(kernel[24:32], "little"), PDP)
            called(guest, "AllocatePage", 3, 1, eax=root >> 12, edx=PD | CLONE, ecx=old >> 12)
            for n in range(3):
                called(guest, "AllocatePage", 0, 0, eax=(middle >> 12) + n, edx=PD, ecx=0)
                set_entry(guest, root + 8 * n, middle + n * 4096 | 1, PDP)
        else:
            ran(guest, b"\xf3\xa5", esi=BASE + old + 3072, edi=BASE + root + 3072, ecx=256)
            called(guest, "AllocatePage", 768, 256, eax=root >> 12, edx=PD | CLONE, ecx=old >> 12)
        called(guest, "SetCR3", eax=root)
        called(guest, "AllocatePage", 0, 0, eax=table >> 12, edx=PT, ecx=0)
        slot = middle + (USER_AT >> 21) * 8 if pae else root + (USER_AT >> 22) * 4
        set_entry(guest, slot, table | 0x67, PD)
        guest.memory.write(page, text)
        set_entry(guest, table + (USER_AT >> 12) % per * size, page | 0x67, PT | 0x10 | USER_AT)
        assert load(guest, USER_AT) == int.from_bytes(text, "little")
        # exit_mmap: the entries go, then the tables; mmdrop, on another address space: the root.
        set_entry(guest, slot, 0, PD)
        called(guest, "ReleasePage", eax=table >> 12, edx=PT)
        if pae:
            called(guest, "SetCR3", eax=root)
        called(guest, "FlushTLB", eax=1)
        assert faults_at(guest, PF, f"mov eax, dword ptr [{USER_AT:#x}]")
        guest.cpu.set("esp", BASE + 0x5F000)
        called(guest, "SetCR3", eax=old)
        if pae:
            for n in range(3):  # pgd_mop_up_pmds: a plain store, then paravirt_release_pmd
                ran(guest, f"mov dword ptr [{BASE + root + 8 * n:#x}], 0")
                called(guest, "ReleasePage", eax=(middle >> 12) + n, edx=PD)
        called(guest, "ReleasePage", eax=root >> 12, edx=PD)
        # Ordinary memory in between: all sorts of bytes, entries of the hypervisor's pages among them.
        ran(guest, b"\xf3\xab", edi=BASE + root, ecx=1024, eax=0xF8000003, limit=3000)
        ran(guest, b"\xf3\xab", edi=BASE + table, ecx=1024, eax=0xF8000003, limit=3000)
        guest.memory.write(USER_CODE, b"base")
        assert load(guest, USER_AT) == int.from_bytes(b"base", "little")
    assert guest.personality.violation is None


# --- ends -------------------------------------------------------------------------------


@ALL
def test_restart_by_the_keyboard_controller(hypervisor: str) -> None:
    """2.6.25 to 2.6.36, reboot.c, native_machine_emergency_restart: BOOT_KBD is the default; no VMI call is made."""
    guest = started(hypervisor)
    outcome = guest.run("mov al, 0xfe; out 0x64, al; jmp .", limit=100)
    assert outcome.reason == "reset"


@ALL
def test_a_halt_for_good(hypervisor: str) -> None:
    """2.6.32, process.c, stop_this_cpu: interrupts off, and HLT by pv_irq_ops.halt, which VMI does not replace."""
    guest = started(hypervisor)
    called(guest, "DisableInterrupts")
    assert guest.run("hlt; jmp .", limit=100).reason == "halt"
