/*
 * Sensitive operations as annotated sites: the native instructions in place, a call into the ROM once patched.
 *
 * Arguments are in EAX, EDX, ECX, then on the stack. A call may change EAX, EDX, ECX and the flags, so the native
 * code is declared to do so too. The four interrupt calls change nothing but the flags.
 */
#ifndef ANNOTATED_H
#define ANNOTATED_H

#include "descriptors.h"
#include "kernel.h"
#include "site.h"
#include "types.h"

#define CHANGED "memory", "cc"

static inline void irq_enable(void)
{
    asm volatile(SITE(VMI_EnableInterrupts, "sti") ::: CHANGED);
}

static inline void irq_disable(void)
{
    asm volatile(SITE(VMI_DisableInterrupts, "cli") ::: CHANGED);
}

static inline u32 save_fl(void)
{
    u32 flags;
    asm volatile(SITE(VMI_GetInterruptMask, "pushfl; popl %%eax") : "=a"(flags)::CHANGED);
    return flags;
}

static inline void restore_fl(u32 flags)
{
    asm volatile(SITE(VMI_SetInterruptMask, "pushl %%eax; popfl") ::"a"(flags) : CHANGED);
}

static inline void safe_halt(void)
{
    asm volatile(SITE(VMI_Halt, "sti; hlt")::: "eax", "edx", "ecx", CHANGED);
}

/* No call halts with interrupts as they are. */
static inline void plain_halt(void)
{
    asm volatile("hlt" ::: "memory");
}

static inline u32 save_fl_long(void)
{
    return save_fl();
}

static inline void cpuid(u32 leaf, u32 sub, u32 out[4])
{
    asm volatile(SITE(VMI_CPUID, "cpuid")
                 : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub) : "cc");
}

static inline u64 read_msr(u32 msr)
{
    u32 low, high;
    asm volatile(SITE(VMI_RDMSR, "rdmsr") : "=a"(low), "=d"(high), "+c"(msr)::"cc");
    return (u64)high << 32 | low;
}

static inline void write_msr(u32 msr, u64 value)
{
    u32 low = (u32)value, high = (u32)(value >> 32);
    asm volatile(SITE(VMI_WRMSR, "wrmsr") : "+a"(low), "+d"(high), "+c"(msr)::CHANGED);
}

static inline u64 read_tsc(void)
{
    u32 low, high;
    asm volatile(SITE(VMI_RDTSC, "rdtsc") : "=a"(low), "=d"(high)::"ecx", "cc");
    return (u64)high << 32 | low;
}

/* Operations of one argument in EAX, and of one result there. */
#define TAKES(name, type, call, native)                                               \
    static inline void name(type value)                                               \
    {                                                                                 \
        asm volatile(SITE(call, native) : "+a"(value)::"edx", "ecx", CHANGED);        \
    }
#define GIVES(name, call, native)                                                     \
    static inline u32 name(void)                                                      \
    {                                                                                 \
        u32 value;                                                                    \
        asm volatile(SITE(call, native) : "=a"(value)::"edx", "ecx", CHANGED);        \
        return value;                                                                 \
    }

TAKES(write_cr0, u32, VMI_SetCR0, "movl %%eax, %%cr0")
TAKES(write_cr2, u32, VMI_SetCR2, "movl %%eax, %%cr2")
TAKES(write_cr3, u32, VMI_SetCR3, "movl %%eax, %%cr3")
TAKES(write_cr4, u32, VMI_SetCR4, "movl %%eax, %%cr4")
GIVES(read_cr0, VMI_GetCR0, "movl %%cr0, %%eax")
GIVES(read_cr2, VMI_GetCR2, "movl %%cr2, %%eax")
GIVES(read_cr3, VMI_GetCR3, "movl %%cr3, %%eax")
GIVES(read_cr4, VMI_GetCR4, "movl %%cr4, %%eax")

TAKES(load_gdt, const struct table_pointer *, VMI_SetGDT, "lgdtl (%%eax)")
TAKES(load_idt, const struct table_pointer *, VMI_SetIDT, "lidtl (%%eax)")
TAKES(store_gdt, struct table_pointer *, VMI_GetGDT, "sgdtl (%%eax)")
TAKES(store_idt, struct table_pointer *, VMI_GetIDT, "sidtl (%%eax)")
TAKES(load_ldt_selector, u32, VMI_SetLDT, "lldt %%ax")
TAKES(load_tr_selector, u32, VMI_SetTR, "ltr %%ax")
GIVES(store_ldt, VMI_GetLDT, "sldt %%eax")
GIVES(store_tr, VMI_GetTR, "str %%eax")

