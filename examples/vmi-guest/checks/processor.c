/* Control registers, CPUID, MSRs, the time stamp, and what a kernel does outside of the interface. */
#include "checks.h"

#define CR0_TS 8
#define CR0_AM 0x40000
#define CR4_DE 8
#define MSR_APIC_BASE 0x1B
#define MSR_SYSENTER_ESP 0x175
#define MSR_PAT 0x277
#define FEATURE_PAT (1u << 16)

extern pte kernel_directory[];

void check_control_registers(void)
{
    const char *name = "control registers";
    u32 cr0 = read_cr0(), cr4 = read_cr4();

    EXPECT(name, "paging and protection in CR0", cr0 & 0x80010001, 0x80010001);
    write_cr0(cr0 & ~CR0_AM);
    EXPECT(name, "CR0 without AM", read_cr0() & CR0_AM, 0);
    write_cr0(cr0);
    EXPECT(name, "CR0", read_cr0(), cr0);
    clts();
    EXPECT(name, "TS when cleared", read_cr0() & CR0_TS, 0);
    set_ts();
    EXPECT(name, "TS when set", read_cr0() & CR0_TS, CR0_TS);
    write_cr2(0x12345678);
    EXPECT(name, "CR2", read_cr2(), 0x12345678);
    EXPECT(name, "CR3", read_cr3(), (u32)kernel_directory - PAGE_OFFSET);
    write_cr4(cr4 | CR4_DE);
    EXPECT(name, "CR4 with DE", read_cr4(), cr4 | CR4_DE);
    write_cr4(cr4);
    EXPECT(name, "CR4", read_cr4(), cr4);
    wbinvd();
    passed(name);
}

void check_identity(void)
{
    const char *name = "CPUID";
    u32 out[4];
    cpuid(0, 0, out);
    EXPECT(name, "leaf 1", out[0] >= 1, true);
    cpuid(1, 0, out);
    EXPECT(name, "the time stamp counter", out[3] & FEATURE_TSC, FEATURE_TSC);
    EXPECT(name, "the features again", out[3] & cpu_features, cpu_features);
    passed(name);
}

void check_model_registers(void)
{
    const char *name = "MSRs";
    if (cpu_features & FEATURE_SEP) {
        u64 old = read_msr(MSR_SYSENTER_ESP);
        write_msr(MSR_SYSENTER_ESP, 0xC0DE0000);
        EXPECT(name, "SYSENTER_ESP", (u32)read_msr(MSR_SYSENTER_ESP), 0xC0DE0000);
        write_msr(MSR_SYSENTER_ESP, old);
        EXPECT(name, "SYSENTER_ESP as it was", (u32)read_msr(MSR_SYSENTER_ESP), (u32)old);
    }
    if (cpu_features & FEATURE_APIC)
        EXPECT(name, "the APIC's base", (u32)read_msr(MSR_APIC_BASE) & 0xFFFFF800, 0xFEE00800);
    if (cpu_features & FEATURE_PAT) {
        u64 pat = read_msr(MSR_PAT);
        write_msr(MSR_PAT, pat);
        EXPECT(name, "the low half of PAT", (u32)read_msr(MSR_PAT), (u32)pat);
        EXPECT(name, "the high half of PAT", (u32)(read_msr(MSR_PAT) >> 32), (u32)(pat >> 32));
    }
#ifdef FORM_MAINLINE
    /* One that is hardly there: an error or not, it is survived. */
    (void)read_msr(0x12345678);
    write_msr(0x12345678, 0);
#endif
    passed(name);
}

void check_time_stamp(void)
{
    const char *name = "time stamp";
    u64 first = read_tsc();
    u64 second = read_tsc();
    EXPECT(name, "that it counts", second > first, true);
    passed(name);
}

/* Every kernel has some of these left: where the processor refuses, the hypervisor emulates. */
void check_outside_interface(void)
{
    const char *name = "outside of the interface";
    u32 a, b, c, d, before;

    asm volatile("cli" ::: "memory");
    EXPECT(name, "IF behind cli", irqs_on(), false);
    asm volatile("sti" ::: "memory");
    EXPECT(name, "IF behind sti", irqs_on(), true);
    before = ticks;
    asm volatile("cli" ::: "memory");
    while (ticks == before)
        asm volatile("sti; hlt; cli" ::: "memory");
    asm volatile("sti" ::: "memory");
    EXPECT(name, "IF behind hlt", irqs_on(), true);

    /* ID and AC can be turned around: how the 486 and CPUID are recognised. */
    asm volatile("pushfl\n\tpopl %0\n\tmovl %0, %1\n\txorl $0x240000, %0\n\tpushl %0\n\tpopfl\n\tpushfl\n\tpopl %0\n\t"
                 "pushl %1\n\tpopfl"
                 : "=&r"(a), "=&r"(b)::"cc");
    EXPECT(name, "the flags that turn around", (a ^ b) & 0x240000, 0x240000);

    asm volatile("pushl %1\n\tpopfl\n\tpushfl\n\tpopl %0" : "=r"(a) : "r"(0x2D7) : "cc");
    EXPECT(name, "the flags that popf sets", a & 0xD5, 0xD5 & 0x2D7);
    EXPECT(name, "IF behind popf", irqs_on(), true);

    asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0), "c"(0));
    EXPECT(name, "cpuid", a >= 1, true);
    if (cpu_features & FEATURE_SEP) {
        asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(MSR_SYSENTER_ESP));
        EXPECT(name, "rdmsr", a, (u32)&cpu_tss);
        asm volatile("wrmsr" ::"a"(a), "d"(d), "c"(MSR_SYSENTER_ESP));
    }
    asm volatile("movl %0, %%db3" ::"r"(0xC0000123));
    asm volatile("movl %%db3, %0" : "=r"(a));
    EXPECT(name, "DR3", a, 0xC0000123);
    EXPECT(name, "DR3 through the interface", get_debugreg(3), 0xC0000123);
    set_debugreg(3, 0);
    asm volatile("outb %%al, $0x80" ::"a"(0));
    asm volatile("inb $0x61, %%al" : "=a"(a));
    asm volatile("movl %%cr0, %0" : "=r"(a));
    EXPECT(name, "CR0", a, read_cr0());
    asm volatile("movl %%cr2, %0" : "=r"(a));
    EXPECT(name, "CR2", a, read_cr2());
    asm volatile("invlpg (%0)" ::"r"(PAGE_OFFSET) : "memory");
    asm volatile("clts");
    EXPECT(name, "TS behind clts", read_cr0() & CR0_TS, 0);
    set_ts();

    /* What these tell is not for a guest to know: they only must not hurt. */
    struct table_pointer pointer;
    asm volatile("sgdtl %0\n\tsidtl %0" : "=m"(pointer));
    asm volatile("sldt %0\n\tstr %0\n\tsmsw %0" : "=&r"(a));
    passed(name);
}
