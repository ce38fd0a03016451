"""PAE switched on at run time, CPUID behind VMI_Init, a process's directory: what mainline kernels do with them.

Each test names the kernel's file and function, and runs on every deprivileging hypervisor.
The demands of single versions are in test_mainline_early.py and test_mainline_late.py.
"""

from __future__ import annotations

import struct

from mainlineguest import ALL, CLONE, PAE, PD, PDP, PT, ZEROED, begin, called, ran, started
from pagedguest import BASE, DATA, DIRECTORY, MAPPED, PDPT, TABLES, PagedGuest

ZERO_PAGE, MIDDLE, LAST_TABLE = 0x90000, 0x91000, 0x92000


def set_long(guest: PagedGuest, physical: int, value: int, flags: int) -> None:
    called(guest, "SetPxELong", flags, eax=value & 0xFFFFFFFF, edx=value >> 32, ecx=BASE + physical)


def paging_init(guest: PagedGuest) -> None:
    """Three-level tables over the boot directory, up to the load of CR4 with PAE."""
    boot = guest.memory.read(DIRECTORY, 32)
    assert any(boot[4::8]), "the boot directory's odd entries are in the way"
    for n in range(3):  # native_pagetable_setup_start
        set_long(guest, DIRECTORY + 8 * n, ZERO_PAGE | 1, PDP)
    ran(guest, f"mov dword ptr [{BASE + DIRECTORY + 24:#x}], 0; mov dword ptr [{BASE + DIRECTORY + 28:#x}], 0")
    called(guest, "AllocatePage", 0, 0, eax=MIDDLE >> 12, edx=PD | PAE | ZEROED, ecx=0)
    set_long(guest, DIRECTORY + 24, MIDDLE | 1, PDP)
    for n in range(MAPPED >> 21):  # kernel_physical_mapping_init: 2 MiB each, global
        set_long(guest, MIDDLE + 8 * n, n << 21 | 0x1E3, PD)
    called(guest, "AllocatePage", 0, 0, eax=LAST_TABLE >> 12, edx=PT | PAE | ZEROED, ecx=0)
    set_long(guest, MIDDLE + 8 * 0x1DF, LAST_TABLE | 0x67, PD)  # the fixmap's, below virtual_top
    set_long(guest, LAST_TABLE + 8 * 0x1FE, DATA | 0x63, PT)
    set_long(guest, DIRECTORY, MIDDLE | 1, PDP)  # native_pagetable_setup_done
    called(guest, "SetCR3", eax=DIRECTORY)


@ALL
def test_pae_goes_on_behind_vmi_init(hypervisor: str) -> None:
    """2.6.21 to 2.6.24 with PAE boot on two-level tables and set CR4.PAE in paging_init, long after VMI_Init in
    setup_arch (2.6.24, arch/x86/mm/init_32.c, pagetable_init and paging_init): pointers of 8 bytes over the live
    boot directory's entries, then SetCR3, then SetCR4."""
    guest = PagedGuest(hypervisor)
    # head.S maps low memory at 0 too, so that the entries under the pointers are in use.
    guest.memory.write(DIRECTORY, struct.pack("<8I", *(TABLES | 7 for _ in range(8))))
    begin(guest)
    paging_init(guest)
    called(guest, "GetCR4")
    called(guest, "SetCR4", eax=guest.cpu.get("eax") | 0x20)
    called(guest, "FlushTLB", eax=3)
    guest.memory.write(DATA, b"here")
    ran(guest, "mov eax, dword ptr [0xFBFFE000]; mov ecx, dword ptr [0x50000]")
    assert guest.cpu.get("eax") == guest.cpu.get("ecx") == int.from_bytes(b"here", "little")
    assert guest.memory.read(DIRECTORY, 32) == struct.pack("<4Q", MIDDLE | 1, ZERO_PAGE | 1, ZERO_PAGE | 1, MIDDLE | 1)
    called(guest, "GetCR4")
    assert guest.cpu.get("eax") & 0x20
    # From here on like any other kernel with PAE: entries of 8 bytes, and the interrupt calls on the state page.
    set_long(guest, LAST_TABLE + 8 * 0x1FD, DATA | 0x63, PT)
    ran(guest, "mov eax, dword ptr [0xFBFFD000]")
    assert guest.cpu.get("eax") == int.from_bytes(b"here", "little")
    called(guest, "EnableInterrupts")
    assert guest.personality.virtual_if


