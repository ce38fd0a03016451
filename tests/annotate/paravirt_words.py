"""Word numbers of some members of struct paravirt_ops (2.6.22, 2.6.23) and struct paravirt_patch_template (2.6.24 on).

Counted on i386 by a program that reads the struct's definition in the header of each release and drops what its #if
leave out, not from specs/pvops/: include/asm-i386/paravirt.h, include/asm-x86/paravirt.h (2.6.24 on),
arch/x86/include/asm/paravirt.h (2.6.28 on) and paravirt_types.h (2.6.32 on).  DWARF of kernels that were built of
2.6.25, 2.6.27, 2.6.29, 2.6.31, 2.6.34 and 2.6.35 (SMP, PAE, HIGHPTE) says the same of theirs.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """A release and a configuration; how many words each object has; members by the number that types have for them."""

    release: str
    configuration: str
    sizes: dict[str, int]
    numbers: dict[int, str]


def words() -> list[Words]:
    """The table below, a row each."""
    rows = []
    for line in TABLE.replace("\n   ", "").split("\n")[1:-1]:
        release, configuration, sizes, numbers = (part.strip() for part in line.split("|"))
        members = {number: name for name, number in _pairs(numbers)}
        rows.append(Words(release, configuration, dict(_pairs(sizes)), members))
    return rows


def _pairs(text: str) -> list[tuple[str, int]]:
    return [(name, int(number)) for name, number in (item.split("=") for item in text.split())]


TABLE = """
2.6.22 |  | paravirt_ops=78 | clts=17 read_cr0=18 read_cr2=20 write_cr3=23 save_fl=27 irq_enable=30 read_tsc=36
    set_pte=66 make_pgd=74 set_lazy_mode=75 irq_enable_sysexit=76 iret=77
2.6.22 | apic | paravirt_ops=84 | clts=17 read_cr0=18 read_cr2=20 write_cr3=23 save_fl=27 irq_enable=30 read_tsc=36
    apic_write=57 startup_ipi_hook=62 set_pte=72 make_pgd=80 set_lazy_mode=81 irq_enable_sysexit=82 iret=83
2.6.22 | apic pae | paravirt_ops=91 | clts=17 read_cr0=18 read_cr2=20 write_cr3=23 save_fl=27 irq_enable=30
    read_tsc=36 apic_write=57 startup_ipi_hook=62 set_pte=72 set_pte_atomic=77 make_pgd=87 set_lazy_mode=88
    irq_enable_sysexit=89 iret=90
2.6.22 | apic highpte | paravirt_ops=85 | clts=17 read_cr0=18 read_cr2=20 write_cr3=23 save_fl=27 irq_enable=30
    read_tsc=36 apic_write=57 startup_ipi_hook=62 set_pte=72 kmap_atomic_pte=77 make_pgd=81 set_lazy_mode=82
    irq_enable_sysexit=83 iret=84
2.6.22 | apic pae highpte | paravirt_ops=92 | clts=17 read_cr0=18 read_cr2=20 write_cr3=23 save_fl=27 irq_enable=30
    read_tsc=36 apic_write=57 startup_ipi_hook=62 set_pte=72 kmap_atomic_pte=77 set_pte_atomic=78 make_pgd=88
    set_lazy_mode=89 irq_enable_sysexit=90 iret=91
2.6.23 |  | paravirt_ops=79 | clts=18 read_cr0=19 read_cr2=21 write_cr3=24 save_fl=28 irq_enable=31 read_tsc=37
    set_pte=67 make_pgd=75 set_lazy_mode=76 irq_enable_sysexit=77 iret=78
2.6.23 | apic | paravirt_ops=85 | clts=18 read_cr0=19 read_cr2=21 write_cr3=24 save_fl=28 irq_enable=31 read_tsc=37
    apic_write=58 startup_ipi_hook=63 set_pte=73 make_pgd=81 set_lazy_mode=82 irq_enable_sysexit=83 iret=84
