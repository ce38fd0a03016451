/* Physical frames from the end of the kernel to 16 MiB, each with a count of users. */
#include "pages.h"

#define FRAMES (LOW_MEMORY >> 12)

extern u8 _end[];
static u8 users[FRAMES];
static u32 first, next;

void frames_init(void)
{
    first = kernel_frame(_end + PAGE_SIZE - 1);
    next = first;
}

u32 frame_get(void)
{
    for (u32 tried = first; tried < FRAMES; tried++) {
        if (next == FRAMES)
            next = first;
        u32 frame = next++;
        if (!users[frame]) {
            users[frame] = 1;
            u32 *words = frame_address(frame);
            for (u32 at = 0; at < PAGE_SIZE / 4; at++)
                words[at] = 0;
            return frame;
        }
    }
    failed("memory", "frames left", 0, 1);
}

void frame_share(u32 frame)
{
    users[frame]++;
}

void frame_put(u32 frame)
{
    EXPECT("memory", "the frame's use", users[frame] != 0, true);
    users[frame]--;
}

u32 frame_users(u32 frame)
{
    return users[frame];
}

u32 frames_free(void)
{
    u32 count = 0;
    for (u32 frame = first; frame < FRAMES; frame++)
        count += !users[frame];
    return count;
}