@ALL
def test_pae_goes_on_by_the_instruction(hypervisor: str) -> None:
    """The same with a plain `mov cr4` in the place of the call: what set_in_cr4 is without a back end."""
    guest = PagedGuest(hypervisor)
    guest.memory.write(DIRECTORY, struct.pack("<8I", *(TABLES | 7 for _ in range(8))))
    begin(guest)
    paging_init(guest)
    ran(guest, "mov eax, cr4; or eax, 0x20; mov cr4, eax; mov ecx, 7")
    assert guest.cpu.get("ecx") == 7
    saved = guest.machine.snapshot()
    set_long(guest, LAST_TABLE + 8 * 0x1FD, DATA | 0x63, PT)
    guest.machine.restore(saved)
    ran(guest, "mov eax, dword ptr [0xFBFFE000]")


@ALL
def test_an_entry_of_eight_bytes_before_pae(hypervisor: str) -> None:
    """pagetable_init writes the tables to come, high halves too (the NX bit), while the processor still has
    entries of four bytes (2.6.24, arch/x86/mm/init_32.c)."""
    guest = started(hypervisor)
    guest.memory.write(DATA, b"\xff" * 16)
    set_long(guest, DATA, 0x8000_0000_0020_01E3, PD)
    assert guest.memory.read(DATA, 16) == struct.pack("<Q", 0x8000_0000_0020_01E3) + b"\xff" * 8


@ALL
def test_after_vmi_init_cpuid_names_no_hypervisor(hypervisor: str) -> None:
    """A kernel that speaks the hypervisor's own interface too would lay that over VMI's: kvm_guest_init asks for
    nothing but "KVMKVMKVM" (2.6.32, arch/x86/include/asm/kvm_para.h, kvm_para_available), and it runs behind
    vmi_activate (arch/x86/kernel/setup.c)."""
    guest = PagedGuest(hypervisor)
    leaves = [(leaf, guest.machine.cpu.leaves.get(leaf)) for leaf in (0x4000_0000, 0x4000_0001)]
    assert leaves[0][1], "until then the ROM finds it there"
    before = guest.machine.snapshot()
    assert guest.init() == 0
    called(guest, "CPUID", eax=0)
    highest = guest.cpu.get("eax")
    called(guest, "CPUID", eax=highest)
    bare = [guest.cpu.get(name) for name in ("eax", "ebx", "ecx", "edx")]
    for leaf in (0x4000_0000, 0x4000_0001):
        called(guest, "CPUID", eax=leaf)
        # What is beyond the highest leaf is answered as that one is (SDM 2, CPUID).
        assert [guest.cpu.get(name) for name in ("eax", "ebx", "ecx", "edx")] == bare
    after = guest.machine.snapshot()
    guest.machine.restore(before)
    assert [(leaf, guest.machine.cpu.leaves.get(leaf)) for leaf, _ in leaves] == leaves
    guest.machine.restore(after)
    assert 0x4000_0000 not in guest.machine.cpu.leaves


@ALL
def test_the_boot_directory_is_announced_as_a_middle_one(hypervisor: str) -> None:
    """native_pagetable_setup_start (2.6.32, arch/x86/mm/init_32.c) says of swapper_pg_dir that it is an L2, which with
    PAE is the page of the four pointers; what follows works all the same. vmi_pgd_free says so of every process's."""
    for pae in (False, True):
        guest = PagedGuest(hypervisor, pae=pae)
        top = PDPT if pae else DIRECTORY
        begin(guest)
        called(guest, "AllocatePage", 0, 0, eax=top >> 12, edx=PD, ecx=0)
        called(guest, "SetCR3", eax=top)
        # A process's: pgd_alloc copies the kernel's part, fills in its own, and switches to it.
        size = 32 if pae else 4096
        guest.memory.write(ZERO_PAGE, guest.memory.read(top, size))
        called(guest, "AllocatePage", 0x300, 0x100, eax=ZERO_PAGE >> 12, edx=PD | CLONE, ecx=top >> 12)
        called(guest, "SetCR3", eax=ZERO_PAGE)
        guest.memory.write(DATA, b"here")
        ran(guest, f"mov eax, dword ptr [{BASE + DATA:#x}]")
        assert guest.cpu.get("eax") == int.from_bytes(b"here", "little")
        called(guest, "SetCR3", eax=top)
        called(guest, "ReleasePage", eax=ZERO_PAGE >> 12, edx=PD)
        # From now on it is a page like any other.
        ran(guest, f"mov dword ptr [{BASE + ZERO_PAGE:#x}], 0xFFFFFFFF; mov ecx, dword ptr [{BASE + ZERO_PAGE:#x}]")
        assert guest.cpu.get("ecx") == 0xFFFFFFFF
        assert guest.personality.violation is None
