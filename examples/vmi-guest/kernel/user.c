/* The program of ring 3, from its first instruction to its end. */
#include "syscalls.h"
#include "task.h"

/* As the first process of Linux comes to be: a kernel thread calls the kernel, and the call returns to ring 3. */
static void first_process(void)
{
    asm volatile("int $0x80" ::"a"(SYS_EXEC) : "memory");
    task_end(1);
}

void user_program(void)
{
    u32 status = 1, before = frames_free();
    task_of_kernel(first_process);
    EXPECT("ring 3", "that it is a child", task_wait(&status) != 0, true);
    EXPECT("ring 3", "the status of the program", status, 0);
    /* The page that tasks share stays: it has the kernel as a user. */
    EXPECT("memory", "frames behind the program", frames_free(), before - 1);
    passed("memory given back");
}
