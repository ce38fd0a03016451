/* The program of ring 3, from its first instruction to its end. */
#include "task.h"

void user_entry(void);

void user_program(void)
{
    u32 status = 1, before = frames_free();
    task_of_user((u32)user_entry, USER_STACK_TOP - 16);
    EXPECT("ring 3", "that it is a child", task_wait(&status) != 0, true);
    EXPECT("ring 3", "the status of the program", status, 0);
    /* The page that tasks share stays: it has the kernel as a user. */
    EXPECT("memory", "frames behind the program", frames_free(), before - 1);
    passed("memory given back");
}
