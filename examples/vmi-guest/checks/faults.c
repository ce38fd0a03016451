/* Exceptions of the kernel itself that the exception table knows. */
#include "checks.h"

static const char name[] = "exceptions fixed up";
static u32 count;

/* `at` is the address that the processor saves: 1b of the instruction, or 2b behind it. */
#define FAULTING(instruction, at, ...)                                                                            \
    asm volatile("1:\t" instruction "\n2:\n\t"                                                                    \
                 ".pushsection __ex_table, \"a\"\n\t.balign 4\n\t.long " at ", 2b\n\t.popsection" ::__VA_ARGS__ \
                 : "memory", "cc")

static void expect(const char *what, u32 vector, u32 error)
{
    EXPECT(name, what, last_fault.count, ++count);
    EXPECT(name, "the vector", last_fault.vector, vector);
    EXPECT(name, "the error code", last_fault.error, error);
}

void check_kernel_faults(void)
{
    u32 beyond = GDT_ENTRIES * 8;

    count = last_fault.count;
    FAULTING("ud2", "1b", "a"(0));
    expect("an invalid opcode", 6, 0);
    FAULTING("divl %1", "1b", "a"(1), "r"(0), "d"(0));
    expect("a division by zero", 0, 0);
    FAULTING("int3", "2b", "a"(0));
    expect("a breakpoint", 3, 0);
    FAULTING("into", "2b", "a"(0));
    EXPECT(name, "an overflow that is none", last_fault.count, count);
    FAULTING("addl $1, %0\n3:\tinto", "2b", "a"(0x7FFFFFFF));
    expect("an overflow", 4, 0);
    FAULTING("movl %0, %%gs", "1b", "r"(beyond));
    expect("a selector beyond the GDT", 13, beyond);
    asm volatile("movl %0, %%gs" ::"r"(0));
    struct descriptor absent = segment(0, 0xFFFFF, ACCESS_USER_DATA & ~0x80, 0xC);
    write_gdt_entry(gdt, GDT_TLS, absent.low, absent.high);
    FAULTING("movl %0, %%gs", "1b", "r"(GDT_TLS * 8 + 3));
    expect("a segment that is not present", 11, GDT_TLS * 8);
    write_gdt_entry(gdt, GDT_TLS, 0, 0);
    asm volatile("movl %0, %%gs" ::"r"(0));
    passed(name);
}
