/*
 * Sensitive operations as calls through paravirt slots, each noted in .parainstructions.
 *
 * Arguments are in EAX, EDX, ECX; a fourth is pushed outside of the site, whose six bytes are the call alone.
 */
#ifndef PVSITES_H
#define PVSITES_H

#include "paravirt.h"

#define PV_SITE                                        \
    "771:\tcall *%c[slot]\n772:\n\t"                   \
    ".pushsection .parainstructions, \"a\"\n\t"        \
    ".balign 4\n\t"                                    \
    ".long 771b\n\t"                                   \
    ".byte %c[type], 772b - 771b\n\t"                  \
    ".short %c[lost]\n\t"                              \
    ".popsection"

#define PV_SLOT(op, clobbers) [slot] "i"(&op), [type] "i"(PV_TYPE(op)), [lost] "i"(clobbers)
#define PV_LOST "memory", "cc"

/* Calls that lose EAX, EDX and ECX; each argument fits a register. */
#define PV_CALL(op, eax, edx, ecx)                                                               \
    ({                                                                                           \
        u32 a_ = (u32)(eax), d_ = (u32)(edx), c_ = (u32)(ecx);                                   \
        asm volatile(PV_SITE : "+a"(a_), "+d"(d_), "+c"(c_) : PV_SLOT(op, CLBR_ANY) : PV_LOST);  \
        (u64) d_ << 32 | a_;                                                                     \
    })

#define PV_CALL4(op, eax, edx, ecx, fourth)                                                                       \
    ({                                                                                                            \
        u32 a_ = (u32)(eax), d_ = (u32)(edx), c_ = (u32)(ecx);                                                    \
        asm volatile("pushl %[last]\n\t" PV_SITE "\n\tleal 4(%%esp), %%esp"                                       \
                     : "+a"(a_), "+d"(d_), "+c"(c_)                                                               \
                     : PV_SLOT(op, CLBR_ANY), [last] "r"((u32)(fourth))                                           \
                     : PV_LOST);                                                                                  \
    })

/* Calls of thunks that keep ECX. */
#define PV_CALLEE(op, argument)                                                                  \
    ({                                                                                           \
        u32 a_ = (u32)(argument), d_;                                                            \
        asm volatile(PV_SITE : "+a"(a_), "=d"(d_) : PV_SLOT(op, CLBR_RET) : PV_LOST);            \
        (void)d_;                                                                                \
        a_;                                                                                      \
    })

#define PV_TAKES(name, type, op)               \
    static inline void name(type value)        \
    {                                          \
        PV_CALL(op, value, 0, 0);              \
    }
#define PV_GIVES(name, op)                     \
    static inline u32 name(void)               \
    {                                          \
        return (u32)PV_CALL(op, 0, 0, 0);      \
    }
#define PV_DOES(name, op)                      \
    static inline void name(void)              \
    {                                          \
        PV_CALL(op, 0, 0, 0);                  \
    }

static inline void irq_enable(void)
{
    PV_CALLEE(pv_irq_ops.irq_enable, 0);
}

static inline void irq_disable(void)
{
    PV_CALLEE(pv_irq_ops.irq_disable, 0);
}

static inline u32 save_fl(void)
{
    return PV_CALLEE(pv_irq_ops.save_fl, 0);
}

static inline void restore_fl(u32 flags)
{
    PV_CALLEE(pv_irq_ops.restore_fl, flags);
}

/* The site of C code before 2.6.30, which keeps ECX and EDX around the call. */
static inline u32 save_fl_long(void)
{
    u32 flags;
    asm volatile("771:\tpushl %%ecx\n\tpushl %%edx\n\tcall *%c[slot]\n\tpopl %%edx\n\tpopl %%ecx\n772:\n\t"
                 ".pushsection .parainstructions, \"a\"\n\t.balign 4\n\t.long 771b\n\t"
                 ".byte %c[type], 772b - 771b\n\t.short %c[lost]\n\t.popsection"
                 : "=a"(flags)
                 : PV_SLOT(pv_irq_ops.save_fl, CLBR_EAX)
                 : PV_LOST);
    return flags;
}

