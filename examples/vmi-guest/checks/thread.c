/* A kernel thread: it begins by an IRET to the kernel's own ring, and gives way of its own will. */
#include "checks.h"
#include "task.h"

#define TURNS 5

static volatile u32 turns, thread_cs;
static volatile bool thread_irqs;

static void thread(void)
{
    u32 cs;
    asm volatile("movl %%cs, %0" : "=r"(cs));
    thread_cs = cs & 0xFFFF;
    thread_irqs = irqs_on();
    for (u32 turn = 0; turn < TURNS; turn++) {
        turns++;
        schedule();
    }
    task_end(7);
}

void check_kernel_thread(void)
{
    const char *name = "kernel thread";
    u32 status = 0;
    task_of_kernel(thread);
    EXPECT(name, "that it is a child", task_wait(&status) != 0, true);
    EXPECT(name, "its turns", turns, TURNS);
    EXPECT(name, "its CS", thread_cs, KERNEL_CS | kernel_rpl);
    EXPECT(name, "its IF", thread_irqs, true);
    EXPECT(name, "its status", status, 7);
    passed(name);
}
