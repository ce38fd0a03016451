/* System calls both ways, children, preemption, the FPU of several tasks, segments of a task's own. */
#include "user.h"

#define FEATURE_SEP (1u << 11)
#define SHARED ((volatile u32 *)USER_SHARED)

void check_calls(void)
{
    const char *name = "system calls";
    u32 number = call_int(SYS_NUMBER, 0, 0, 0), flags;
    expect(name, "the number again", call_int(SYS_NUMBER, 0, 0, 0), number);
    if (call(SYS_FEATURES, 0) & FEATURE_SEP)
        for (u32 turn = 0; turn < 20; turn++) {
            expect(name, "the number by sysenter", call_sysenter(SYS_NUMBER, 0, 0, 0), number);
            expect(name, "a bad call by sysenter", call_sysenter(9999, 0, 0, 0), SYS_INVALID);
            expect(name, "a bad pointer by sysenter", call_sysenter(SYS_WRITE, 0x1000, 4, 0), SYS_FAULT);
            call_sysenter(SYS_YIELD, 0, 0, 0);
        }
    asm volatile("pushfl\n\tpopl %0" : "=r"(flags));
    expect(name, "IF", flags & EFLAGS_IF, EFLAGS_IF);
    u32 cs;
    asm volatile("movl %%cs, %0" : "=r"(cs));
    expect(name, "CS", cs & 0xFFFF, USER_CS);
    ok(name);
}

static u32 answer(void)
{
    return 99;
}

/* A child that is there by sysenter, too: it returns from it twice. */
static u32 fork_by_sysenter(void)
{
    u32 child = call_sysenter(SYS_FORK, 0, 0, 0);
    if (!child)
        end(17);
    return wait_child() == 17 ? 18 : 1;
}

void check_children(void)
{
    const char *name = "children";
    expect(name, "nobody to wait for", call(SYS_WAIT, 0), 0);
    expect(name, "a status", run_child(answer), 99);
    start_child(answer);
    start_child(answer);
    expect(name, "the first of two", wait_child(), 99);
    expect(name, "the second of two", wait_child(), 99);
    if (call(SYS_FEATURES, 0) & FEATURE_SEP)
        expect(name, "a child by sysenter", run_child(fork_by_sysenter), 18);
    ok(name);
}

/* Two that wait for each other without giving way: only the tick helps. */
static u32 ping(void)
{
    for (u32 turn = 0; turn < 3; turn++) {
        while (SHARED[10] != 2 * turn)
            ;
        SHARED[10]++;
    }
    return 1;
}

static u32 pong(void)
{
    for (u32 turn = 0; turn < 3; turn++) {
        while (SHARED[10] != 2 * turn + 1)
            ;
        SHARED[10]++;
    }
    return 2;
}

void check_preemption(void)
{
    const char *name = "preemption";
    u32 before = call(SYS_TICKS, 0);
    SHARED[10] = 0;
    start_child(ping);
    start_child(pong);
    expect(name, "both statuses", wait_child() + wait_child(), 3);
    expect(name, "turns", SHARED[10], 6);
    expect(name, "ticks", call(SYS_TICKS, 0) != before, true);
    ok(name);
}

/* Sums of k/2 that live in the FPU's registers while others run. */
static u32 halves(u32 step, u32 control)
{
    u16 word = (u16)control;
    u32 sum = 0, value = step;
    asm volatile("fninit\n\tfldcw %0\n\tfldz" ::"m"(word));
    for (u32 turn = 0; turn < 8; turn++) {
        asm volatile("fildl %0\n\tfld1\n\tfld1\n\tfaddp\n\tfdivrp\n\tfaddp" ::"m"(value));
        call(SYS_YIELD, 0);
        value += step;
    }
    asm volatile("fld1\n\tfld1\n\tfaddp\n\tfmulp\n\tfistpl %0\n\tfnstcw %1" : "=m"(sum), "=m"(word));
    return word == control ? sum & 0xFF : 255;
}

static u32 by_one(void)
{
    return halves(1, 0x37F);
}

static u32 by_two(void)
{
    return halves(2, 0x27F);
}

static u32 by_three(void)
{
    return halves(3, 0xF7F);
}

void check_fpu(void)
{
    const char *name = "FPU";
    u32 whole = 5, back = 0;
    asm volatile("fninit\n\tfildl %0" ::"m"(whole));
    start_child(by_one);
    start_child(by_two);
    start_child(by_three);
    expect(name, "the sums", wait_child() + wait_child() + wait_child(), 36 + 72 + 108);
    asm volatile("fistpl %0" : "=m"(back));
    expect(name, "what the parent had loaded", back, whole);
    ok(name);
}

static u32 word_of_tls = 0x71517151, word_of_ldt = 0x1D71D71D;

static u32 through_gs(u32 selector)
{
    u32 value;
    asm volatile("movl %1, %%gs\n\tmovl %%gs:0, %0" : "=r"(value) : "r"(selector));
    return value;
}

static u32 at_gs(void)
{
    u32 value;
    asm volatile("movl %%gs:0, %0" : "=r"(value));
    return value;
}

static u32 other_tls(void)
{
    static u32 own = 0x0BB0BB00;
    u32 selector = call(SYS_TLS, (u32)&own);
    if (through_gs(selector) != own)
        return 1;
    for (u32 turn = 0; turn < 3; turn++) {
        call(SYS_YIELD, 0);
        if (at_gs() != own)
            return 2;
    }
    return 50;
}

static u32 use_ldt(void)
{
    u32 selector = call(SYS_LDT, (u32)&word_of_ldt);
    if (through_gs(selector) != word_of_ldt)
        return 1;
    for (u32 turn = 0; turn < 3; turn++) {
        call(SYS_YIELD, 0);
        if (at_gs() != word_of_ldt)
            return 2;
    }
    return 60;
}

void check_segments(void)
{
    const char *name = "segments of its own";
    u32 selector = call(SYS_TLS, (u32)&word_of_tls);
    expect(name, "the TLS", through_gs(selector), word_of_tls);
    start_child(other_tls);
    start_child(use_ldt);
    for (u32 turn = 0; turn < 4; turn++) {
        call(SYS_YIELD, 0);
        expect(name, "the TLS again", at_gs(), word_of_tls);
    }
    expect(name, "the children's statuses", wait_child() + wait_child(), 110);
    expect(name, "the TLS in the end", at_gs(), word_of_tls);
    ok(name);
}