PV_DOES(safe_halt, pv_irq_ops.safe_halt)
PV_DOES(plain_halt, pv_irq_ops.halt)
PV_DOES(clts, pv_cpu_ops.clts)
PV_DOES(wbinvd, pv_cpu_ops.wbinvd)
PV_TAKES(write_cr0, u32, pv_cpu_ops.write_cr0)
PV_TAKES(write_cr2, u32, pv_mmu_ops.write_cr2)
PV_TAKES(write_cr3, u32, pv_mmu_ops.write_cr3)
PV_TAKES(write_cr4, u32, pv_cpu_ops.write_cr4)
PV_GIVES(read_cr0, pv_cpu_ops.read_cr0)
PV_GIVES(read_cr2, pv_mmu_ops.read_cr2)
PV_GIVES(read_cr3, pv_mmu_ops.read_cr3)
PV_GIVES(read_cr4, pv_cpu_ops.read_cr4)
PV_TAKES(load_gdt, const struct table_pointer *, pv_cpu_ops.load_gdt)
PV_TAKES(load_idt, const struct table_pointer *, pv_cpu_ops.load_idt)
PV_TAKES(store_gdt, struct table_pointer *, pv_cpu_ops.store_gdt)
PV_TAKES(store_idt, struct table_pointer *, pv_cpu_ops.store_idt)
PV_DOES(load_tr, pv_cpu_ops.load_tr_desc)
PV_GIVES(store_tr, pv_cpu_ops.store_tr)
PV_TAKES(set_iopl_mask, u32, pv_cpu_ops.set_iopl_mask)
PV_DOES(flush_tlb_user, pv_mmu_ops.flush_tlb_user)
PV_DOES(flush_tlb_kernel, pv_mmu_ops.flush_tlb_kernel)
PV_TAKES(flush_tlb_single, u32, pv_mmu_ops.flush_tlb_single)
PV_DOES(lazy_mmu_enter, pv_mmu_ops.lazy_mode.enter)
PV_DOES(lazy_mmu_leave, pv_mmu_ops.lazy_mode.leave)
PV_TAKES(release_pt, u32, pv_mmu_ops.release_pte)
PV_TAKES(release_pd, u32, pv_mmu_ops.release_pmd)

static inline void cpuid(u32 leaf, u32 sub, u32 out[4])
{
    out[0] = leaf;
    out[2] = sub;
    PV_CALL4(pv_cpu_ops.cpuid, &out[0], &out[1], &out[2], &out[3]);
}

static inline u64 read_msr(u32 msr)
{
    s32 error;
    return PV_CALL(pv_cpu_ops.read_msr, msr, &error, 0);
}

static inline void write_msr(u32 msr, u64 value)
{
    PV_CALL(pv_cpu_ops.write_msr, msr, (u32)value, (u32)(value >> 32));
}

static inline u64 read_tsc(void)
{
    return PV_CALL(pv_cpu_ops.read_tsc, 0, 0, 0);
}

static inline void cpu_pause(void)
{
    asm volatile("pause");
}

static inline u32 get_debugreg(u32 number)
{
    return (u32)PV_CALL(pv_cpu_ops.get_debugreg, number, 0, 0);
}

static inline void set_debugreg(u32 number, u32 value)
{
    PV_CALL(pv_cpu_ops.set_debugreg, number, value, 0);
}

static inline void set_ldt(const void *base, u32 entries)
{
    PV_CALL(pv_cpu_ops.set_ldt, base, entries, 0);
}

static inline void load_tls(const struct descriptor *tls)
{
    PV_CALL(pv_cpu_ops.load_tls, tls, 0, 0);
}

static inline void write_gdt_entry(struct descriptor *table, u32 index, u32 low, u32 high)
{
    struct descriptor value = {low, high};
    PV_CALL4(pv_cpu_ops.write_gdt_entry, table, index, &value, high >> 8 & 0x1F);
}

static inline void write_ldt_entry(struct descriptor *table, u32 index, u32 low, u32 high)
{
    struct descriptor value = {low, high};
    PV_CALL(pv_cpu_ops.write_ldt_entry, table, index, &value);
}

static inline void write_idt_entry(struct descriptor *table, u32 index, u32 low, u32 high)
{
    struct descriptor value = {low, high};
    PV_CALL(pv_cpu_ops.write_idt_entry, table, index, &value);
}

static inline void load_sp0(struct tss *task, u32 esp0)
{
    struct thread_stack stack = {esp0};
    PV_CALL(pv_cpu_ops.load_sp0, task, &stack, 0);
}

static inline void lazy_cpu_enter(void)
{
    PV_CALL(pv_cpu_ops.start_context_switch, 0, 0, 0);
}

static inline void lazy_cpu_leave(void)
{
    PV_CALL(pv_cpu_ops.end_context_switch, 0, 0, 0);
}

/* The delay is called without an annotation in 2.6.32, and so is the APIC. */
static inline void io_delay(void)
{
    pv_cpu_ops.io_delay();
}

static inline u32 apic_read(u32 offset)
{
    return apic.read(offset);
}

static inline void apic_write(u32 offset, u32 value)
{
    apic.write(offset, value);
}

static inline void startup_ipi_hook(u32 id, u32 eip, u32 esp)
{
    PV_CALL(pv_apic_ops.startup_ipi_hook, id, eip, esp);
}

/* Not an operation with a slot: whoever maps page tables elsewhere calls it. Does nothing without a ROM. */
void set_linear_mapping(u32 slot, u32 address, u32 pages, u32 frame);

/* Page tables. Values pass through the identity slots, which patching turns into nothing. */

#ifdef PAE

