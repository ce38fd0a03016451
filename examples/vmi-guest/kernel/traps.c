/* Gates of the IDT, and what becomes of an exception. */
#include "task.h"

typedef void entry(void);

extern entry divide_error, debug, nmi, breakpoint, overflow, bounds, invalid_opcode, device_not_available,
    coprocessor_overrun, invalid_tss, segment_not_present, stack_segment, general_protection, page_fault_entry,
    coprocessor_error, alignment_check, unexpected, timer_entry, lvtt_entry, spurious_entry, system_call_entry,
    sysenter_entry;

/* What the exception table holds: an instruction that may fault, and where to go on then. */
struct fix_up {
    u32 instruction, go_on;
};
extern const struct fix_up __ex_table_start[], __ex_table_end[];

struct last_fault last_fault;
volatile u32 debug_traps, debug_status, debug_address;

#define INTERRUPT_GATE 0x8E
#define TRAP_GATE 0x8F
#define USER_INTERRUPT_GATE 0xEE
#define USER_TRAP_GATE 0xEF
#define TASK_GATE 0x85

static void set_gate(u32 vector, u8 access, entry *handler)
{
    struct descriptor value = gate(KERNEL_CS, (u32)handler, access);
    write_idt_entry(idt, vector, value.low, value.high);
}

/* Enough to survive until the rest is there: page faults and whatever else is not expected. */
void traps_early(void)
{
    struct table_pointer pointer = {sizeof idt - 1, (u32)idt};
    for (u32 vector = 0; vector < 32; vector++)
        set_gate(vector, INTERRUPT_GATE, unexpected);
    set_gate(6, INTERRUPT_GATE, invalid_opcode);
    set_gate(13, INTERRUPT_GATE, general_protection);
    set_gate(14, INTERRUPT_GATE, page_fault_entry);
    load_idt(&pointer);
}

/* The gates of 2.6.32: traps keep interrupts on, int3 and the page fault do not, the double fault has a task. */
void traps_init(void)
{
    static entry *const handlers[] = {
        divide_error, debug, nmi, breakpoint, overflow, bounds, invalid_opcode, device_not_available,
        unexpected, coprocessor_overrun, invalid_tss, segment_not_present, stack_segment, general_protection,
        page_fault_entry, unexpected, coprocessor_error, alignment_check,
    };
    struct table_pointer pointer = {sizeof idt - 1, (u32)idt};

    for (u32 vector = 0; vector < ARRAY_SIZE(handlers); vector++)
        set_gate(vector, vector == 2 || vector == 14 ? INTERRUPT_GATE : TRAP_GATE, handlers[vector]);
    set_gate(1, INTERRUPT_GATE, debug);
    set_gate(3, USER_INTERRUPT_GATE, breakpoint);
    set_gate(4, USER_TRAP_GATE, overflow);
    struct descriptor task = gate(GDT_DOUBLE_FAULT * 8, 0, TASK_GATE);
    write_idt_entry(idt, 8, task.low, task.high);
    set_gate(VECTOR_TIMER, INTERRUPT_GATE, timer_entry);
    set_gate(VECTOR_LVTT, INTERRUPT_GATE, lvtt_entry);
    set_gate(VECTOR_SPURIOUS, INTERRUPT_GATE, spurious_entry);
    for (u32 irq = 1; irq < 16; irq++)
        set_gate(VECTOR_TIMER + irq, INTERRUPT_GATE, spurious_entry);
    set_gate(VECTOR_SYSCALL, USER_TRAP_GATE, system_call_entry);
    load_idt(&pointer);

    if (cpu_features & FEATURE_SEP) {
        write_msr(0x174, KERNEL_CS);
        write_msr(0x175, (u32)&cpu_tss);
        write_msr(0x176, (u32)sysenter_entry);
    }
}

bool fix_up(struct registers *r)
{
    for (const struct fix_up *entry = __ex_table_start; entry < __ex_table_end; entry++)
        if (entry->instruction == r->eip) {
            last_fault.count++;
            last_fault.vector = r->vector;
            last_fault.error = r->error;
            r->eip = entry->go_on;
            return true;
        }
    return false;
}

static void NORETURN die(struct registers *r)
{
    printf("kernel: vector %u error %x at %x:%x\n", r->vector, r->error, r->cs, r->eip);
    failed("kernel", "an exception", r->vector, 0);
}

void double_fault_from(void)
{
    failed("kernel", "a double fault", 8, 0);
}

/* From entry.S; the debug and page fault gates come with interrupts off. */
void exception_from(struct registers *r)
{
    if (r->vector == 14) {
        page_fault(r);
        return;
    }
    if (r->vector == 1) {
        debug_status = get_debugreg(6) & 0x400F;
        debug_address = r->eip;
        debug_traps++;
        set_debugreg(6, 0);
        set_debugreg(7, 0);
        r->eflags &= ~EFLAGS_TF;
        return;
    }
    if (from_user(r)) {
        irq_enable();
        task_end(STATUS_KILLED | r->vector);
    }
    if (!fix_up(r))
        die(r);
}

/* With interrupts off, on the way out of the kernel. */
void leave_kernel(struct registers *r)
{
    if (!from_user(r))
        return;
    while (need_schedule) {
        irq_enable();
        schedule();
        irq_disable();
    }
}

#define TRY(instruction, ...)                                                                         \
    ({                                                                                                \
        u32 faulted_ = 0;                                                                             \
        asm volatile("1:\t" instruction "\n2:\n\t"                                                    \
                     ".pushsection .fixup, \"ax\"\n3:\tmovl $1, %0\n\tjmp 2b\n\t.popsection\n\t"      \
                     ".pushsection __ex_table, \"a\"\n\t.balign 4\n\t.long 1b, 3b\n\t.popsection"     \
                     : "+r"(faulted_), __VA_ARGS__);                                                  \
        faulted_;                                                                                     \
    })

u32 try_read(const void *address, u32 *value)
{
    u32 read = 0;
    u32 faulted = TRY("movl %2, %1", "+r"(read) : "m"(*(const volatile u32 *)address) : "memory");
    *value = read;
    return faulted;
}

u32 try_write(void *address, u32 value)
{
    return TRY("movl %1, %2", "+r"(value), "=m"(*(volatile u32 *)address)::"memory");
}

static u32 copy(void *to, const void *from, u32 length)
{
    return TRY("rep movsb", "+c"(length), "+S"(from), "+D"(to)::"memory");
}

u32 copy_from_user(void *to, const void *from, u32 length)
{
    if ((u32)from >= PAGE_OFFSET || length > PAGE_OFFSET - (u32)from)
        return 1;
    return copy(to, from, length);
}

u32 copy_to_user(void *to, const void *from, u32 length)
{
    if ((u32)to >= PAGE_OFFSET || length > PAGE_OFFSET - (u32)to)
        return 1;
    return copy(to, from, length);
}
