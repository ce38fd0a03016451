/* The processor: features, descriptor tables, control registers. */
#include "kernel.h"
#include "ops.h"
#include "task.h"

struct descriptor early_gdt[GDT_ENTRIES] PAGE_ALIGNED = {
    [GDT_KERNEL_CS] = {0x0000FFFF, 0x00CF9A00},
    [GDT_KERNEL_DS] = {0x0000FFFF, 0x00CF9200},
    [GDT_USER_CS] = {0x0000FFFF, 0x00CFFA00},
    [GDT_USER_DS] = {0x0000FFFF, 0x00CFF200},
    [GDT_PERCPU] = {0x0000FFFF, 0x00CF9200},
};
struct descriptor gdt[GDT_ENTRIES] PAGE_ALIGNED;
struct descriptor idt[256] PAGE_ALIGNED;
struct descriptor ldt[512] PAGE_ALIGNED;
struct tss tss PAGE_ALIGNED;
struct tss double_fault_tss PAGE_ALIGNED;

u32 kernel_rpl, cpu_features;

/* What FS points at: the current task. */
struct task *percpu[4];

#define CR0_TS 8

void cpu_identify(void)
{
    u32 out[4];
    cpuid(1, 0, out);
    cpu_features = out[3];
}

void set_ts(void)
{
    write_cr0(read_cr0() | CR0_TS);
}

static void put_descriptor(u32 index, struct descriptor value)
{
    write_gdt_entry(gdt, index, value.low, value.high);
}

extern void double_fault(void);
extern u8 boot_stack_top[];

/* A GDT of its own, per-CPU data behind FS, the TSS, no LDT, clean debug registers, no FPU yet. */
void cpu_init(void)
{
    struct table_pointer pointer = {sizeof gdt - 1, (u32)gdt};

    for (u32 index = 0; index < GDT_ENTRIES; index++)
        gdt[index] = early_gdt[index];
    gdt[GDT_PERCPU] = segment((u32)percpu, 0xFFFFF, 0x92, 0xC);
    load_gdt(&pointer);
    asm volatile("movl %0, %%fs" ::"r"(KERNEL_PERCPU));
    asm volatile("ljmp %0, $1f\n1:" ::"i"(KERNEL_CS));

    tss.ss0 = KERNEL_DS;
    tss.ss1 = KERNEL_CS;
    tss.io_map = sizeof tss;
    load_sp0(&tss, tasks[0].sp0);
    put_descriptor(GDT_TSS, segment((u32)&tss, sizeof tss - 1, ACCESS_TSS, 0));
    load_tr();
    set_ldt(NULL, 0);

    double_fault_tss = (struct tss){
        .esp = (u32)boot_stack_top, .ss = KERNEL_DS, .cs = KERNEL_CS, .ds = USER_DS, .es = USER_DS, .fs = KERNEL_PERCPU,
        .eip = (u32)double_fault, .eflags = 2, .cr3 = (u32)kernel_directory - PAGE_OFFSET, .io_map = sizeof tss,
    };
    put_descriptor(GDT_DOUBLE_FAULT, segment((u32)&double_fault_tss, sizeof tss - 1, ACCESS_TSS, 0));

    asm volatile("movl %0, %%gs" ::"r"(0));
    for (u32 number = 0; number < 4; number++)
        set_debugreg(number, 0);
    set_debugreg(6, 0);
    set_debugreg(7, 0);

    set_ts();
}
