/* System calls: EAX the number, EBX, ECX and EDX the arguments; EAX comes back. */
#include "syscalls.h"
#include "task.h"

#define CALL_LIMIT 64
#define DR7_WRITE2_4 0x0D000010

static u32 write_console(const char *from, u32 length)
{
    char text[CALL_LIMIT];
    if (length > sizeof text || copy_from_user(text, from, length))
        return SYS_FAULT;
    console_write(text, length);
    return length;
}

/* Of the caller: user code may then use ports, and so may its children. */
static u32 set_iopl(struct registers *r, u32 level)
{
    struct task *task = current_task();
    if (level > 3)
        return SYS_INVALID;
    r->eflags = (r->eflags & ~EFLAGS_IOPL) | level << 12;
    task->iopl = level << 12;
    set_iopl_mask(task->iopl);
    return 0;
}

static u32 set_tls(u32 base)
{
    struct task *task = current_task();
    task->tls = segment(base, 0xFFFFF, ACCESS_USER_DATA, 0xC);
    u32 flags = irq_save();
    load_tls(&task->tls);
    restore_fl(flags);
    return GDT_TLS * 8 + 3;
}

/* One entry in a table that all tasks with an LDT share. */
static u32 set_ldt_entry(u32 base)
{
    struct task *task = current_task();
    struct descriptor value = segment(base, 0xFFFFF, ACCESS_USER_DATA, 0xC);
    u32 flags = irq_save();
    write_ldt_entry(ldt, 3, value.low, value.high);
    task->ldt_entries = 16;
    set_ldt(ldt, task->ldt_entries);
    restore_fl(flags);
    return 3 * 8 + 7;
}

static u32 watch(u32 address)
{
    if (address >= PAGE_OFFSET)
        return SYS_INVALID;
    set_debugreg(2, address);
    set_debugreg(7, address ? DR7_WRITE2_4 : 0);
    return 0;
}

/* One port of eight, in the bitmap behind the TSS, which is the caller's until it ends. */
static u32 allow_port(u32 port, u32 allowed)
{
    if (port >= PORTS_MAPPED)
        return SYS_INVALID;
    port_map_use(port, allowed);
    return 0;
}

/*
 * The call is the kernel's own `int 0x80`, whose frame has no stack of ring 3: that is written behind it, over what
 * the thread had there, and the way out is the one of every system call.
 */
static u32 execute(struct registers *r)
{
    if (from_user(r))
        return SYS_INVALID;
    task_become_user();
    r->cs = USER_CS;
    r->eip = (u32)user_entry;
    r->esp = USER_STACK_TOP - 16;
    r->ss = r->ds = r->es = USER_DS;
    r->fs = 0;
    r->eflags |= EFLAGS_IF;
    return 0;
}

u32 system_call(struct registers *r)
{
    u32 status, number;
    switch (r->eax) {
    case SYS_END:
        task_end(r->ebx & 0xFF);
    case SYS_FORK:
        return task_fork(r)->number;
    case SYS_WRITE:
        return write_console((const char *)r->ebx, r->ecx);
    case SYS_WAIT:
        number = task_wait(&status);
        if (number && copy_to_user((void *)r->ebx, &status, sizeof status))
            return SYS_FAULT;
        return number;
    case SYS_YIELD:
        schedule();
        return 0;
    case SYS_NUMBER:
        return current_task()->number;
    case SYS_IOPL:
        return set_iopl(r, r->ebx);
    case SYS_TLS:
        return set_tls(r->ebx);
    case SYS_LDT:
        return set_ldt_entry(r->ebx);
    case SYS_TICKS:
        return ticks;
    case SYS_FRAMES:
        return frames_free();
    case SYS_FEATURES:
        return cpu_features;
    case SYS_EXEC:
        return execute(r);
    case SYS_WATCH:
        return watch(r->ebx);
    case SYS_TRAPS:
        return debug_traps;
    case SYS_PORTS:
        return allow_port(r->ebx, r->ecx);
    default:
        return SYS_INVALID;
    }
}
