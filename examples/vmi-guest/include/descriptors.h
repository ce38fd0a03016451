/* Descriptor tables as the processor and VMI_SetInitialAPState see them. */
#ifndef DESCRIPTORS_H
#define DESCRIPTORS_H

#include "layout.h"
#include "types.h"

struct descriptor {
    u32 low, high;
};

/* What LGDT and LIDT load. */
struct table_pointer {
    u16 limit;
    u32 base;
} __attribute__((packed));

/* The 32-bit TSS. */
struct tss {
    u32 link;
    u32 esp0, ss0, esp1, ss1, esp2, ss2;
    u32 cr3, eip, eflags;
    u32 eax, ecx, edx, ebx, esp, ebp, esi, edi;
    u32 es, cs, ss, ds, fs, gs;
    u32 ldt;
    u16 trace, io_map;
};

/* The processor's own TSS, with the map of ports that ring 3 may use: a bit for each, and a byte of ones behind. */
struct cpu_tss {
    struct tss tss;
    u8 ports[1024 / 8 + 1];
};

/* What VMI_SetInitialAPState takes. */
struct ap_state {
    u32 cr0, cr2, cr3, cr4;
    u64 efer;
    u32 eip, eflags, eax, ebx, ecx, edx, esp, ebp, esi, edi;
    u16 cs, ss, ds, es, fs, gs, ldtr, gdtr_limit;
    u32 gdtr_base, idtr_base;
    u16 idtr_limit;
} __attribute__((packed));

_Static_assert(OFFSET_OF(struct ap_state, eip) == 0x18, "APState");
_Static_assert(OFFSET_OF(struct ap_state, cs) == 0x40, "APState");
_Static_assert(OFFSET_OF(struct ap_state, idtr_limit) == 0x58, "APState");

/* A segment: the access byte is bits 8 to 15 of the high word, the flags (G, D) bits 20 to 23. */
static inline struct descriptor segment(u32 base, u32 limit, u8 access, u8 flags)
{
    return (struct descriptor){
        (limit & 0xFFFF) | base << 16,
        (base & 0xFF000000) | (base >> 16 & 0xFF) | (limit & 0xF0000) | (u32)access << 8 | (u32)flags << 20,
    };
}

/* A gate of the IDT: access 0x8E interrupt, 0x8F trap, 0xEF trap for ring 3, 0x85 task. */
static inline struct descriptor gate(u16 selector, u32 offset, u8 access)
{
    return (struct descriptor){(u32)selector << 16 | (offset & 0xFFFF), (offset & 0xFFFF0000) | (u32)access << 8};
}

#define ACCESS_LDT 0x82
#define ACCESS_TSS 0x89
#define ACCESS_USER_DATA 0xF2

extern struct descriptor early_gdt[GDT_ENTRIES], gdt[GDT_ENTRIES], idt[256], ldt[512];
extern struct cpu_tss cpu_tss;
extern struct tss double_fault_tss;

#endif