2.6.23 | apic pae | paravirt_ops=92 | clts=18 read_cr0=19 read_cr2=21 write_cr3=24 save_fl=28 irq_enable=31
    read_tsc=37 apic_write=58 startup_ipi_hook=63 set_pte=73 set_pte_atomic=78 make_pgd=88 set_lazy_mode=89
    irq_enable_sysexit=90 iret=91
2.6.23 | apic highpte | paravirt_ops=86 | clts=18 read_cr0=19 read_cr2=21 write_cr3=24 save_fl=28 irq_enable=31
    read_tsc=37 apic_write=58 startup_ipi_hook=63 set_pte=73 kmap_atomic_pte=78 make_pgd=82 set_lazy_mode=83
    irq_enable_sysexit=84 iret=85
2.6.23 | apic pae highpte | paravirt_ops=93 | clts=18 read_cr0=19 read_cr2=21 write_cr3=24 save_fl=28 irq_enable=31
    read_tsc=37 apic_write=58 startup_ipi_hook=63 set_pte=73 kmap_atomic_pte=78 set_pte_atomic=79 make_pgd=89
    set_lazy_mode=90 irq_enable_sysexit=91 iret=92
2.6.24 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=32 pv_irq_ops=7 pv_mmu_ops=29 | clts=12 read_cr0=13 read_tsc=36
    irq_enable_sysexit=38 iret=39 lazy_mode.leave=41 save_fl=43 irq_enable=46 read_cr2=51 write_cr3=54 set_pte=67
    make_pgd=75 lazy_mode.leave=77
2.6.24 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=32 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=29 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_sysexit=38 iret=39 lazy_mode.leave=41 save_fl=43 irq_enable=46 apic_write=49
    startup_ipi_hook=54 read_cr2=57 write_cr3=60 set_pte=73 make_pgd=81 lazy_mode.leave=83
2.6.24 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=32 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=36 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_sysexit=38 iret=39 lazy_mode.leave=41 save_fl=43 irq_enable=46 apic_write=49
    startup_ipi_hook=54 read_cr2=57 write_cr3=60 set_pte=73 set_pte_atomic=78 make_pgd=88 lazy_mode.leave=90
2.6.24 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=32 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=30 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_sysexit=38 iret=39 lazy_mode.leave=41 save_fl=43 irq_enable=46 apic_write=49
    startup_ipi_hook=54 read_cr2=57 write_cr3=60 set_pte=73 make_pgd=81 kmap_atomic_pte=82 lazy_mode.leave=84
2.6.24 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=32 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=37 |
    clts=12 read_cr0=13 read_tsc=36 irq_enable_sysexit=38 iret=39 lazy_mode.leave=41 save_fl=43 irq_enable=46
    apic_write=49 startup_ipi_hook=54 read_cr2=57 write_cr3=60 set_pte=73 set_pte_atomic=78 make_pgd=88
    kmap_atomic_pte=89 lazy_mode.leave=91
2.6.25 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_mmu_ops=29 | clts=12 read_cr0=13 read_tsc=36
    irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48 read_cr2=53 write_cr3=56
    set_pte=69 make_pgd=77 lazy_mode.leave=79
2.6.25 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=29 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=75 make_pgd=83 lazy_mode.leave=85
2.6.25 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=36 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=75 make_pgd=83 set_pte_atomic=84
    lazy_mode.leave=92
2.6.25 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=30 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=75 make_pgd=83 kmap_atomic_pte=84
    lazy_mode.leave=86
2.6.25 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=37 |
    clts=12 read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=75 make_pgd=83 set_pte_atomic=84
    kmap_atomic_pte=91 lazy_mode.leave=93
2.6.26 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_mmu_ops=31 | clts=12 read_cr0=13 read_tsc=36
    irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48 read_cr2=53 write_cr3=56
    set_pte=71 make_pgd=79 lazy_mode.leave=81
