/* The one-shot alarm, the local APIC's timer, the cycle counters, the wall clock. */
#include "checks.h"

/* Three alarms of one tick each; two of them are due when they are set. */
static void one_shots(void)
{
    u32 flags = irq_save();
    time_stop();
    restore_fl(flags);
    for (u32 turn = 0; turn < 3; turn++) {
        flags = irq_save();
        u32 before = ticks;
        time_one_shot(turn > 0);
        restore_fl(flags);
        while (ticks == before) {
            irq_disable();
            if (ticks == before)
                safe_halt();
            else
                irq_enable();
        }
    }
}

void check_one_shot(void)
{
    one_shots();
    time_init();
    wait_ticks(2);
    passed("one-shot alarm");
}

void check_local_timer(void)
{
    const char *name = "tick by the local timer";
    if (time_lvtt_start()) {
        wait_ticks(3);
        EXPECT(name, "the vector", timer_vector, VECTOR_LVTT);
        one_shots();
        EXPECT(name, "the vector of one-shot alarms", timer_vector, VECTOR_LVTT);
        time_lvtt_stop();
        wait_ticks(2);
        EXPECT(name, "the vector behind it", timer_vector, VECTOR_TIMER);
    }
    passed(name);
}

void check_cycle_counters(void)
{
    const char *name = "cycle counters";
    u64 first = cycle_counter(VMI_CYCLES_REAL);
    u64 available = cycle_counter(VMI_CYCLES_AVAILABLE);
    u64 stolen = cycle_counter(VMI_CYCLES_STOLEN);
    u64 last = cycle_counter(VMI_CYCLES_REAL);
    EXPECT(name, "that they count", last > first, true);
    EXPECT(name, "that available and stolen are not less than real", available + stolen >= first, true);
    EXPECT(name, "that available and stolen are not more than real", available + stolen <= last, true);
    passed(name);
}

/* Nanoseconds to seconds without a 64-bit division: 2^9 divides a thousand million. */
static u32 seconds(u64 nanoseconds)
{
    u64 scaled = nanoseconds >> 9;
    u32 high = (u32)(scaled >> 32), low = (u32)scaled, rest;
    asm("divl %4" : "=a"(low), "=d"(rest) : "a"(low), "d"(high), "r"(1000000000u >> 9));
    return low;
}

void check_wall_clock(void)
{
    const char *name = "wall clock";
    u32 battery = battery_clock_seconds();
    u64 now = wallclock();
    u32 difference = now ? seconds(now) - battery : 0;
    EXPECT(name, "the seconds between the hypervisor's and the battery's", difference + 2 <= 4, true);
    EXPECT(name, "seconds since 2020", battery > 1577836799u, true);
    wallclock_updated();
    passed(name);
}