static inline void load_tr(void)
{
    load_tr_selector(GDT_TSS * 8);
}

static inline void clts(void)
{
    asm volatile(SITE(VMI_CLTS, "clts")::: "eax", "edx", "ecx", CHANGED);
}

static inline void wbinvd(void)
{
    asm volatile(SITE(VMI_WBINVD, "wbinvd")::: "eax", "edx", "ecx", CHANGED);
}

#ifdef FORM_RFC_V1
static inline void cpu_pause(void)
{
    asm volatile(SITE(VMI_Pause, "pause")::: "eax", "edx", "ecx", CHANGED);
}
#else
static inline void cpu_pause(void)
{
    asm volatile("pause");
}
#endif

/* Descriptors: the high word goes on the stack. */
#define WRITES_DESCRIPTOR(name, call)                                                                          \
    static inline void name(struct descriptor *table, u32 index, u32 low, u32 high)                            \
    {                                                                                                          \
        asm volatile(SITE_WITH(call, "movl %%ecx, (%%eax, %%edx, 8); movl %%esi, 4(%%eax, %%edx, 8)",          \
                               "pushl %%esi", SITE_POP1)                                                       \
                     : "+a"(table), "+d"(index), "+c"(low)                                                     \
                     : "S"(high)                                                                               \
                     : CHANGED);                                                                               \
    }

WRITES_DESCRIPTOR(write_gdt_entry, VMI_WriteGDTEntry)
WRITES_DESCRIPTOR(write_ldt_entry, VMI_WriteLDTEntry)
WRITES_DESCRIPTOR(write_idt_entry, VMI_WriteIDTEntry)

/* 13.0 takes the TSS, 3.0 the stack's selector; natively the word in the TSS is all there is to it. */
static inline void load_sp0(struct tss *task, u32 esp0)
{
    task->esp0 = esp0;
#ifdef FORM_RFC_V1
    u32 first = (u32)task;
#else
    u32 first = KERNEL_DS;
#endif
    asm volatile(SITE(VMI_UpdateKernelStack, "") : "+a"(first), "+d"(esp0)::"ecx", CHANGED);
}

TAKES(set_iopl_mask, u32, VMI_SetIOPLMask,
      "pushfl; andl $0xffffcfff, (%%esp); orl %%eax, (%%esp); popfl")

