/*
 * The slots on the bare machine, and what patching makes of a call there. Names are those of 2.6.32, which is how a
 * tool that reads this kernel's symbols knows which slot is which.
 */
#include "ops.h"
#include "pages.h"

/* Functions whose callers lose nothing but the result. */
#define CALLEE_SAVE_THUNK(function)                   \
    extern void __raw_callee_save_##function(void);   \
    asm(".text\n.globl __raw_callee_save_" #function "\n__raw_callee_save_" #function ":\n\t"  \
        "pushl %ecx; pushl %edx; call " #function "; popl %edx; popl %ecx; ret\n")
#define CALLEE_SAVE(function) {(void *)__raw_callee_save_##function}

u32 native_save_fl(void)
{
    u32 flags;
    asm volatile("pushfl; popl %0" : "=r"(flags)::"memory");
    return flags;
}

void native_restore_fl(u32 flags)
{
    asm volatile("pushl %0; popfl" ::"r"(flags) : "memory", "cc");
}

void native_irq_disable(void)
{
    asm volatile("cli" ::: "memory");
}

void native_irq_enable(void)
{
    asm volatile("sti" ::: "memory");
}

CALLEE_SAVE_THUNK(native_save_fl);
CALLEE_SAVE_THUNK(native_restore_fl);
CALLEE_SAVE_THUNK(native_irq_disable);
CALLEE_SAVE_THUNK(native_irq_enable);

void native_safe_halt(void)
{
    asm volatile("sti; hlt" ::: "memory");
}

void native_halt(void)
{
    asm volatile("hlt" ::: "memory");
}

asm(".text\n.globl native_iret, native_irq_enable_sysexit\n"
    "native_iret: iret\n"
    "native_irq_enable_sysexit: sti; sysexit\n");
extern void native_iret(void), native_irq_enable_sysexit(void);

void native_nop(void)
{
}

u32 _paravirt_ident_32(u32 value)
{
    return value;
}

#define NATIVE_READ(name, instruction)                           \
    u32 name(void)                                               \
    {                                                            \
        u32 value;                                               \
        asm volatile(instruction : "=r"(value)::"memory");       \
        return value;                                            \
    }
#define NATIVE_WRITE(name, type, instruction)                    \
    void name(type value)                                        \
    {                                                            \
        asm volatile(instruction ::"r"(value) : "memory");       \
    }

NATIVE_READ(native_read_cr0, "movl %%cr0, %0")
NATIVE_READ(native_read_cr2, "movl %%cr2, %0")
NATIVE_READ(native_read_cr3, "movl %%cr3, %0")
NATIVE_READ(native_read_cr4, "movl %%cr4, %0")
NATIVE_READ(native_read_cr4_safe, "movl %%cr4, %0")
NATIVE_READ(native_store_tr, "str %0")
NATIVE_WRITE(native_write_cr0, u32, "movl %0, %%cr0")
NATIVE_WRITE(native_write_cr2, u32, "movl %0, %%cr2")
NATIVE_WRITE(native_write_cr3, u32, "movl %0, %%cr3")
NATIVE_WRITE(native_write_cr4, u32, "movl %0, %%cr4")
NATIVE_WRITE(native_load_gdt, const struct table_pointer *, "lgdtl (%0)")
NATIVE_WRITE(native_load_idt, const struct table_pointer *, "lidtl (%0)")
NATIVE_WRITE(native_store_gdt, struct table_pointer *, "sgdtl (%0)")
NATIVE_WRITE(native_store_idt, struct table_pointer *, "sidtl (%0)")
NATIVE_WRITE(native_flush_tlb_single, u32, "invlpg (%0)")

void native_clts(void)
{
    asm volatile("clts");
}

void native_wbinvd(void)
{
    asm volatile("wbinvd" ::: "memory");
}

u32 native_get_debugreg(u32 number)
{
    u32 value = 0;
    switch (number) {
    case 0: asm volatile("movl %%db0, %0" : "=r"(value)); break;
    case 1: asm volatile("movl %%db1, %0" : "=r"(value)); break;
    case 2: asm volatile("movl %%db2, %0" : "=r"(value)); break;
    case 3: asm volatile("movl %%db3, %0" : "=r"(value)); break;
    case 6: asm volatile("movl %%db6, %0" : "=r"(value)); break;
    case 7: asm volatile("movl %%db7, %0" : "=r"(value)); break;
    }
    return value;
}

void native_set_debugreg(u32 number, u32 value)
{
    switch (number) {
    case 0: asm volatile("movl %0, %%db0" ::"r"(value)); break;
    case 1: asm volatile("movl %0, %%db1" ::"r"(value)); break;
    case 2: asm volatile("movl %0, %%db2" ::"r"(value)); break;
    case 3: asm volatile("movl %0, %%db3" ::"r"(value)); break;
    case 6: asm volatile("movl %0, %%db6" ::"r"(value)); break;
    case 7: asm volatile("movl %0, %%db7" ::"r"(value)); break;
    }
}

void native_load_tr_desc(void)
{
    asm volatile("ltr %w0" ::"q"(GDT_TSS * 8));
}

static void put(struct descriptor *table, u32 index, const struct descriptor *value)
{
    table[index] = *value;
}

void native_write_ldt_entry(struct descriptor *table, u32 index, const struct descriptor *value)
{
    put(table, index, value);
}

void native_write_gdt_entry(struct descriptor *table, u32 index, const struct descriptor *value, u32 type)
{
    (void)type;
    put(table, index, value);
}

void native_write_idt_entry(struct descriptor *table, u32 index, const struct descriptor *value)
{
    put(table, index, value);
}

void native_set_ldt(const void *base, u32 entries)
{
    if (entries) {
        struct descriptor value = segment((u32)base, entries * 8 - 1, ACCESS_LDT, 0);
        write_gdt_entry(gdt, GDT_LDT, value.low, value.high);
    }
    asm volatile("lldt %w0" ::"q"(entries ? GDT_LDT * 8 : 0));
}

void native_load_tls(const struct descriptor *tls, u32 cpu)
{
    (void)cpu;
    put(gdt, GDT_TLS, tls);
}

void native_load_sp0(struct tss *task, struct thread_stack *stack)
{
    task->esp0 = stack->sp0;
}

void native_set_iopl_mask(u32 mask)
{
    asm volatile("pushfl; andl $0xffffcfff, (%%esp); orl %0, (%%esp); popfl" ::"r"(mask) : "memory", "cc");
}

void native_io_delay(void)
{
    asm volatile("outb %%al, $0x80" ::: "memory");
}

void native_cpuid(u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
    asm volatile("cpuid" : "=a"(*eax), "=b"(*ebx), "=c"(*ecx), "=d"(*edx) : "0"(*eax), "2"(*ecx));
}

/* With the exception table: a register that is not there is an error, not the end. */
u64 native_read_msr_safe(u32 msr, s32 *error)
{
    u64 value;
    asm volatile("1:\trdmsr\n2:\n\t"
                 ".pushsection .fixup, \"ax\"\n3:\tmovl %[fault], %[error]\n\t"
                 "xorl %%eax, %%eax\n\txorl %%edx, %%edx\n\tjmp 2b\n\t.popsection\n\t"
                 ".pushsection __ex_table, \"a\"\n\t.balign 4\n\t.long 1b, 3b\n\t.popsection"
                 : "=A"(value), [error] "=r"(*error)
                 : "c"(msr), "1"(0), [fault] "i"(-14));
    return value;
}

s32 native_write_msr_safe(u32 msr, u32 low, u32 high)
{
    s32 error;
    asm volatile("1:\twrmsr\n2:\n\t"
                 ".pushsection .fixup, \"ax\"\n3:\tmovl %[fault], %[error]\n\tjmp 2b\n\t.popsection\n\t"
                 ".pushsection __ex_table, \"a\"\n\t.balign 4\n\t.long 1b, 3b\n\t.popsection"
                 : [error] "=r"(error)
                 : "c"(msr), "a"(low), "d"(high), "0"(0), [fault] "i"(-14)
                 : "memory");
    return error;
}

u64 native_read_tsc(void)
{
    u64 value;
    asm volatile("rdtsc" : "=A"(value));
    return value;
}

u64 native_read_pmc(s32 counter)
{
    u64 value;
    asm volatile("rdpmc" : "=A"(value) : "c"(counter));
    return value;
}

u64 native_sched_clock(void)
{
    return native_read_tsc();
}

u32 native_calibrate_tsc(void)
{
    return 0;
}

void native_flush_tlb(void)
{
    native_write_cr3(native_read_cr3());
}

void native_flush_tlb_global(void)
{
    u32 cr4 = native_read_cr4();
    native_write_cr4(cr4 & ~0x80);
    native_write_cr4(cr4);
    native_flush_tlb();
}

/* Of an entry of eight bytes the half with the present bit is written last. */
static void store(pte *entry, pte value)
{
#ifdef PAE
    volatile u32 *half = (volatile u32 *)entry;
    half[1] = (u32)(value >> 32);
    half[0] = (u32)value;
#else
    *(volatile u32 *)entry = value;
#endif
}

void native_set_pte(pte *entry, pte value)
{
    store(entry, value);
}

void native_set_pte_at(struct address_space *space, u32 address, pte *entry, pte value)
{
    (void)space;
    (void)address;
    store(entry, value);
}

void native_set_pmd(pte *entry, pte value)
{
    store(entry, value);
}

#ifdef PAE
void native_store_at_once(pte *entry, pte value)
{
    pte old = *entry;
    asm volatile("1:\tlock cmpxchg8b %0\n\tjne 1b"
                 : "+m"(*entry), "+A"(old)
                 : "b"((u32)value), "c"((u32)(value >> 32))
                 : "memory", "cc");
}

void native_set_pte_atomic(pte *entry, pte value)
{
    native_store_at_once(entry, value);
}

void native_set_pud(pte *entry, pte value)
{
    native_store_at_once(entry, value);
}

/* And cleared first. */
void native_pmd_clear(pte *entry)
{
    volatile u32 *half = (volatile u32 *)entry;
    half[0] = 0;
    half[1] = 0;
}

void native_pte_clear(struct address_space *space, u32 address, pte *entry)
{
    (void)space;
    (void)address;
    native_pmd_clear(entry);
}

u64 _paravirt_ident_64(u64 value)
{
    return value;
}

#define IDENTITY {(void *)_paravirt_ident_64}
#else
#define IDENTITY {(void *)_paravirt_ident_32}
#endif

void native_set_fixmap(u32 index, u32 frame, u32 flags)
{
    set_fixmap(index, frame, flags);
}

#define NOP ((void *)native_nop)

struct pv_info pv_info = {.name = "bare hardware"};
struct pv_init_ops pv_init_ops = {.patch = native_patch};
struct pv_time_ops pv_time_ops = {native_sched_clock, native_calibrate_tsc};

struct pv_cpu_ops pv_cpu_ops = {
    .get_debugreg = native_get_debugreg,
    .set_debugreg = native_set_debugreg,
    .clts = native_clts,
    .read_cr0 = native_read_cr0,
    .write_cr0 = native_write_cr0,
    .read_cr4_safe = native_read_cr4_safe,
    .read_cr4 = native_read_cr4,
    .write_cr4 = native_write_cr4,
    .load_tr_desc = native_load_tr_desc,
    .load_gdt = native_load_gdt,
    .load_idt = native_load_idt,
    .store_gdt = native_store_gdt,
    .store_idt = native_store_idt,
    .set_ldt = native_set_ldt,
    .store_tr = native_store_tr,
    .load_tls = native_load_tls,
    .write_ldt_entry = native_write_ldt_entry,
    .write_gdt_entry = native_write_gdt_entry,
    .write_idt_entry = native_write_idt_entry,
    .alloc_ldt = NOP,
    .free_ldt = NOP,
    .load_sp0 = native_load_sp0,
    .set_iopl_mask = native_set_iopl_mask,
    .wbinvd = native_wbinvd,
    .io_delay = native_io_delay,
    .cpuid = native_cpuid,
    .read_msr = native_read_msr_safe,
    .write_msr = native_write_msr_safe,
    .read_tsc = native_read_tsc,
    .read_pmc = native_read_pmc,
    .irq_enable_sysexit = native_irq_enable_sysexit,
    .iret = native_iret,
    .start_context_switch = NOP,
    .end_context_switch = NOP,
};

struct pv_irq_ops pv_irq_ops = {
    .save_fl = CALLEE_SAVE(native_save_fl),
    .restore_fl = CALLEE_SAVE(native_restore_fl),
    .irq_disable = CALLEE_SAVE(native_irq_disable),
    .irq_enable = CALLEE_SAVE(native_irq_enable),
    .safe_halt = native_safe_halt,
    .halt = native_halt,
};

struct pv_apic_ops pv_apic_ops = {.startup_ipi_hook = NOP};

struct pv_mmu_ops pv_mmu_ops = {
    .read_cr2 = native_read_cr2,
    .write_cr2 = native_write_cr2,
    .read_cr3 = native_read_cr3,
    .write_cr3 = native_write_cr3,
    .activate_mm = NOP,
    .dup_mmap = NOP,
    .exit_mmap = NOP,
    .flush_tlb_user = native_flush_tlb,
    .flush_tlb_kernel = native_flush_tlb_global,
    .flush_tlb_single = native_flush_tlb_single,
    .alloc_pte = NOP,
    .alloc_pmd = NOP,
    .alloc_pmd_clone = NOP,
    .alloc_pud = NOP,
    .release_pte = NOP,
    .release_pmd = NOP,
    .release_pud = NOP,
    .set_pte = native_set_pte,
    .set_pte_at = native_set_pte_at,
    .set_pmd = native_set_pmd,
    .pte_update = NOP,
    .pte_update_defer = NOP,
    .pte_val = IDENTITY,
    .make_pte = IDENTITY,
    .pgd_val = IDENTITY,
    .make_pgd = IDENTITY,
#ifdef PAE
    .set_pte_atomic = native_set_pte_atomic,
    .pte_clear = native_pte_clear,
    .pmd_clear = native_pmd_clear,
    .set_pud = native_set_pud,
    .pmd_val = IDENTITY,
    .make_pmd = IDENTITY,
#endif
    .lazy_mode = {NOP, NOP},
    .set_fixmap = native_set_fixmap,
};

u32 native_apic_mem_read(u32 offset)
{
    return *(volatile u32 *)(fixmap_address(FIX_APIC) + offset);
}

void native_apic_mem_write(u32 offset, u32 value)
{
    *(volatile u32 *)(fixmap_address(FIX_APIC) + offset) = value;
}

u64 native_get_wallclock(void)
{
    return (u64)battery_clock_seconds() * 1000000000;
}

struct apic_ops apic = {native_apic_mem_read, native_apic_mem_write};
struct platform_ops platform = {.wallclock = native_get_wallclock};
struct vmi_timer_ops vmi_timer_ops;
