/* Pages on demand, copies on write, a page that stays shared, pointers that lead nowhere. */
#include "user.h"

static u32 data = 0x12345678;
static u32 zeros[2048];

#define HEAP ((volatile u32 *)USER_HEAP)
#define SHARED ((volatile u32 *)USER_SHARED)

static u32 deep(u32 levels)
{
    volatile u32 room[256];
    room[0] = levels;
    return levels ? deep(levels - 1) + room[0] - levels + 1 : 0;
}

void check_demand(void)
{
    const char *name = "pages on demand";
    expect(name, "a word of data", data, 0x12345678);
    expect(name, "a word of zeros", zeros[1500], 0);
    expect(name, "a word of the heap", HEAP[0], 0);
    for (u32 page = 0; page < 16; page++)
        HEAP[page * 1024] = page;
    for (u32 page = 0; page < 16; page++)
        expect(name, "a page of the heap", HEAP[page * 1024], page);
    expect(name, "a deep stack", deep(24), 24);
    ok(name);
}

static u32 write_everywhere(void)
{
    if (data != 0xAAAA || HEAP[5] != 0xBBBB)
        return 1;
    data = 1;
    HEAP[5] = 2;
    zeros[1] = 3;
    return data + HEAP[5] + zeros[1] == 6 ? 42 : 2;
}

static u32 fork_again(void)
{
    u32 inner = run_child(write_everywhere);
    if (inner != 42 || data != 0xAAAA || HEAP[5] != 0xBBBB)
        return 1;
    data = 4;
    return 43;
}

void check_copies(void)
{
    const char *name = "copies on write";
    u32 frames = call(SYS_FRAMES, 0);
    data = 0xAAAA;
    HEAP[5] = 0xBBBB;
    expect(name, "the child's status", run_child(write_everywhere), 42);
    expect(name, "a word of data behind it", data, 0xAAAA);
    expect(name, "a word of the heap behind it", HEAP[5], 0xBBBB);
    expect(name, "the status of a child with a child", run_child(fork_again), 43);
    expect(name, "a word of data behind both", data, 0xAAAA);
    data++;
    expect(name, "a word of data when written", data, 0xAAAB);
    expect(name, "frames behind it all", call(SYS_FRAMES, 0), frames);
    ok(name);
}

static u32 write_shared(void)
{
    SHARED[1] = SHARED[0] + 1;
    return 0;
}

void check_shared_page(void)
{
    const char *name = "shared page";
    SHARED[0] = 77;
    expect(name, "the child's status", run_child(write_shared), 0);
    expect(name, "what the child wrote", SHARED[1], 78);
    ok(name);
}

void check_bad_pointers(void)
{
    const char *name = "bad pointers";
    expect(name, "a write from nowhere", call_int(SYS_WRITE, 0x1000, 4, 0), SYS_FAULT);
    expect(name, "a write from the kernel", call_int(SYS_WRITE, PAGE_OFFSET, 4, 0), SYS_FAULT);
    expect(name, "a write from the end of the user's part", call_int(SYS_WRITE, PAGE_OFFSET - 2, 4, 0), SYS_FAULT);
    expect(name, "a call that is none", call(9999, 0), SYS_INVALID);
    ok(name);
}
