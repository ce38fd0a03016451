/* What ring 3 must not do: each in a child, whose exception the parent learns. */
#include "user.h"

static const u32 five_to_ten[] = {5, 10};

static const u16 unmasked = 0x37B;

#define CHILD(name, instruction, ...)                            \
    static u32 name(void)                                        \
    {                                                            \
        asm volatile(instruction ::__VA_ARGS__ : "memory", "cc");\
        return 0;                                                \
    }

CHILD(disable, "cli", "a"(0))
CHILD(enable, "sti", "a"(0))
CHILD(halt, "hlt", "a"(0))
CHILD(read_port, "inb $0x80, %%al", "a"(0))
CHILD(write_ports, "rep outsb", "S"(USER_BASE), "c"(2), "d"(0x80))
CHILD(read_cr0, "movl %%cr0, %%eax", "a"(0))
CHILD(write_cr3, "movl %0, %%cr3", "r"(0))
CHILD(write_dr, "movl %0, %%db7", "r"(0))
CHILD(read_msr, "rdmsr", "a"(0), "c"(0x174), "d"(0))
CHILD(load_table, "lgdtl (%0)", "r"(USER_BASE))
CHILD(clear_ts, "clts", "a"(0))
CHILD(flush, "invlpg (%0)", "r"(USER_BASE))
CHILD(kernel_gate, "int $0x30", "a"(0))
CHILD(other_gate, "int $0x82", "a"(0))
CHILD(timer_gate, "int $0x41", "a"(0))
CHILD(kernel_segment, "movl %0, %%ds", "r"(KERNEL_DS))
CHILD(kernel_stack, "movl %0, %%ss", "r"(KERNEL_DS))
CHILD(kernel_code, "ljmp %0, $0", "i"(KERNEL_CS))
CHILD(bad_selector, "movl %0, %%es", "r"(0xFFF8))
CHILD(invalid, "ud2", "a"(0))
CHILD(divide, "divl %0", "r"(0), "a"(1), "d"(0))
CHILD(trap, "int3", "a"(0))
CHILD(fpu_divide, "fninit\n\tfldcw %0\n\tfld1\n\tfldz\n\tfdivrp\n\tfwait", "m"(unmasked))
CHILD(overflow, "addl $1, %0\n\tinto", "r"(0x7FFFFFFF))
CHILD(bounds, "boundl %0, (%1)", "r"(0), "r"(five_to_ten))
CHILD(null_read, "movl 0, %0", "r"(0))
CHILD(null_call, "call *%0", "r"(0))
CHILD(text_write, "movl %0, (%1)", "r"(0), "r"(USER_BASE))
CHILD(kernel_read, "movl (%1), %0", "r"(0), "r"(PAGE_OFFSET + 0x100000))
CHILD(kernel_write, "movl %0, (%1)", "r"(0), "r"(PAGE_OFFSET + 0x100000))
CHILD(kernel_jump, "jmp *%0", "r"(PAGE_OFFSET + 0x100000))

static const struct {
    u32 (*function)(void);
    u32 vector;
    const char *what;
} cases[] = {
    {disable, 13, "cli"},
    {enable, 13, "sti"},
    {halt, 13, "hlt"},
    {read_port, 13, "a port"},
    {write_ports, 13, "ports by a string"},
    {read_cr0, 13, "CR0"},
    {write_cr3, 13, "CR3"},
    {write_dr, 13, "DR7"},
    {read_msr, 13, "an MSR"},
    {load_table, 13, "lgdt"},
    {clear_ts, 13, "clts"},
    {flush, 13, "invlpg"},
    {kernel_gate, 13, "the gate of the timer"},
    {other_gate, 13, "a gate that is not there"},
    {timer_gate, 13, "the gate of the local timer"},
    {kernel_segment, 13, "the kernel's data segment"},
    {kernel_stack, 13, "the kernel's stack segment"},
    {kernel_code, 13, "the kernel's code segment"},
    {bad_selector, 13, "a selector beyond the GDT"},
    {invalid, 6, "an invalid opcode"},
    {divide, 0, "a division by zero"},
    {trap, 3, "a breakpoint"},
    {fpu_divide, 16, "a division by zero in the FPU"},
    {overflow, 4, "an overflow"},
    {bounds, 5, "a bound"},
    {null_read, 14, "a read at 0"},
    {null_call, 14, "a call to 0"},
    {text_write, 14, "a write to its own text"},
    {kernel_read, 14, "a read of the kernel"},
    {kernel_write, 14, "a write to the kernel"},
    {kernel_jump, 14, "a jump to the kernel"},
};

void check_exceptions(void)
{
    for (u32 at = 0; at < sizeof cases / sizeof cases[0]; at++) {
        expect("exceptions", cases[at].what, run_child(cases[at].function), KILLED | cases[at].vector);
        ok(cases[at].what);
    }
}

static u32 use_ports(void)
{
    asm volatile("outb %%al, $0x80\n\tinb $0x61, %%al" ::"a"(0) : "memory");
    return 5;
}

static u32 use_ports_with_leave(void)
{
    if (call(SYS_IOPL, 3))
        return 1;
    u32 status = use_ports();
    call(SYS_YIELD, 0);
    return status == 5 ? use_ports() : 2;
}

static u32 give_up_ports(void)
{
    call(SYS_IOPL, 3);
    call(SYS_IOPL, 0);
    return use_ports();
}

static u32 use_one_port(void)
{
    if (call_int(SYS_PORTS, 0x80, 1, 0))
        return 1;
    asm volatile("outb %%al, $0x80" ::"a"(0));
    return 6;
}

static u32 use_two_ports(void)
{
    call_int(SYS_PORTS, 0x80, 1, 0);
    asm volatile("outb %%al, $0x80\n\toutw %%ax, $0x80" ::"a"(0));
    return 7;
}

void check_port_rights(void)
{
    const char *name = "rights to ports";
    expect(name, "without leave", run_child(use_ports), KILLED | 13);
    expect(name, "with leave", run_child(use_ports_with_leave), 5);
    expect(name, "with leave given up", run_child(give_up_ports), KILLED | 13);
    expect(name, "with leave for one", run_child(use_one_port), 6);
    expect(name, "two with leave for one", run_child(use_two_ports), KILLED | 13);
    expect(name, "without leave again", run_child(use_ports), KILLED | 13);
    ok(name);
}
