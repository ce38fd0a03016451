/* Tasks and their switch, in the order in which 32-bit Linux 2.6.32 does it. */
#include "task.h"

struct task tasks[TASKS];
volatile bool need_schedule;

static u8 stacks[TASKS][KERNEL_STACK] __attribute__((aligned(KERNEL_STACK)));
static u32 numbers;
extern struct task *percpu[4];
extern u8 boot_stack_top[];

void switch_stacks(struct task *from, struct task *to);
void task_first(void);

/* The first task is the one that runs: it has the boot stack and becomes the idle task. */
void tasks_init(void)
{
    tasks[0].state = TASK_READY;
    tasks[0].space = kernel_space;
    tasks[0].sp0 = (u32)boot_stack_top;
    percpu[0] = &tasks[0];
}

/* Frees what the task before had to leave, once it is not the current one any more. */
void schedule_tail(void)
{
    lazy_cpu_leave();
    irq_enable();
}

static void switch_to(struct task *to)
{
    struct task *from = current_task();

    irq_disable();
    lazy_cpu_enter();
    if (to->space.directory)
        space_switch(to->space.directory == kernel_directory ? &kernel_space : &to->space);
    if (to->ldt_entries != from->ldt_entries)
        set_ldt(to->ldt_entries ? ldt : NULL, to->ldt_entries);

    /* The FPU is given to nobody: the next one that uses it meets #NM. */
    if (from->fpu_loaded) {
        asm volatile("fnsave %0" : "=m"(from->fpu));
        from->fpu_loaded = false;
        set_ts();
    }
    load_sp0(&cpu_tss.tss, to->sp0);
    asm volatile("movl %%gs, %0" : "=r"(from->gs));
    load_tls(&to->tls);
    if (to->iopl != from->iopl)
        set_iopl_mask(to->iopl);
    if (from->gs | to->gs)
        asm volatile("movl %0, %%gs" ::"r"(to->gs));
    percpu[0] = to;
    switch_stacks(from, to);
    schedule_tail();
}

void schedule(void)
{
    struct task *from = current_task();
    u32 start = (u32)(from - tasks);

    need_schedule = false;
    for (u32 turn = 1; turn <= TASKS; turn++) {
        struct task *to = &tasks[(start + turn) % TASKS];
        if (to->state != TASK_READY || (to == &tasks[0] && turn < TASKS && from->state == TASK_READY))
            continue;
        if (to != from)
            switch_to(to);
        return;
    }
}

static struct task *task_new(void)
{
    for (u32 at = 1; at < TASKS; at++)
        if (tasks[at].state == TASK_FREE) {
            struct task *task = &tasks[at];
            *task = (struct task){.sp0 = (u32)stacks[at] + KERNEL_STACK, .parent = current_task(), .number = ++numbers};
            return task;
        }
    failed("task", "a free place", 0, 1);
}

/* The stack of a task that was never switched away from: four saved registers, the first address, the frame. */
static struct registers *first_frame(struct task *task)
{
    struct registers *frame = (struct registers *)task->sp0 - 1;
    u32 *stack = (u32 *)frame - 5;
    for (u32 at = 0; at < 4; at++)
        stack[at] = 0;
    stack[4] = (u32)task_first;
    task->kernel_esp = (u32)stack;
    return frame;
}

static struct registers first_registers(u32 eip, u32 cs)
{
    return (struct registers){.eip = eip, .cs = cs, .eflags = EFLAGS_IF | 2, .ds = USER_DS, .es = USER_DS};
}

/* A kernel thread begins by an IRET to the kernel's own ring. */
struct task *task_of_kernel(void (*function)(void))
{
    struct task *task = task_new();
    struct registers *frame = first_frame(task);
    *frame = first_registers((u32)function, KERNEL_CS | kernel_rpl);
    frame->fs = KERNEL_PERCPU;
    frame->ds = frame->es = USER_DS;
    task->state = TASK_READY;
    return task;
}

void task_become_user(void)
{
    struct task *task = current_task();
    space_create(&task->space);
    u32 flags = irq_save();
    space_switch(&task->space);
    restore_fl(flags);
}

struct task *task_fork(struct registers *r)
{
    struct task *from = current_task(), *task = task_new();
    struct registers *frame = first_frame(task);
    *frame = *r;
    frame->eax = 0;
    space_copy(&task->space, &from->space);
    task->tls = from->tls;
    asm volatile("movl %%gs, %0" : "=r"(task->gs));
    task->iopl = from->iopl;
    task->ldt_entries = from->ldt_entries;
    if (from->fpu_loaded) {
        asm volatile("fnsave %0" : "=m"(from->fpu));
        from->fpu_loaded = false;
        set_ts();
    }
    task->fpu_started = from->fpu_started;
    for (u32 at = 0; at < sizeof task->fpu; at++)
        task->fpu[at] = from->fpu[at];
    task->state = TASK_READY;
    return task;
}

void task_end(u32 status)
{
    struct task *task = current_task();
    irq_disable();
    if (task->fpu_loaded) {
        asm volatile("fnclex");         /* what it left pending is nobody's */
        task->fpu_loaded = false;
        set_ts();
    }
    asm volatile("movl %0, %%gs" ::"r"(0));
    port_map_drop();
    if (task->space.directory)
        space_empty(&task->space);
    task->status = status;
    task->state = TASK_ENDED;
    if (task->parent->state == TASK_WAITING)
        task->parent->state = TASK_READY;
    for (;;)
        schedule();
}

u32 task_wait(u32 *status)
{
    struct task *self = current_task();
    for (;;) {
        bool children = false;
        u32 flags = irq_save();
        for (u32 at = 1; at < TASKS; at++) {
            struct task *task = &tasks[at];
            if (task->state == TASK_FREE || task->parent != self)
                continue;
            children = true;
            if (task->state == TASK_ENDED) {
                u32 number = task->number;
                *status = task->status;
                if (task->space.directory)
                    space_destroy(&task->space);
                task->state = TASK_FREE;
                restore_fl(flags);
                return number;
            }
        }
        if (!children) {
            restore_fl(flags);
            return 0;
        }
        if (self == &tasks[0]) {        /* the idle task halts until something can run */
            bool ready = false;
            for (u32 at = 1; at < TASKS; at++)
                ready |= tasks[at].state == TASK_READY;
            if (ready) {
                restore_fl(flags);
                schedule();
            } else {
                safe_halt();
            }
        } else {
            self->state = TASK_WAITING;
            restore_fl(flags);
            schedule();
        }
    }
}

/* #NM: the current task's state is loaded on first use. */
void fpu_restore(void)
{
    struct task *task = current_task();
    clts();
    if (task->fpu_started)
        asm volatile("frstor %0" ::"m"(task->fpu));
    else
        asm volatile("fninit");
    task->fpu_started = task->fpu_loaded = true;
}
