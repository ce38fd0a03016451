/* The program of ring 3, from its first instruction to its end. */
#include "task.h"

void user_entry(void);

void user_program(void)
{
    u32 status = 1;
    task_of_user((u32)user_entry, USER_STACK_TOP - 16);
    task_wait(&status);
    EXPECT("ring 3", "the status of the program", status, 0);
}
