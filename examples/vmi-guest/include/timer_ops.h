/* Time in the mainline form: functions that the ROM gave, NULL where it has none. They have no annotations. */
#ifndef TIMER_OPS_H
#define TIMER_OPS_H

#include "calls.h"

struct vmi_timer_ops {
    u64 (*get_cycle_frequency)(void);
    u64 (*get_cycle_counter)(u32 which);
    u64 (*get_wallclock)(void);
    u32 (*wallclock_updated)(void);
    void (*set_alarm)(u32 flags, u64 expiry, u64 period);
    void (*cancel_alarm)(u32 flags);
};

extern struct vmi_timer_ops vmi_timer_ops;

static inline bool have_alarms(void)
{
    return vmi_timer_ops.get_cycle_frequency != NULL;
}

static inline u64 cycle_frequency(void)
{
    return vmi_timer_ops.get_cycle_frequency();
}

static inline u64 cycle_counter(u32 which)
{
    if (vmi_timer_ops.get_cycle_counter)
        return vmi_timer_ops.get_cycle_counter(which);
    return which == VMI_CYCLES_STOLEN ? 0 : read_tsc();
}

/*
 * A pair of 64-bit arguments behind a 32-bit one: the compiler's convention puts the first in EDX and ECX, the second
 * on the stack, which is what VMI wants.
 */
static inline void set_alarm(u32 flags, u64 expiry, u64 period)
{
    vmi_timer_ops.set_alarm(flags, expiry, period);
}

static inline bool cancel_alarm(u32 flags)
{
    vmi_timer_ops.cancel_alarm(flags);
    return true;
}

static inline u64 wallclock(void)
{
    return platform.wallclock();
}

static inline bool wallclock_updated(void)
{
    return vmi_timer_ops.wallclock_updated && vmi_timer_ops.wallclock_updated();
}

#endif
