/*
 * Slots for sensitive operations, as 32-bit Linux 2.6.32 has them (UP, local APIC, with and without PAE): the
 * objects, the order of their members, and so the numbers in .parainstructions are those of that kernel.
 */
#ifndef PARAVIRT_H
#define PARAVIRT_H

#include "descriptors.h"
#include "slots.h"
#include "types.h"

struct thread_stack {
    u32 sp0;
};

struct address_space;

/* A function that keeps every register but its result; the slots of these hold such thunks. */
struct callee_save {
    void *function;
};

struct pv_info {
    u32 kernel_rpl;
    bool enabled;
    const char *name;
};

struct pv_init_ops {
    u32 (*patch)(u8 type, u16 clobbers, void *buffer, u32 address, u32 length);
};

struct pv_time_ops {
    u64 (*sched_clock)(void);
    u32 (*get_tsc_khz)(void);
};

struct pv_cpu_ops {
    u32 (*get_debugreg)(u32 number);
    void (*set_debugreg)(u32 number, u32 value);
    void (*clts)(void);
    u32 (*read_cr0)(void);
    void (*write_cr0)(u32 value);
    u32 (*read_cr4_safe)(void);
    u32 (*read_cr4)(void);
    void (*write_cr4)(u32 value);
    void (*load_tr_desc)(void);
    void (*load_gdt)(const struct table_pointer *table);
    void (*load_idt)(const struct table_pointer *table);
    void (*store_gdt)(struct table_pointer *table);
    void (*store_idt)(struct table_pointer *table);
    void (*set_ldt)(const void *base, u32 entries);
    u32 (*store_tr)(void);
    void (*load_tls)(const struct descriptor *tls, u32 cpu);
    void (*write_ldt_entry)(struct descriptor *table, u32 index, const struct descriptor *value);
    void (*write_gdt_entry)(struct descriptor *table, u32 index, const struct descriptor *value, u32 type);
    void (*write_idt_entry)(struct descriptor *table, u32 index, const struct descriptor *value);
    void (*alloc_ldt)(struct descriptor *table, u32 entries);
    void (*free_ldt)(struct descriptor *table, u32 entries);
    void (*load_sp0)(struct tss *tss, struct thread_stack *stack);
    void (*set_iopl_mask)(u32 mask);
    void (*wbinvd)(void);
    void (*io_delay)(void);
    void (*cpuid)(u32 *eax, u32 *ebx, u32 *ecx, u32 *edx);
    u64 (*read_msr)(u32 msr, s32 *error);
    s32 (*rdmsr_regs)(u32 *registers);
    s32 (*write_msr)(u32 msr, u32 low, u32 high);
    s32 (*wrmsr_regs)(u32 *registers);
    u64 (*read_tsc)(void);
    u64 (*read_pmc)(s32 counter);
    u64 (*read_tscp)(u32 *aux);
    void (*irq_enable_sysexit)(void);
    void (*usergs_sysret64)(void);
    void (*usergs_sysret32)(void);
    void (*iret)(void);
    void (*swapgs)(void);
    void (*start_context_switch)(void *previous);
    void (*end_context_switch)(void *next);
};

struct pv_irq_ops {
    struct callee_save save_fl, restore_fl, irq_disable, irq_enable;
    void (*safe_halt)(void);
    void (*halt)(void);
};

struct pv_apic_ops {
    void (*startup_ipi_hook)(u32 apic, u32 start_eip, u32 start_esp);
};