2.6.26 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=31 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=77 make_pgd=85 lazy_mode.leave=87
2.6.26 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=38 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=77 make_pgd=85 set_pte_atomic=86
    lazy_mode.leave=94
2.6.26 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=32 | clts=12
    read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=77 make_pgd=85 kmap_atomic_pte=86
    lazy_mode.leave=88
2.6.26 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=34 pv_irq_ops=7 pv_apic_ops=6 pv_mmu_ops=39 |
    clts=12 read_cr0=13 read_tsc=36 irq_enable_syscall_ret=39 iret=40 lazy_mode.leave=43 save_fl=45 irq_enable=48
    apic_write=51 startup_ipi_hook=56 read_cr2=59 write_cr3=62 set_pte=77 make_pgd=85 set_pte_atomic=86
    kmap_atomic_pte=93 lazy_mode.leave=95
2.6.27 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=36 pv_irq_ops=7 pv_mmu_ops=37 pv_lock_ops=5 | clts=12 read_cr0=13
    read_tsc=36 irq_enable_sysexit=39 iret=42 lazy_mode.leave=45 save_fl=47 irq_enable=50 read_cr2=55 write_cr3=58
    set_pte=75 make_pgd=86 lazy_mode.leave=88 set_fixmap=89 spin_unlock=94
2.6.27 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=36 pv_irq_ops=7 pv_apic_ops=5 pv_mmu_ops=37 pv_lock_ops=5 |
    clts=12 read_cr0=13 read_tsc=36 irq_enable_sysexit=39 iret=42 lazy_mode.leave=45 save_fl=47 irq_enable=50
    apic_write=53 startup_ipi_hook=57 read_cr2=60 write_cr3=63 set_pte=80 make_pgd=91 lazy_mode.leave=93
    set_fixmap=94 spin_unlock=99
2.6.27 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=36 pv_irq_ops=7 pv_apic_ops=5 pv_mmu_ops=44 pv_lock_ops=5
    | clts=12 read_cr0=13 read_tsc=36 irq_enable_sysexit=39 iret=42 lazy_mode.leave=45 save_fl=47 irq_enable=50
    apic_write=53 startup_ipi_hook=57 read_cr2=60 write_cr3=63 set_pte=80 make_pgd=91 set_pte_atomic=92
    lazy_mode.leave=100 set_fixmap=101 spin_unlock=106
2.6.27 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=36 pv_irq_ops=7 pv_apic_ops=5 pv_mmu_ops=38
    pv_lock_ops=5 | clts=12 read_cr0=13 read_tsc=36 irq_enable_sysexit=39 iret=42 lazy_mode.leave=45 save_fl=47
    irq_enable=50 apic_write=53 startup_ipi_hook=57 read_cr2=60 write_cr3=63 set_pte=80 make_pgd=91
    kmap_atomic_pte=92 lazy_mode.leave=94 set_fixmap=95 spin_unlock=100
2.6.27 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=36 pv_irq_ops=7 pv_apic_ops=5 pv_mmu_ops=45
    pv_lock_ops=5 | clts=12 read_cr0=13 read_tsc=36 irq_enable_sysexit=39 iret=42 lazy_mode.leave=45 save_fl=47
    irq_enable=50 apic_write=53 startup_ipi_hook=57 read_cr2=60 write_cr3=63 set_pte=80 make_pgd=91
    set_pte_atomic=92 kmap_atomic_pte=99 lazy_mode.leave=101 set_fixmap=102 spin_unlock=107
2.6.28 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_mmu_ops=37 pv_lock_ops=6 | clts=12 read_cr0=13
    read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53 read_cr2=58 write_cr3=61
    set_pte=78 make_pgd=89 lazy_mode.leave=91 set_fixmap=92 spin_unlock=98
2.6.28 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=37 pv_lock_ops=6 |
    clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 lazy_mode.leave=94 set_fixmap=95
    spin_unlock=101
