/* System calls, children, and reports. */
#include "user.h"

u32 call(u32 number, u32 first)
{
    return call_int(number, first, 0, 0);
}

void say(const char *text)
{
    u32 length = 0;
    while (text[length])
        length++;
    call_int(SYS_WRITE, (u32)text, length, 0);
}

void end(u32 status)
{
    call(SYS_END, status);
    for (;;)
        ;
}

void ok(const char *name)
{
    say("ring 3: ");
    say(name);
    say(": ok\n");
}

static void say_number(u32 value)
{
    char digits[9];
    for (u32 at = 0; at < 8; at++)
        digits[at] = "0123456789abcdef"[value >> (28 - 4 * at) & 15];
    digits[8] = 0;
    say(digits);
}

/* A failure ends the program with a status that the kernel takes for one. */
void expect(const char *name, const char *what, u32 found, u32 expected)
{
    if (found == expected)
        return;
    say("ring 3: ");
    say(name);
    say(": ");
    say(what);
    say(" is ");
    say_number(found);
    say(", expected ");
    say_number(expected);
    say("\n");
    end(1);
}

u32 start_child(u32 (*function)(void))
{
    u32 child = call(SYS_FORK, 0);
    if (!child)
        end(function());
    return child;
}

u32 wait_child(void)
{
    u32 status = 0;
    if (!call(SYS_WAIT, (u32)&status))
        return SYS_INVALID;
    return status;
}

u32 run_child(u32 (*function)(void))
{
    start_child(function);
    return wait_child();
}