#define PV_CALLEE_LONG(op, argument)                                                             \
    ({                                                                                           \
        u64 v_ = (argument);                                                                     \
        asm volatile(PV_SITE : "+A"(v_) : PV_SLOT(op, CLBR_RET) : PV_LOST);                      \
        v_;                                                                                      \
    })

static inline pte get_entry(pte *entry)
{
    return PV_CALLEE_LONG(pv_mmu_ops.pte_val, *(volatile pte *)entry);
}

static inline void set_pte(pte *entry, pte value)
{
    value = PV_CALLEE_LONG(pv_mmu_ops.make_pte, value);
    PV_CALL(pv_mmu_ops.set_pte, entry, (u32)value, (u32)(value >> 32));
}

static inline void set_pte_atomic(pte *entry, pte value)
{
    PV_CALL(pv_mmu_ops.set_pte_atomic, entry, (u32)value, (u32)(value >> 32));
}

/* Five words of arguments: 2.6.32 calls this one without an annotation. */
static inline void set_pte_at(struct address_space *mm, u32 address, pte *entry, pte value)
{
    if (value)
        pv_mmu_ops.set_pte_at(mm, address, entry, value);
    else
        PV_CALL(pv_mmu_ops.pte_clear, mm, address, entry);
}

static inline void set_pmd(pte *entry, pte value)
{
    if (value) {
        value = PV_CALLEE_LONG(pv_mmu_ops.make_pmd, value);
        PV_CALL(pv_mmu_ops.set_pmd, entry, (u32)value, (u32)(value >> 32));
    } else {
        PV_CALL(pv_mmu_ops.pmd_clear, entry, 0, 0);
    }
}

static inline void set_pud(pte *entry, pte value)
{
    PV_CALL(pv_mmu_ops.set_pud, entry, (u32)value, (u32)(value >> 32));
}

#else

static inline pte get_entry(pte *entry)
{
    return PV_CALLEE(pv_mmu_ops.pte_val, *(volatile pte *)entry);
}

static inline void set_pte(pte *entry, pte value)
{
    PV_CALL(pv_mmu_ops.set_pte, entry, PV_CALLEE(pv_mmu_ops.make_pte, value), 0);
}

static inline void set_pte_at(struct address_space *mm, u32 address, pte *entry, pte value)
{
    PV_CALL4(pv_mmu_ops.set_pte_at, mm, address, entry, value);
}

static inline void set_pmd(pte *entry, pte value)
{
    PV_CALL(pv_mmu_ops.set_pmd, entry, value, 0);
}

#endif

static inline void pte_update(struct address_space *mm, u32 address, pte *entry)
{
    PV_CALL(pv_mmu_ops.pte_update, mm, address, entry);
}

static inline void pte_update_defer(struct address_space *mm, u32 address, pte *entry)
{
    PV_CALL(pv_mmu_ops.pte_update_defer, mm, address, entry);
}

static inline void alloc_pt(u32 frame)
{
    PV_CALL(pv_mmu_ops.alloc_pte, 0, frame, 0);
}

static inline void alloc_pd(u32 frame)
{
    PV_CALL(pv_mmu_ops.alloc_pmd, 0, frame, 0);
}

static inline void alloc_pd_clone(u32 frame, u32 source, u32 start, u32 count)
{
    PV_CALL4(pv_mmu_ops.alloc_pmd_clone, frame, source, start, count);
}

/* Ports are no paravirt operations: natively executed, and emulated where the kernel may not. */

#define PORT_IO(type, in, in_native, out, out_native, ins, ins_native, outs, outs_native)        \
    static inline type in(u16 port)                                                              \
    {                                                                                            \
        type value;                                                                              \
        asm volatile(in_native : "=a"(value) : "d"(port));                                       \
        return value;                                                                            \
    }                                                                                            \
    static inline void out(u16 port, type value)                                                 \
    {                                                                                            \
        asm volatile(out_native ::"a"(value), "d"(port));                                        \
    }                                                                                            \
    static inline void ins(u16 port, void *buffer, u32 count)                                    \
    {                                                                                            \
        asm volatile(ins_native : "+D"(buffer), "+c"(count) : "d"(port) : "memory");             \
    }                                                                                            \
    static inline void outs(u16 port, const void *buffer, u32 count)                             \
    {                                                                                            \
        asm volatile(outs_native : "+S"(buffer), "+c"(count) : "d"(port) : "memory");            \
    }

PORT_IO(u8, inb, "inb %%dx, %%al", outb, "outb %%al, %%dx", insb, "rep insb", outsb, "rep outsb")
PORT_IO(u16, inw, "inw %%dx, %%ax", outw, "outw %%ax, %%dx", insw, "rep insw", outsw, "rep outsw")
PORT_IO(u32, inl, "inl %%dx, %%eax", outl, "outl %%eax, %%dx", insl, "rep insl", outsl, "rep outsl")

#endif