2.6.28 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=44 pv_lock_ops=6
    | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 set_pte_atomic=93 lazy_mode.leave=101
    set_fixmap=102 spin_unlock=108
2.6.28 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=38
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 kmap_atomic_pte=93
    lazy_mode.leave=95 set_fixmap=96 spin_unlock=102
2.6.28 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=45
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 set_pte_atomic=93
    kmap_atomic_pte=100 lazy_mode.leave=102 set_fixmap=103 spin_unlock=109
2.6.29 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_mmu_ops=37 pv_lock_ops=6 | clts=12 read_cr0=13
    read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53 read_cr2=58 write_cr3=61
    set_pte=78 make_pgd=89 lazy_mode.leave=91 set_fixmap=92 spin_unlock=98
2.6.29 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=37 pv_lock_ops=6 |
    clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 lazy_mode.leave=94 set_fixmap=95
    spin_unlock=101
2.6.29 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=44 pv_lock_ops=6
    | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 set_pte_atomic=93 lazy_mode.leave=101
    set_fixmap=102 spin_unlock=108
2.6.29 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=38
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 kmap_atomic_pte=93
    lazy_mode.leave=95 set_fixmap=96 spin_unlock=102
2.6.29 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=45
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=92 set_pte_atomic=93
    kmap_atomic_pte=100 lazy_mode.leave=102 set_fixmap=103 spin_unlock=109
2.6.30 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_mmu_ops=36 pv_lock_ops=6 | clts=12 read_cr0=13
    read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53 read_cr2=58 write_cr3=61
    set_pte=78 make_pgd=88 lazy_mode.leave=90 set_fixmap=91 spin_unlock=97
2.6.30 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=36 pv_lock_ops=6 |
    clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 lazy_mode.leave=93 set_fixmap=94
    spin_unlock=100
2.6.30 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=42 pv_lock_ops=6
    | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 set_pte_atomic=92 lazy_mode.leave=99
    set_fixmap=100 spin_unlock=106
2.6.30 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=37
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 kmap_atomic_pte=92
    lazy_mode.leave=94 set_fixmap=95 spin_unlock=101
2.6.30 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=43
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 lazy_mode.leave=48 save_fl=50
    irq_enable=53 startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 set_pte_atomic=92
    kmap_atomic_pte=98 lazy_mode.leave=100 set_fixmap=101 spin_unlock=107
2.6.31 |  | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_mmu_ops=36 pv_lock_ops=6 | clts=12 read_cr0=13
    read_tsc=39 irq_enable_sysexit=42 iret=45 save_fl=50 irq_enable=53 read_cr2=58 write_cr3=61 set_pte=78
    make_pgd=88 lazy_mode.leave=90 set_fixmap=91 spin_unlock=97
2.6.31 | apic | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=36 pv_lock_ops=6 |
    clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 save_fl=50 irq_enable=53 startup_ipi_hook=58
    read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 lazy_mode.leave=93 set_fixmap=94 spin_unlock=100
2.6.31 | apic pae | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=42 pv_lock_ops=6
    | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 save_fl=50 irq_enable=53 startup_ipi_hook=58
    read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 set_pte_atomic=92 lazy_mode.leave=99 set_fixmap=100
    spin_unlock=106
2.6.31 | apic highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=37
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 kmap_atomic_pte=92 lazy_mode.leave=94
    set_fixmap=95 spin_unlock=101
2.6.31 | apic pae highpte | pv_init_ops=5 pv_time_ops=5 pv_cpu_ops=39 pv_irq_ops=7 pv_apic_ops=3 pv_mmu_ops=43
    pv_lock_ops=6 | clts=12 read_cr0=13 read_tsc=39 irq_enable_sysexit=42 iret=45 save_fl=50 irq_enable=53
    startup_ipi_hook=58 read_cr2=61 write_cr3=64 set_pte=81 make_pgd=91 set_pte_atomic=92 kmap_atomic_pte=98
    lazy_mode.leave=100 set_fixmap=101 spin_unlock=107
