/* The interrupt mask, the tick, and a tick that comes while interrupts are off. */
#include "checks.h"

void check_interrupt_mask(void)
{
    const char *name = "interrupt mask";
    EXPECT(name, "IF", irqs_on(), true);
    u32 outer = irq_save();
    EXPECT(name, "IF inside", irqs_on(), false);
    u32 inner = irq_save();
    EXPECT(name, "IF of the inner", (inner & EFLAGS_IF) != 0, false);
    EXPECT(name, "IF inside of it", (save_fl_long() & EFLAGS_IF) != 0, false);
    restore_fl(inner);
    EXPECT(name, "IF behind the inner", irqs_on(), false);
    irq_enable();
    EXPECT(name, "IF when enabled", irqs_on(), true);
    irq_disable();
    EXPECT(name, "IF when disabled", irqs_on(), false);
    restore_fl(outer);
    EXPECT(name, "IF behind the outer", irqs_on(), true);
    passed(name);
}

void check_tick(void)
{
    const char *name = "tick by IRQ 0, halting";
    wait_ticks(3);
    EXPECT(name, "the vector", timer_vector, VECTOR_TIMER);
    EXPECT(name, "IF behind the halt", irqs_on(), true);
    u32 before = ticks;
    plain_halt();
    EXPECT(name, "a tick behind a plain halt", ticks != before, true);
    passed(name);
}

/* With interrupts off: until a tick must have come, by the cycle counter or by what the 8259A has been asked. */
static void let_a_tick_come(void)
{
    if (have_alarms()) {
        u32 wait = (u32)cycle_frequency() / TICKS_PER_SECOND * 2;
        u64 start = cycle_counter(VMI_CYCLES_REAL);
        while (cycle_counter(VMI_CYCLES_REAL) - start < wait)
            cpu_pause();
    } else {
        outb(0x20, 0x0A);
        while (!(inb(0x20) & 1))
            cpu_pause();
    }
}

void check_pending_tick(void)
{
    const char *name = "pending tick";

    irq_disable();
    u32 before = ticks;
    let_a_tick_come();
    EXPECT(name, "ticks with interrupts off", ticks, before);
    irq_enable();
    asm volatile("nop");
    EXPECT(name, "a tick at once when enabled", ticks != before, true);

    u32 flags = irq_save();
    before = ticks;
    let_a_tick_come();
    restore_fl(flags);
    asm volatile("nop");
    EXPECT(name, "a tick at once when restored", ticks != before, true);

    irq_disable();
    before = ticks;
    let_a_tick_come();
    asm volatile("sti; nop" ::: "memory");
    EXPECT(name, "a tick at once behind sti", ticks != before, true);

    irq_disable();
    before = ticks;
    let_a_tick_come();
    safe_halt();
    EXPECT(name, "a tick at once when halting", ticks != before, true);
    passed(name);
}
