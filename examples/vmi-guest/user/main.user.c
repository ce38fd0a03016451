/* The program of ring 3. */
#include "syscalls.h"
#include "types.h"

u32 call_int(u32 number, u32 first, u32 second, u32 third);

static void say(const char *text)
{
    u32 length = 0;
    while (text[length])
        length++;
    call_int(SYS_WRITE, (u32)text, length, 0);
}

u32 user_main(void)
{
    say("ring 3: ok\n");
    return 0;
}