struct pv_mmu_ops {
    u32 (*read_cr2)(void);
    void (*write_cr2)(u32 value);
    u32 (*read_cr3)(void);
    void (*write_cr3)(u32 value);
    void (*activate_mm)(void *previous, void *next);
    void (*dup_mmap)(void *old, void *mm);
    void (*exit_mmap)(void *mm);
    void (*flush_tlb_user)(void);
    void (*flush_tlb_kernel)(void);
    void (*flush_tlb_single)(u32 address);
    void (*flush_tlb_others)(const void *cpus, void *mm, u32 address);
    s32 (*pgd_alloc)(void *mm);
    void (*pgd_free)(void *mm, void *pgd);
    void (*alloc_pte)(struct address_space *mm, u32 frame);
    void (*alloc_pmd)(struct address_space *mm, u32 frame);
    void (*alloc_pmd_clone)(u32 frame, u32 source, u32 start, u32 count);
    void (*alloc_pud)(struct address_space *mm, u32 frame);
    void (*release_pte)(u32 frame);
    void (*release_pmd)(u32 frame);
    void (*release_pud)(u32 frame);
    void (*set_pte)(pte *entry, pte value);
    void (*set_pte_at)(struct address_space *mm, u32 address, pte *entry, pte value);
    void (*set_pmd)(pte *entry, pte value);
    void (*pte_update)(struct address_space *mm, u32 address, pte *entry);
    void (*pte_update_defer)(struct address_space *mm, u32 address, pte *entry);
    pte (*ptep_modify_prot_start)(struct address_space *mm, u32 address, pte *entry);
    void (*ptep_modify_prot_commit)(struct address_space *mm, u32 address, pte *entry, pte value);
    struct callee_save pte_val, make_pte, pgd_val, make_pgd;
#ifdef PAE
    void (*set_pte_atomic)(pte *entry, pte value);
    void (*pte_clear)(struct address_space *mm, u32 address, pte *entry);
    void (*pmd_clear)(pte *entry);
    void (*set_pud)(pte *entry, pte value);
    struct callee_save pmd_val, make_pmd;
#endif
    struct {
        void (*enter)(void);
        void (*leave)(void);
    } lazy_mode;
    void (*set_fixmap)(u32 index, u32 frame, u32 flags);
};

/* What a type in .parainstructions counts through: as if the objects lay one behind the other. */
struct paravirt_patch_template {
    struct pv_init_ops pv_init_ops;
    struct pv_time_ops pv_time_ops;
    struct pv_cpu_ops pv_cpu_ops;
    struct pv_irq_ops pv_irq_ops;
    struct pv_apic_ops pv_apic_ops;
    struct pv_mmu_ops pv_mmu_ops;
};

extern struct pv_info pv_info;
extern struct pv_init_ops pv_init_ops;
extern struct pv_time_ops pv_time_ops;
extern struct pv_cpu_ops pv_cpu_ops;
extern struct pv_irq_ops pv_irq_ops;
extern struct pv_apic_ops pv_apic_ops;
extern struct pv_mmu_ops pv_mmu_ops;

/* Outside the template in 2.6.32, and so without annotations: the APIC driver, the timer, the clock. */
struct apic_ops {
    u32 (*read)(u32 offset);
    void (*write)(u32 offset, u32 value);
};

struct platform_ops {
    u64 (*wallclock)(void);
    void (*timer_init)(void);
    void (*setup_percpu_clockev)(void);
};

extern struct apic_ops apic;
extern struct platform_ops platform;

#define PV_TYPE(slot) (OFFSET_OF(struct paravirt_patch_template, slot) / sizeof(void *))

_Static_assert(PV_TYPE(pv_cpu_ops) == PV_CPU_FIRST, "pv_cpu_ops");
_Static_assert(PV_TYPE(pv_irq_ops) == PV_IRQ_FIRST, "pv_irq_ops");
_Static_assert(PV_TYPE(pv_cpu_ops.read_cr0) == PV_CPU_READ_CR0, "read_cr0");
_Static_assert(PV_TYPE(pv_cpu_ops.irq_enable_sysexit) == PV_CPU_IRQ_ENABLE_SYSEXIT, "irq_enable_sysexit");
_Static_assert(PV_TYPE(pv_cpu_ops.iret) == PV_CPU_IRET, "iret");
_Static_assert(PV_TYPE(pv_irq_ops.irq_disable) == PV_IRQ_DISABLE, "irq_disable");
_Static_assert(PV_TYPE(pv_irq_ops.irq_enable) == PV_IRQ_ENABLE, "irq_enable");
_Static_assert(PV_TYPE(pv_mmu_ops.set_pte) == 70, "set_pte");

/* An entry of .parainstructions. */
struct paravirt_site {
    u8 *address;
    u8 type, length;
    u16 clobbers;
};

extern struct paravirt_site __parainstructions[], __parainstructions_end[];

void apply_paravirt(struct paravirt_site *first, struct paravirt_site *end);
u32 native_patch(u8 type, u16 clobbers, void *buffer, u32 address, u32 length);
void native_nop(void);

#endif
