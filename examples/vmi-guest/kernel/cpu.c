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
struct cpu_tss cpu_tss PAGE_ALIGNED;
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
    if (options.no_pse)
        cpu_features &= ~FEATURE_PSE;
    if (options.no_pge)
        cpu_features &= ~FEATURE_PGE;
    if (options.no_sep)
        cpu_features &= ~FEATURE_SEP;
}

void set_ts(void)
{
    write_cr0(read_cr0() | CR0_TS);
}

/* The map is seen when the TSS says where it is: beyond its limit there is none. */
static bool ports_open;

void port_map_drop(void)
{
    for (u32 at = 0; ports_open && at < sizeof cpu_tss.ports; at++)
        cpu_tss.ports[at] = 0xFF;
    ports_open = false;
    cpu_tss.tss.io_map = 0x8000;
}

void port_map_use(u32 port, bool allowed)
{
    u8 bit = 1 << (port & 7);
    cpu_tss.ports[port / 8] = allowed ? cpu_tss.ports[port / 8] & ~bit : cpu_tss.ports[port / 8] | bit;
    cpu_tss.tss.io_map = OFFSET_OF(struct cpu_tss, ports);
    ports_open = true;
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

    cpu_tss.tss.ss0 = KERNEL_DS;
    cpu_tss.tss.ss1 = KERNEL_CS;
    for (u32 at = 0; at < sizeof cpu_tss.ports; at++)
        cpu_tss.ports[at] = 0xFF;
    port_map_drop();
    load_sp0(&cpu_tss.tss, tasks[0].sp0);
    put_descriptor(GDT_TSS, segment((u32)&cpu_tss, sizeof cpu_tss - 1, ACCESS_TSS, 0));
    load_tr();
    set_ldt(NULL, 0);

    double_fault_tss = (struct tss){
        .esp = (u32)boot_stack_top,
        .eip = (u32)double_fault,
        .eflags = 2,
        .cr3 = (u32)kernel_directory - PAGE_OFFSET,
        .cs = KERNEL_CS,
        .ss = KERNEL_DS,
        .ds = USER_DS,
        .es = USER_DS,
        .fs = KERNEL_PERCPU,
        .io_map = sizeof double_fault_tss,
    };
    put_descriptor(GDT_DOUBLE_FAULT, segment((u32)&double_fault_tss, sizeof double_fault_tss - 1, ACCESS_TSS, 0));

    asm volatile("movl %0, %%gs" ::"r"(0));
    for (u32 number = 0; number < 4; number++)
        set_debugreg(number, 0);
    set_debugreg(6, 0);
    set_debugreg(7, 0);

    set_ts();
}