/* The number of a debug register stands in the native instruction, so there is a site for each. */
#define DEBUG_REGISTER(number)                                                                                \
    static inline void write_dr##number(u32 value)                                                            \
    {                                                                                                         \
        u32 which = number;                                                                                   \
        asm volatile(SITE(VMI_SetDR, "movl %%edx, %%db" #number) : "+a"(which), "+d"(value)::"ecx", CHANGED); \
    }                                                                                                         \
    static inline u32 read_dr##number(void)                                                                   \
    {                                                                                                         \
        u32 value = number;                                                                                   \
        asm volatile(SITE(VMI_GetDR, "movl %%db" #number ", %%eax") : "+a"(value)::"edx", "ecx", CHANGED);    \
        return value;                                                                                         \
    }

DEBUG_REGISTER(0)
DEBUG_REGISTER(1)
DEBUG_REGISTER(2)
DEBUG_REGISTER(3)
DEBUG_REGISTER(6)
DEBUG_REGISTER(7)

static inline void set_debugreg(u32 number, u32 value)
{
    switch (number) {
    case 0: write_dr0(value); break;
    case 1: write_dr1(value); break;
    case 2: write_dr2(value); break;
    case 3: write_dr3(value); break;
    case 6: write_dr6(value); break;
    default: write_dr7(value); break;
    }
}

static inline u32 get_debugreg(u32 number)
{
    switch (number) {
    case 0: return read_dr0();
    case 1: return read_dr1();
    case 2: return read_dr2();
    case 3: return read_dr3();
    case 6: return read_dr6();
    default: return read_dr7();
    }
}

/* Page tables. */

#define PAGE_CALL(name, call)                                                                                 \
    static inline void name(u32 frame, u32 flags)                                                             \
    {                                                                                                         \
        asm volatile(SITE(call, "") : "+a"(frame), "+d"(flags)::"ecx", CHANGED);                              \
    }

PAGE_CALL(release_page, VMI_ReleasePage)

static inline void allocate_page(u32 frame, u32 flags, u32 source, u32 base, u32 count)
{
    asm volatile(SITE_WITH(VMI_AllocatePage, "", "pushl %%edi; pushl %%esi", SITE_POP2)
                 : "+a"(frame), "+d"(flags), "+c"(source)
                 : "S"(base), "D"(count)
                 : CHANGED);
}

static inline void set_linear_mapping(u32 slot, u32 address, u32 pages, u32 frame)
{
    asm volatile(SITE_WITH(VMI_SetLinearMapping, "", "pushl %%esi", SITE_POP1)
                 : "+a"(slot), "+d"(address), "+c"(pages)
                 : "S"(frame)
                 : CHANGED);
}

static inline void alloc_pt(u32 frame)
{
    allocate_page(frame, VMI_PAGE_PT, 0, 0, 0);
}

static inline void alloc_pd(u32 frame)
{
    allocate_page(frame, VMI_PAGE_PD, 0, 0, 0);
}

static inline void alloc_pd_clone(u32 frame, u32 source, u32 start, u32 count)
{
    allocate_page(frame, VMI_PAGE_PD | VMI_PAGE_CLONE, source, start, count);
}

static inline void release_pt(u32 frame)
{
    release_page(frame, VMI_PAGE_PT);
}

static inline void release_pd(u32 frame)
{
    release_page(frame, VMI_PAGE_PD);
}

#ifdef FORM_RFC_V1

static inline void set_entry(pte *entry, u32 value, u32 flags)
{
    (void)flags;
    asm volatile(SITE(VMI_SetPxE, "movl %%edx, (%%eax)") : "+a"(entry), "+d"(value)::"ecx", CHANGED);
}

static inline u32 get_entry(pte *entry)
{
    u32 value = (u32)entry;
    asm volatile(SITE(VMI_GetPxE, "movl (%%eax), %%eax") : "+a"(value)::"edx", "ecx", CHANGED);
    return value;
}

static inline u32 swap_entry(pte *entry, u32 value, u32 flags)
{
    u32 old = (u32)entry;
    (void)flags;
    asm volatile(SITE(VMI_SwapPxE, "xchgl %%edx, (%%eax); movl %%edx, %%eax") : "+a"(old), "+d"(value)::"ecx", CHANGED);
    return old;
}

static inline bool test_and_clear_entry_bit(pte *entry, u32 bit, u32 flags)
{
    u32 old = (u32)entry;
    (void)flags;
    asm volatile(SITE(VMI_TestAndClearPxEBit, "lock btrl %%edx, (%%eax); sbbl %%eax, %%eax; andl $1, %%eax")
                 : "+a"(old), "+d"(bit)::"ecx", CHANGED);
    return old;
}

static inline bool test_and_set_entry_bit(pte *entry, u32 bit, u32 flags)
{
    u32 old = (u32)entry;
    (void)flags;
    asm volatile(SITE(VMI_TestAndSetPxEBit, "lock btsl %%edx, (%%eax); sbbl %%eax, %%eax; andl $1, %%eax")
                 : "+a"(old), "+d"(bit)::"ecx", CHANGED);
    return old;
}

/* 13.0 has modes of deferring instead of flags and lazy modes; the mode given is what is flushed. */
#define DEFERRED_MMU 1
#define DEFERRED_CPU 2

static inline void flush_deferred(u32 mode)
{
    asm volatile(SITE(VMI_FlushDeferredCalls, "") : "+a"(mode)::"edx", "ecx", CHANGED);
}

static inline void lazy_mmu_enter(void)
{
}

static inline void lazy_mmu_leave(void)
{
    flush_deferred(DEFERRED_MMU);
}

static inline void lazy_cpu_enter(void)
{
}

static inline void lazy_cpu_leave(void)
{
    flush_deferred(DEFERRED_CPU);
}

#else

static inline void set_entry(pte *entry, u32 value, u32 flags)
{
    asm volatile(SITE(VMI_SetPxE, "movl %%eax, (%%edx)") : "+a"(value), "+d"(entry), "+c"(flags)::CHANGED);
}

static inline u32 get_entry(pte *entry)
{
    return *(volatile u32 *)entry;
}

/* Tells of an entry that was written directly. */
static inline void update_entry(pte *entry, u32 flags)
{
    asm volatile(SITE(VMI_UpdatePxE, "") : "+a"(entry), "+d"(flags)::"ecx", CHANGED);
}

static inline u32 swap_entry(pte *entry, u32 value, u32 flags)
{
    asm volatile("xchgl %0, %1" : "+r"(value), "+m"(*entry));
    update_entry(entry, flags);
    return value;
}

static inline bool test_and_clear_entry_bit(pte *entry, u32 bit, u32 flags)
{
    bool old;
    asm volatile("lock btrl %2, %1" : "=@ccc"(old), "+m"(*entry) : "r"(bit));
    update_entry(entry, flags);
    return old;
}

static inline bool test_and_set_entry_bit(pte *entry, u32 bit, u32 flags)
{
    bool old;
    asm volatile("lock btsl %2, %1" : "=@ccc"(old), "+m"(*entry) : "r"(bit));
    update_entry(entry, flags);
    return old;
}

static inline void set_lazy_mode(u32 mode)
{
    asm volatile(SITE(VMI_SetLazyMode, "") : "+a"(mode)::"edx", "ecx", CHANGED);
}

static inline void lazy_mmu_enter(void)
{
    set_lazy_mode(1);
}

static inline void lazy_mmu_leave(void)
{
    set_lazy_mode(0);
}

static inline void lazy_cpu_enter(void)
{
    set_lazy_mode(2);
}

static inline void lazy_cpu_leave(void)
{
    set_lazy_mode(0);
}

#endif

/* The two kinds of flush have native code of their own, so there is a site for each. */
static inline void flush_tlb_user(void)
{
    u32 what = VMI_FLUSH_TLB;
    asm volatile(SITE(VMI_FlushTLB, "movl %%cr3, %%eax; movl %%eax, %%cr3") : "+a"(what)::"edx", "ecx", CHANGED);
}

static inline void flush_tlb_kernel(void)
{
    u32 what = VMI_FLUSH_TLB | VMI_FLUSH_GLOBAL;
    asm volatile(SITE(VMI_FlushTLB, "movl %%cr4, %%eax; movl %%eax, %%edx; andb $0x7f, %%al; movl %%eax, %%cr4; "
                                    "movl %%edx, %%cr4; movl %%cr3, %%eax; movl %%eax, %%cr3")
                 : "+a"(what)::"edx", "ecx", CHANGED);
}

TAKES(flush_tlb_single, u32, VMI_InvalPage, "invlpg (%%eax)")

/* Ports. */

#define PORT_IO(type, in, in_call, in_native, out, out_call, out_native)                            \
    static inline type in(u16 port)                                                                 \
    {                                                                                               \
        u32 value = 0, where = port;                                                                \
        asm volatile(SITE(in_call, in_native) : "+a"(value), "+d"(where)::"ecx", CHANGED);          \
        return (type)value;                                                                         \
    }                                                                                               \
    static inline void out(u16 port, type data)                                                     \
    {                                                                                               \
        u32 value = data, where = port;                                                             \
        asm volatile(SITE(out_call, out_native) : "+a"(value), "+d"(where)::"ecx", CHANGED);        \
    }

PORT_IO(u8, inb, VMI_INB, "inb %%dx, %%al", outb, VMI_OUTB, "outb %%al, %%dx")
PORT_IO(u16, inw, VMI_INW, "inw %%dx, %%ax", outw, VMI_OUTW, "outw %%ax, %%dx")
PORT_IO(u32, inl, VMI_IN, "inl %%dx, %%eax", outl, VMI_OUT, "outl %%eax, %%dx")

#define PORT_STRINGS(in, in_call, in_native, out, out_call, out_native)                                            \
    static inline void in(u16 port, void *buffer, u32 count)                                                       \
    {                                                                                                              \
        u32 where = port;                                                                                          \
        asm volatile(SITE(in_call, in_native) : "+d"(where), "+D"(buffer), "+c"(count)::"eax", CHANGED);           \
    }                                                                                                              \
    static inline void out(u16 port, const void *buffer, u32 count)                                                \
    {                                                                                                              \
        u32 where = port;                                                                                          \
        asm volatile(SITE(out_call, out_native) : "+d"(where), "+S"(buffer), "+c"(count)::"eax", CHANGED);         \
    }

PORT_STRINGS(insb, VMI_INSB, "rep insb", outsb, VMI_OUTSB, "rep outsb")
PORT_STRINGS(insw, VMI_INSW, "rep insw", outsw, VMI_OUTSW, "rep outsw")
PORT_STRINGS(insl, VMI_INS, "rep insl", outsl, VMI_OUTS, "rep outsl")

static inline void io_delay(void)
{
    asm volatile(SITE(VMI_IODelay, "outb %%al, $0x80")::: "eax", "edx", "ecx", CHANGED);
}

/*
 * The local APIC. 13.0 takes the register's linear address, 3.0 its offset: there the native code must add the place
 * at which this kernel maps the APIC, which is constant in these two forms.
 */
#define APIC_LINEAR 0xFB000000

static inline u32 apic_read(u32 offset)
{
#ifdef FORM_RFC_V1
    u32 value = APIC_LINEAR + offset;
    asm volatile(SITE(VMI_APICRead, "movl (%%eax), %%eax") : "+a"(value)::"edx", "ecx", CHANGED);
#else
    u32 value = offset;
    asm volatile(SITE(VMI_APICRead, "movl " SITE_STRING(APIC_LINEAR) "(%%eax), %%eax")
                 : "+a"(value)::"edx", "ecx", CHANGED);
#endif
    return value;
}

static inline void apic_write(u32 offset, u32 value)
{
#ifdef FORM_RFC_V1
    u32 where = APIC_LINEAR + offset;
    asm volatile(SITE(VMI_APICWrite, "movl %%edx, (%%eax)") : "+a"(where), "+d"(value)::"ecx", CHANGED);
#else
    u32 where = offset;
    asm volatile(SITE(VMI_APICWrite, "movl %%edx, " SITE_STRING(APIC_LINEAR) "(%%eax)")
                 : "+a"(where), "+d"(value)::"ecx", CHANGED);
#endif
}

static inline void set_initial_ap_state(struct ap_state *state, u32 apic)
{
    asm volatile(SITE(VMI_SetInitialAPState, "") : "+a"(state), "+d"(apic)::"ecx", CHANGED);
}

/* Time. */

static inline u64 cycle_frequency(void)
{
    u32 low, high;
    asm volatile(SITE(VMI_GetCycleFrequency, "xorl %%eax, %%eax; xorl %%edx, %%edx")
                 : "=a"(low), "=d"(high)::"ecx", CHANGED);
    return (u64)high << 32 | low;
}

static inline u64 cycle_counter(u32 which)
{
    u32 low = which, high;
    asm volatile(SITE(VMI_GetCycleCounter,
                      "cmpl $2, %%eax; je 1f; rdtsc; jmp 2f; 1: xorl %%eax, %%eax; xorl %%edx, %%edx; 2:")
                 : "+a"(low), "=d"(high)::"ecx", CHANGED);
    return (u64)high << 32 | low;
}

static inline void set_alarm(u32 flags, u64 expiry, u64 period)
{
    u32 low = (u32)expiry, high = (u32)(expiry >> 32);
    asm volatile(SITE_WITH(VMI_SetAlarm, "", "pushl %%edi; pushl %%esi", SITE_POP2)
                 : "+a"(flags), "+d"(low), "+c"(high)
                 : "S"((u32)period), "D"((u32)(period >> 32))
                 : CHANGED);
}

static inline bool cancel_alarm(u32 flags)
{
    asm volatile(SITE(VMI_CancelAlarm, "xorl %%eax, %%eax") : "+a"(flags)::"edx", "ecx", CHANGED);
    return flags != 0;
}

/* Nanoseconds since 1970; 0 where only the battery-backed clock knows. */
static inline u64 wallclock(void)
{
    u32 low, high;
    asm volatile(SITE(VMI_GetWallclockTime, "xorl %%eax, %%eax; xorl %%edx, %%edx")
                 : "=a"(low), "=d"(high)::"ecx", CHANGED);
    return (u64)high << 32 | low;
}

GIVES(wallclock_updated_word, VMI_WallclockUpdated, "xorl %%eax, %%eax")

static inline bool wallclock_updated(void)
{
    return wallclock_updated_word() != 0;
}

static inline bool have_alarms(void)
{
    return !options.no_timer && cycle_frequency() != 0;
}

/* The end. */

TAKES(vmi_reboot, u32, VMI_Reboot, "")

static inline void vmi_shutdown(void)
{
    asm volatile(SITE(VMI_Shutdown, "cli; hlt")::: "eax", "edx", "ecx", CHANGED);
}

#endif
