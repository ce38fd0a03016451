/* Debug traps that ring 3 causes and the kernel takes. */
#include "user.h"

static volatile u32 watched[2];

void check_user_debug(void)
{
    const char *name = "debug traps";
    u32 before = call(SYS_TRAPS, 0);
    expect(name, "a watchpoint", call(SYS_WATCH, (u32)&watched[1]), 0);
    watched[0] = 1;
    expect(name, "traps of the word before", call(SYS_TRAPS, 0), before);
    watched[1] = 1;
    expect(name, "traps of the word", call(SYS_TRAPS, 0), before + 1);
    watched[1] = 2;
    expect(name, "traps when it is over", call(SYS_TRAPS, 0), before + 1);
    call(SYS_WATCH, 0);
    asm volatile("pushfl\n\torl $0x100, (%%esp)\n\tpopfl\n\tnop" ::: "memory", "cc");
    expect(name, "traps of a step", call(SYS_TRAPS, 0), before + 2);
    ok(name);
}
