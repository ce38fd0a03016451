/* What the parts of the kernel offer to each other. */
#ifndef KERNEL_H
#define KERNEL_H

#include "layout.h"
#include "types.h"

/* console.c: the serial line at 0x3F8, polled; printf knows %s %u %x %%. */
void console_init(void);
void console_write(const char *text, u32 length);
void printf(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A check that holds prints "name: ok" by `passed`; one that does not ends the run. */
void passed(const char *name);
void NORETURN failed(const char *name, const char *what, u32 found, u32 expected);
#define EXPECT(name, what, found, expected)                                       \
    do {                                                                          \
        u32 found_ = (u32)(found), expected_ = (u32)(expected);                   \
        if (found_ != expected_)                                                  \
            failed(name, what, found_, expected_);                                \
    } while (0)

/* options.c */
struct options {
    bool no_pse, no_pge, no_sep, no_timer;
};
extern struct options options;
void options_read(void);

/* power.c */
void NORETURN power_off(void);

/* The registers of whoever was interrupted, as entry.S pushes them. */
struct registers {
    u32 ebx, ecx, edx, esi, edi, ebp, eax;
    u32 ds, es, fs;
    u32 vector, error;
    u32 eip, cs, eflags, esp, ss;       /* ESP and SS only from ring 3 */
};

static inline bool from_user(const struct registers *r)
{
    return (r->cs & RPL_MASK) == USER_RPL;
}

/* traps.c */
void traps_early(void);
void traps_init(void);
bool fix_up(struct registers *r);
struct last_fault {
    u32 count, vector, error, address;
};
extern struct last_fault last_fault;
extern volatile u32 debug_traps, debug_status, debug_address;

/* Accesses that may fault: 0, or 1 after a fault that the exception table fixed up. */
u32 try_read(const void *address, u32 *value);
u32 try_write(void *address, u32 value);
u32 copy_from_user(void *to, const void *from, u32 length);
u32 copy_to_user(void *to, const void *from, u32 length);

/* cpu.c */
#define FEATURE_PSE (1u << 3)
#define FEATURE_TSC (1u << 4)
#define FEATURE_APIC (1u << 9)
#define FEATURE_SEP (1u << 11)
#define FEATURE_PGE (1u << 13)
extern u32 cpu_features;
void cpu_identify(void);
void cpu_init(void);
void set_ts(void);
#define PORTS_MAPPED 1024
void port_map_use(u32 port, bool allowed);
void port_map_drop(void);

/* time.c */
#define TICKS_PER_SECOND 1000
extern volatile u32 ticks, timer_vector;
void time_init(void);
void time_stop(void);
void time_one_shot(bool soon);
bool time_lvtt_start(void);
void time_lvtt_stop(void);
void timer_interrupt(struct registers *r);
void wait_ticks(u32 count);
u32 battery_clock_seconds(void);

/* apic.c */
#define APIC_ID 0x20
#define APIC_VERSION 0x30
#define APIC_TPR 0x80
#define APIC_EOI 0xB0
#define APIC_SPIV 0xF0
#define APIC_LVTT 0x320
#define APIC_LVT0 0x350
#define APIC_LVT1 0x360
#define APIC_TMICT 0x380
#define APIC_TMCCT 0x390
#define APIC_TDCR 0x3E0
void apic_init(void);

/* syscall.c */
u32 system_call(struct registers *r);

/* backend: finds the ROM, starts it and patches, on the boot page tables; and the second pass over all sites. */
void vmi_setup(void);
void vmi_patch_all(void);
void vmi_describe(void);                /* prints what is below this kernel */
extern u32 reserved_top;                /* bytes at the top of the address space that are the hypervisor's */

/* checks */
void checks_before_init(void);
void checks_of_kernel(void);

#endif
