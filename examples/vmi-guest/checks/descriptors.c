/* Descriptor tables: read back, entries written, segments used. */
#include "checks.h"

void check_descriptor_tables(void)
{
    const char *name = "descriptor tables";
    struct table_pointer pointer = {0, 0};
    store_gdt(&pointer);
    EXPECT(name, "the GDT's base", pointer.base, (u32)gdt);
    EXPECT(name, "the GDT's limit", pointer.limit, sizeof gdt - 1);
    store_idt(&pointer);
    EXPECT(name, "the IDT's base", pointer.base, (u32)idt);
    EXPECT(name, "the IDT's limit", pointer.limit, sizeof idt - 1);
    EXPECT(name, "TR", store_tr(), GDT_TSS * 8);
#ifndef FORM_MAINLINE
    EXPECT(name, "LDTR", store_ldt(), 0);
    set_ldt(ldt, 16);
    EXPECT(name, "LDTR when set", store_ldt(), GDT_LDT * 8);
    set_ldt(NULL, 0);
#endif
    passed(name);
}

static u32 read_through_gs(u32 selector)
{
    u32 value;
    asm volatile("movl %1, %%gs\n\tmovl %%gs:0, %0\n\tmovl %2, %%gs" : "=&r"(value) : "r"(selector), "r"(0));
    return value;
}

void check_descriptor_entries(void)
{
    const char *name = "descriptor entries";
    static u32 first = 0x11111111, second = 0x22222222;
    struct descriptor value;

    value = segment((u32)&first, 3, ACCESS_USER_DATA, 4);
    write_gdt_entry(gdt, GDT_TLS, value.low, value.high);
    EXPECT(name, "what a segment of the GDT shows", read_through_gs(GDT_TLS * 8 + 3), first);
    value = segment((u32)&second, 3, ACCESS_USER_DATA, 4);
    write_gdt_entry(gdt, GDT_TLS, value.low, value.high);
    EXPECT(name, "what it shows when rewritten", read_through_gs(GDT_TLS * 8 + 3), second);
    write_gdt_entry(gdt, GDT_TLS, 0, 0);

    value = segment((u32)&first, 3, ACCESS_USER_DATA, 4);
    write_ldt_entry(ldt, 2, value.low, value.high);
    set_ldt(ldt, 16);
    EXPECT(name, "what a segment of the LDT shows", read_through_gs(2 * 8 + 7), first);
    value = segment((u32)&second, 3, ACCESS_USER_DATA, 4);
    write_ldt_entry(ldt, 2, value.low, value.high);
    EXPECT(name, "what it shows when rewritten", read_through_gs(2 * 8 + 7), second);
    write_ldt_entry(ldt, 2, 0, 0);
    set_ldt(NULL, 0);
    passed(name);
}

/* Far calls as into a BIOS: to the kernel's own segment, and to one of 16 bits. */
asm(".text\n"
    "far_function: addl $1, %eax\n\tlret\n"
    ".code16\n"
    "near_bios: addl $2, %eax\n\tlretl\n"
    ".code32\n");
extern u8 far_function[], near_bios[];

void check_far_calls(void)
{
    const char *name = "far calls";
    u32 value = 0, cs;

    asm volatile("lcall %[segment], $far_function" : "+a"(value) : [segment] "i"(KERNEL_CS) : "memory", "cc");
    EXPECT(name, "the result", value, 1);
    struct descriptor bios = segment((u32)near_bios, 0xFFFF, 0x9A, 0);
    write_gdt_entry(gdt, GDT_BIOS, bios.low, bios.high);
    asm volatile("lcall %[segment], $0" : "+a"(value) : [segment] "i"(GDT_BIOS * 8) : "memory", "cc");
    EXPECT(name, "the result of 16 bits", value, 3);
    write_gdt_entry(gdt, GDT_BIOS, 0, 0);
    asm volatile("movl %%cs, %0" : "=r"(cs));
    EXPECT(name, "CS behind them", cs & 0xFFFF, KERNEL_CS | kernel_rpl);
    passed(name);
}

/* A gate that is rewritten while the table is in use. */
asm(".text\n"
    "gate_one: movl $1, %eax\n\tjmp gate_end\n"
    "gate_two: movl $2, %eax\n\tjmp gate_end\n"
    "gate_end: jmp interrupt_return\n");
extern void gate_one(void), gate_two(void);

static u32 through_gate(void)
{
    u32 value = 0;
    asm volatile("int $0x90" : "+a"(value)::"memory", "cc");
    return value;
}

void check_gates(void)
{
    const char *name = "gates";
    struct descriptor value = gate(KERNEL_CS, (u32)gate_one, 0x8E);
    write_idt_entry(idt, 0x90, value.low, value.high);
    EXPECT(name, "the first handler", through_gate(), 1);
    value = gate(KERNEL_CS, (u32)gate_two, 0x8F);
    write_idt_entry(idt, 0x90, value.low, value.high);
    EXPECT(name, "the second handler", through_gate(), 2);
    write_idt_entry(idt, 0x90, 0, 0);
    passed(name);
}
