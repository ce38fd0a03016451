/* Tasks: one kernel stack each; preempted in ring 3 only. */
#ifndef TASK_H
#define TASK_H

#include "kernel.h"
#include "pages.h"

#define TASKS 8

enum task_state { TASK_FREE, TASK_READY, TASK_WAITING, TASK_ENDED };

struct task {
    u32 kernel_esp;                     /* entry.S: first */
    u32 sp0;
    enum task_state state;
    struct task *parent;
    u32 number, status;
    struct address_space space;         /* without a directory: a kernel thread */
    struct descriptor tls;
    u32 gs, iopl;
    u32 ldt_entries;
    bool fpu_started, fpu_loaded;
    u8 fpu[108] __attribute__((aligned(16)));
};

/* The status of a task that an exception ended. */
#define STATUS_KILLED 0x100

extern struct task tasks[TASKS];

static inline struct task *current_task(void)
{
    struct task *task;
    asm("movl %%fs:0, %0" : "=r"(task));
    return task;
}

extern volatile bool need_schedule;

void tasks_init(void);
void schedule(void);
void user_program(void);
void user_entry(void);                  /* an address of ring 3 */
struct task *task_of_kernel(void (*function)(void));
struct task *task_fork(struct registers *r);
void task_become_user(void);            /* a kernel thread gets an address space of its own */
void NORETURN task_end(u32 status);
u32 task_wait(u32 *status);             /* number of an ended child, 0 if there is none to wait for */
void fpu_restore(void);

#endif
