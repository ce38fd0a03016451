/* Calls of 13.0 that 3.0 does not have: reading, swapping and testing entries; entries of 8 bytes. */
#include "checks.h"
#include "pages.h"

#ifdef FORM_RFC_V1

void check_entry_calls(void)
{
    const char *name = "page table entry calls";
    u32 frame = frame_get();
    pte *entry = kernel_entry(TRY_TABLE);
    u32 value = frame << 12 | PTE_PRESENT | PTE_WRITE;

    set_entry(entry, value, 0);
    EXPECT(name, "the entry", get_entry(entry), value);
    EXPECT(name, "the accessed bit", test_and_set_entry_bit(entry, PTE_BIT_ACCESSED, 0), false);
    EXPECT(name, "the accessed bit when set", test_and_set_entry_bit(entry, PTE_BIT_ACCESSED, 0), true);
    EXPECT(name, "the accessed bit to clear", test_and_clear_entry_bit(entry, PTE_BIT_ACCESSED, 0), true);
    EXPECT(name, "the accessed bit when cleared", test_and_clear_entry_bit(entry, PTE_BIT_ACCESSED, 0), false);
    EXPECT(name, "the entry swapped out", swap_entry(entry, 0, 0), value);
    EXPECT(name, "the entry when swapped", get_entry(entry), 0);
    flush_tlb_single(TRY_TABLE);
    flush_deferred(DEFERRED_MMU);
    frame_put(frame);
    passed(name);
}

/*
 * Entries of PAE tables, in a page that is none: not present, so they only must come back as they went. The high
 * halves are 0: a hypervisor whose entries have four bytes while PAE is off (Xen, KVM) does not write them.
 */

static void set_long(u64 *entry, u64 value)
{
    u32 low = (u32)value, high = (u32)(value >> 32);
    asm volatile(SITE(VMI_SetPxELong, "movl %%edx, 4(%%ecx); movl %%eax, (%%ecx)")
                 : "+a"(low), "+d"(high), "+c"(entry)::CHANGED);
}

static u64 get_long(u64 *entry)
{
    u32 low = (u32)entry, high;
    asm volatile(SITE(VMI_GetPxELong, "movl 4(%%eax), %%edx; movl (%%eax), %%eax")
                 : "+a"(low), "=d"(high)::"ecx", CHANGED);
    return (u64)high << 32 | low;
}

static u64 swap_long(u64 *entry, u64 value)
{
    u32 low = (u32)value, high = (u32)(value >> 32);
    asm volatile(SITE(VMI_SwapPxELongAtomic,
                      "pushl %%ebx; pushl %%esi; movl %%ecx, %%esi; movl %%eax, %%ebx; movl %%edx, %%ecx; "
                      "movl (%%esi), %%eax; movl 4(%%esi), %%edx; 1: lock cmpxchg8b (%%esi); jne 1b; "
                      "popl %%esi; popl %%ebx")
                 : "+a"(low), "+d"(high), "+c"(entry)::CHANGED);
    return (u64)high << 32 | low;
}

static u64 deactivate_long(u64 *entry)
{
    u32 low = (u32)entry, high;
    asm volatile(SITE(VMI_DeactivatePxELongAtomic,
                      "movl %%eax, %%ecx; xorl %%eax, %%eax; xchgl %%eax, (%%ecx); "
                      "xorl %%edx, %%edx; xchgl %%edx, 4(%%ecx)")
                 : "+a"(low), "=d"(high)::"ecx", CHANGED);
    return (u64)high << 32 | low;
}

static bool set_long_bit(u64 *entry, u32 bit)
{
    u32 old = (u32)entry;
    asm volatile(SITE(VMI_TestAndSetPxELongBit, "lock btsl %%edx, (%%eax); sbbl %%eax, %%eax; andl $1, %%eax")
                 : "+a"(old), "+d"(bit)::"ecx", CHANGED);
    return old;
}

static bool clear_long_bit(u64 *entry, u32 bit)
{
    u32 old = (u32)entry;
    asm volatile(SITE(VMI_TestAndClearPxELongBit, "lock btrl %%edx, (%%eax); sbbl %%eax, %%eax; andl $1, %%eax")
                 : "+a"(old), "+d"(bit)::"ecx", CHANGED);
    return old;
}

static void expect_long(const char *what, u64 found, u64 expected)
{
    EXPECT("long entry calls", what, (u32)(found >> 32), (u32)(expected >> 32));
    EXPECT("long entry calls", what, (u32)found, (u32)expected);
}

void check_long_entries(void)
{
    static u64 page[512] PAGE_ALIGNED;
    const u64 first = 0x12345066, second = 0xBCDEF040;
    u64 *entry = &page[9];

    set_long(entry, first);
    expect_long("the entry", get_long(entry), first);
    expect_long("the entry swapped out", swap_long(entry, second), first);
    expect_long("the entry when swapped", get_long(entry), second);
    EXPECT("long entry calls", "a bit", set_long_bit(entry, PTE_BIT_ACCESSED), false);
    EXPECT("long entry calls", "a bit when set", set_long_bit(entry, PTE_BIT_ACCESSED), true);
    EXPECT("long entry calls", "a bit to clear", clear_long_bit(entry, PTE_BIT_ACCESSED), true);
    EXPECT("long entry calls", "a bit when cleared", clear_long_bit(entry, PTE_BIT_ACCESSED), false);
    expect_long("the entry taken out", deactivate_long(entry), second);
    expect_long("the entry when taken out", get_long(entry), 0);
    passed("long entry calls");
}

#endif
