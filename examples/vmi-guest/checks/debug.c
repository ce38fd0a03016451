/* Debug registers and the trap flag. */
#include "checks.h"

#define DR7_EXECUTE0 0x00000001
#define DR7_WRITE1_4 0x00D00004

static volatile u32 watched[2];

void check_watchpoint(void)
{
    const char *name = "watchpoint";
    u32 before = debug_traps;
    set_debugreg(1, (u32)&watched[1]);
    EXPECT(name, "DR1", get_debugreg(1), (u32)&watched[1]);
    set_debugreg(7, DR7_WRITE1_4);
    EXPECT(name, "DR7", get_debugreg(7) & 0xFFFF00FF, DR7_WRITE1_4);
    watched[0] = 1;
    EXPECT(name, "traps of the word before", debug_traps, before);
    watched[1] = 1;
    EXPECT(name, "traps of the word", debug_traps, before + 1);
    EXPECT(name, "DR6", debug_status, 2);
    EXPECT(name, "DR7 behind the trap", get_debugreg(7) & 0xFFFF00FF, 0);
    set_debugreg(1, 0);
    passed(name);
}

static u32 __attribute__((noinline)) stopped_at(u32 value)
{
    asm volatile("" : "+r"(value));
    return value + 1;
}

void check_breakpoint(void)
{
    const char *name = "breakpoint";
    u32 before = debug_traps;
    set_debugreg(0, (u32)stopped_at);
    set_debugreg(7, DR7_EXECUTE0);
    EXPECT(name, "the result", stopped_at(1), 2);
    EXPECT(name, "traps", debug_traps, before + 1);
    EXPECT(name, "the address", debug_address, (u32)stopped_at);
    EXPECT(name, "DR6", debug_status, 1);
    set_debugreg(0, 0);
    passed(name);
}

void check_single_step(void)
{
    const char *name = "single step";
    u32 before = debug_traps;
    u32 flags = irq_save();
    asm volatile("pushfl\n\torl $0x100, (%%esp)\n\tpopfl\n\tnop" ::: "memory", "cc");
    restore_fl(flags);
    EXPECT(name, "traps", debug_traps, before + 1);
    EXPECT(name, "DR6", debug_status, 0x4000);
    passed(name);
}