2.6.32 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=34 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=69
    make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.32 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=34 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 lazy_mode.leave=82 set_fixmap=83 spin_unlock=89
2.6.32 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=40 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 lazy_mode.leave=88 set_fixmap=89
    spin_unlock=95
2.6.32 | apic highpte | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=35
    pv_lock_ops=6 | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46
    startup_ipi_hook=49 read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 kmap_atomic_pte=81 lazy_mode.leave=83
    set_fixmap=84 spin_unlock=90
2.6.32 | apic pae highpte | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=41
    pv_lock_ops=6 | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46
    startup_ipi_hook=49 read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 kmap_atomic_pte=87
    lazy_mode.leave=89 set_fixmap=90 spin_unlock=96
2.6.33 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=34 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=69
    make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.33 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=34 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 lazy_mode.leave=82 set_fixmap=83 spin_unlock=89
2.6.33 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=40 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 lazy_mode.leave=88 set_fixmap=89
    spin_unlock=95
2.6.33 | apic highpte | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=35
    pv_lock_ops=6 | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46
    startup_ipi_hook=49 read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 kmap_atomic_pte=81 lazy_mode.leave=83
    set_fixmap=84 spin_unlock=90
2.6.33 | apic pae highpte | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=41
    pv_lock_ops=6 | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46
    startup_ipi_hook=49 read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 kmap_atomic_pte=87
    lazy_mode.leave=89 set_fixmap=90 spin_unlock=96
2.6.34 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=34 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=69
    make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.34 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=34 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 lazy_mode.leave=82 set_fixmap=83 spin_unlock=89
2.6.34 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=40 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 lazy_mode.leave=88 set_fixmap=89
    spin_unlock=95
2.6.35 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=34 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=69
    make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.35 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=34 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 lazy_mode.leave=82 set_fixmap=83 spin_unlock=89
2.6.35 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=40 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 lazy_mode.leave=88 set_fixmap=89
    spin_unlock=95
2.6.36 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=34 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=69
    make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.36 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=34 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 lazy_mode.leave=82 set_fixmap=83 spin_unlock=89
2.6.36 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=40 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=70 make_pgd=80 set_pte_atomic=81 lazy_mode.leave=88 set_fixmap=89
    spin_unlock=95
2.6.37 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=33 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=68
    make_pgd=78 lazy_mode.leave=80 set_fixmap=81 spin_unlock=87
2.6.37 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=33 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=69 make_pgd=79 lazy_mode.leave=81 set_fixmap=82 spin_unlock=88
2.6.37 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=39 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=69 make_pgd=79 set_pte_atomic=80 lazy_mode.leave=87 set_fixmap=88
    spin_unlock=94
2.6.38 |  | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_mmu_ops=36 pv_lock_ops=6 | clts=5 read_cr0=6
    read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 read_cr2=49 write_cr3=52 set_pte=68
    make_pgd=81 lazy_mode.leave=83 set_fixmap=84 spin_unlock=90
2.6.38 | apic | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=36 pv_lock_ops=6 |
    clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=69 make_pgd=82 lazy_mode.leave=84 set_fixmap=85 spin_unlock=91
2.6.38 | apic pae | pv_init_ops=1 pv_time_ops=2 pv_cpu_ops=40 pv_irq_ops=6 pv_apic_ops=1 pv_mmu_ops=42 pv_lock_ops=6
    | clts=5 read_cr0=6 read_tsc=33 irq_enable_sysexit=36 iret=39 save_fl=43 irq_enable=46 startup_ipi_hook=49
    read_cr2=50 write_cr3=53 set_pte=69 make_pgd=82 set_pte_atomic=83 lazy_mode.leave=90 set_fixmap=91
    spin_unlock=97
"""
