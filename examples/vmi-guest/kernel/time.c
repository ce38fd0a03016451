/*
 * The tick: the 8254 on the bare machine, the hypervisor's alarm where the ROM has a cycle frequency, on IRQ 0 first
 * and on the local APIC's timer entry later.
 */
#include "kernel.h"
#include "ops.h"
#include "task.h"

#define PIC1 0x20
#define PIC2 0xA0
#define PIT_CHANNEL0 0x40
#define PIT_MODE 0x43
#define PIT_HZ 1193182

#define LVTT_PERIODIC 0x20000
#define LVTT_MASKED 0x10000
#define NATIVE_LVTT_COUNT 6250          /* a millisecond of a 100 MHz bus divided by 16 */

volatile u32 ticks, timer_vector;

static u32 wiring;                      /* of the alarm, 0: IRQ 0 */
static bool local;                      /* the local APIC's timer ticks */

/* Vectors from 0x30; only IRQ 0 and the cascade are let through. */
static void pic_init(void)
{
    outb(PIC1 + 1, 0xFF);
    outb(PIC2 + 1, 0xFF);
    outb(PIC1, 0x11);
    io_delay();
    outb(PIC1 + 1, VECTOR_TIMER);
    outb(PIC1 + 1, 4);
    outb(PIC1 + 1, 1);
    outb(PIC2, 0x11);
    io_delay();
    outb(PIC2 + 1, VECTOR_TIMER + 8);
    outb(PIC2 + 1, 2);
    outb(PIC2 + 1, 1);
    outb(PIC1 + 1, 0xFA);
}

static void pit(u8 mode, u32 count)
{
    outb(PIT_MODE, mode);
    io_delay();
    if (count) {
        outb(PIT_CHANNEL0, (u8)count);
        io_delay();
        outb(PIT_CHANNEL0, (u8)(count >> 8));
    }
}

/* Mode 5 waits for a trigger that never comes: the timer is silent. */
static void pit_off(void)
{
    pit(0x3A, 0);
}

static u64 divided(u64 value, u32 by)
{
    u32 high = (u32)(value >> 32), low = (u32)value, rest;
    u32 quotient_high = high / by;
    rest = high % by;
    asm("divl %4" : "=a"(low), "=d"(rest) : "a"(low), "d"(rest), "r"(by));
    return (u64)quotient_high << 32 | low;
}

static void periodic_alarm(void)
{
    u64 period = divided(cycle_frequency(), TICKS_PER_SECOND);
    u64 now = cycle_counter(VMI_CYCLES_REAL);
    set_alarm(VMI_ALARM_PERIODIC | VMI_CYCLES_REAL | wiring, now, period);
}

void time_init(void)
{
    u32 flags = irq_save();
    pic_init();
    if (have_alarms()) {
        pit_off();
        periodic_alarm();
    } else {
        pit(0x34, PIT_HZ / TICKS_PER_SECOND);
    }
    restore_fl(flags);
}

void time_stop(void)
{
    if (have_alarms())
        cancel_alarm(VMI_ALARM_PERIODIC | VMI_CYCLES_REAL | wiring);
    else if (local)
        apic_write(APIC_TMICT, 0);
    else
        pit_off();
}

/* One tick, a millisecond from now, or as soon as can be: an alarm whose time has come when it is set is not lost. */
void time_one_shot(bool soon)
{
    if (have_alarms()) {
        u64 delta = soon ? 1 : divided(cycle_frequency(), TICKS_PER_SECOND);
        set_alarm(VMI_CYCLES_REAL | wiring, cycle_counter(VMI_CYCLES_REAL) + delta, 0);
    } else if (local) {
        apic_write(APIC_LVTT, VECTOR_LVTT);
        apic_write(APIC_TMICT, NATIVE_LVTT_COUNT);
    } else {
        pit(0x30, PIT_HZ / TICKS_PER_SECOND);
    }
}

/* The tick moves to the local APIC; false where there is none. */
bool time_lvtt_start(void)
{
    if (!(cpu_features & FEATURE_APIC))
        return false;
    u32 flags = irq_save();
    time_stop();
    local = true;
    if (have_alarms()) {
        wiring = VMI_ALARM_LVTT;
        apic_write(APIC_LVTT, VECTOR_LVTT);
        periodic_alarm();
    } else {
        apic_write(APIC_TDCR, 3);
        apic_write(APIC_LVTT, VECTOR_LVTT | LVTT_PERIODIC);
        apic_write(APIC_TMICT, NATIVE_LVTT_COUNT);
    }
    restore_fl(flags);
    return true;
}

/* And back to IRQ 0. */
void time_lvtt_stop(void)
{
    u32 flags = irq_save();
    time_stop();
    local = false;
    apic_write(APIC_LVTT, VECTOR_LVTT | LVTT_MASKED);
    if (have_alarms()) {
        wiring = 0;
        periodic_alarm();
    } else {
        pit(0x34, PIT_HZ / TICKS_PER_SECOND);
    }
    restore_fl(flags);
}

void timer_interrupt(struct registers *r)
{
    if (r->vector == VECTOR_LVTT)
        apic_write(APIC_EOI, 0);
    else
        outb(PIC1, 0x60);
    timer_vector = r->vector;
    ticks++;
    need_schedule = true;
}

/* Halts until so many ticks have come. */
void wait_ticks(u32 count)
{
    u32 start = ticks;
    while (ticks - start < count) {
        irq_disable();
        if (ticks - start < count)
            safe_halt();
        else
            irq_enable();
    }
}

static u32 battery_clock(u8 index)
{
    outb(0x70, index);
    return inb(0x71);
}

static u32 from_bcd(u32 value)
{
    return (value >> 4) * 10 + (value & 15);
}

/* Seconds since 1970, of a clock that counts in BCD and is between 2000 and 2099. */
u32 battery_clock_seconds(void)
{
    static const u16 before[] = {0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334};
    u32 second, again;
    do {
        second = battery_clock(0);
        again = battery_clock(0x0A) & 0x80;
    } while (again || second != battery_clock(0));
    u32 minute = from_bcd(battery_clock(2)), hour = from_bcd(battery_clock(4));
    u32 day = from_bcd(battery_clock(7)), month = from_bcd(battery_clock(8)), year = from_bcd(battery_clock(9));
    u32 days = 10957 + year * 365 + (year + 3) / 4 + before[(month - 1) % 12] + day - 1;
    if (month > 2 && year % 4 == 0)
        days++;
    return ((days * 24 + hour) * 60 + minute) * 60 + from_bcd(second);
}
