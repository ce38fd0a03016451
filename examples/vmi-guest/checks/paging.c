/* Page tables: entries set, changed, deferred and taken away; accessed and dirty; rights; directories. */
#include "checks.h"
#include "pages.h"

#define AT ((volatile u32 *)TRY_TABLE)
#define PLAIN (PTE_PRESENT | PTE_WRITE)

static void map(u32 address, u32 frame, u32 flags)
{
    set_pte_at(NULL, address, kernel_entry(address), frame << 12 | flags);
}

static void unmap(u32 address)
{
    set_pte_at(NULL, address, kernel_entry(address), 0);
    flush_tlb_single(address);
}

static volatile u32 *direct(u32 frame)
{
    return frame_address(frame);
}

void check_mapping(void)
{
    const char *name = "mapping";
    u32 first = frame_get(), second = frame_get(), value;

    map(TRY_TABLE, first, PLAIN);
    AT[3] = 0x1111;
    EXPECT(name, "what was written through it", direct(first)[3], 0x1111);
    map(TRY_TABLE, second, PLAIN);
    flush_tlb_single(TRY_TABLE);
    EXPECT(name, "the other page", AT[3], 0);
    AT[3] = 0x2222;
    EXPECT(name, "what was written to it", direct(second)[3], 0x2222);
    map(TRY_TABLE, first, PLAIN);
    flush_tlb_user();
    EXPECT(name, "the first again, by a flush of all", AT[3], 0x1111);
    map(TRY_TABLE, second, PLAIN | PTE_GLOBAL);
    flush_tlb_kernel();
    EXPECT(name, "the second again, by a flush of global pages", AT[3], 0x2222);
#ifdef PAE
    set_pte_atomic(kernel_entry(TRY_TABLE), first << 12 | PLAIN | PTE_GLOBAL);
    flush_tlb_kernel();
    EXPECT(name, "the first again, set at once", AT[3], 0x1111);
#endif
    set_pte(kernel_entry(TRY_TABLE), 0);
    flush_tlb_kernel();
    EXPECT(name, "a read when it is gone", try_read((void *)TRY_TABLE, &value), 1);
    EXPECT(name, "the error code", last_fault.error, 0);
    EXPECT(name, "CR2", last_fault.address, TRY_TABLE);
    frame_put(first);
    frame_put(second);
    passed(name);
}

void check_accessed_dirty(void)
{
    const char *name = "accessed and dirty";
    u32 frame = frame_get();
    pte *entry = kernel_entry(TRY_TABLE);

    map(TRY_TABLE, frame, PLAIN);
    EXPECT(name, "the entry", get_entry(entry) & 0xFFF, PLAIN);
    (void)AT[0];
    EXPECT(name, "the entry when read", get_entry(entry) & 0xFFF, PLAIN | PTE_ACCESSED);
    AT[0] = 1;
    EXPECT(name, "the entry when written", get_entry(entry) & 0xFFF, PLAIN | PTE_ACCESSED | PTE_DIRTY);
    EXPECT(name, "dirty", pte_test_and_clear(NULL, TRY_TABLE, entry, PTE_BIT_DIRTY), true);
    flush_tlb_single(TRY_TABLE);
    EXPECT(name, "dirty when cleared", pte_test_and_clear(NULL, TRY_TABLE, entry, PTE_BIT_DIRTY), false);
    EXPECT(name, "accessed", pte_test_and_clear(NULL, TRY_TABLE, entry, PTE_BIT_ACCESSED), true);
    flush_tlb_single(TRY_TABLE);
    AT[0] = 2;
    EXPECT(name, "the entry when written again", get_entry(entry) & 0xFFF, PLAIN | PTE_ACCESSED | PTE_DIRTY);
    u32 old = (u32)pte_swap(NULL, TRY_TABLE, entry, 0);
    flush_tlb_single(TRY_TABLE);
    EXPECT(name, "the entry taken out", old, frame << 12 | PLAIN | PTE_ACCESSED | PTE_DIRTY);
    frame_put(frame);
    passed(name);
}

void check_protection(void)
{
    const char *name = "write protection";
    u32 frame = frame_get(), value;
    pte *entry = kernel_entry(TRY_TABLE);

    map(TRY_TABLE, frame, PLAIN);
    AT[1] = 7;
    pte_test_and_clear(NULL, TRY_TABLE, entry, PTE_BIT_WRITE);
    flush_tlb_single(TRY_TABLE);
    EXPECT(name, "a write", try_write((void *)&AT[1], 8), 1);
    EXPECT(name, "the error code", last_fault.error, 3);
    EXPECT(name, "CR2", last_fault.address, (u32)&AT[1]);
    EXPECT(name, "a read", try_read((void *)&AT[1], &value), 0);
    EXPECT(name, "the word", value, 7);
    pte_test_and_set(NULL, TRY_TABLE, entry, PTE_BIT_WRITE);
    flush_tlb_single(TRY_TABLE);
    EXPECT(name, "a write when allowed", try_write((void *)&AT[1], 8), 0);
    EXPECT(name, "the word behind it", direct(frame)[1], 8);
    unmap(TRY_TABLE);
    frame_put(frame);
    passed(name);
}

#define SEVERAL 8

void check_lazy_updates(void)
{
    const char *name = "lazy updates";
    u32 frames[SEVERAL];

    lazy_mmu_enter();
    for (u32 at = 0; at < SEVERAL; at++) {
        frames[at] = frame_get();
        direct(frames[at])[0] = at + 100;
        map(TRY_TABLE + at * PAGE_SIZE, frames[at], PLAIN);
    }
    lazy_mmu_leave();
    for (u32 at = 0; at < SEVERAL; at++)
        EXPECT(name, "a page", *(volatile u32 *)(TRY_TABLE + at * PAGE_SIZE), at + 100);
    lazy_mmu_enter();
    for (u32 at = 0; at < SEVERAL; at++)
        map(TRY_TABLE + at * PAGE_SIZE, frames[SEVERAL - 1 - at], PLAIN);
    lazy_mmu_leave();
    flush_tlb_user();
    for (u32 at = 0; at < SEVERAL; at++)
        EXPECT(name, "a page when turned", *(volatile u32 *)(TRY_TABLE + at * PAGE_SIZE), SEVERAL - 1 - at + 100);
    for (u32 at = 0; at < SEVERAL; at++) {
        unmap(TRY_TABLE + at * PAGE_SIZE);
        frame_put(frames[at]);
    }
    passed(name);
}

void check_large_page(void)
{
    const char *name = "large page";
    u32 value;

    if (cpu_features & FEATURE_PSE) {
        u32 frame = frame_get(), place = frame << 12 & ~(LARGE_PAGE - 1), inside = (frame << 12) - place;
        set_pmd(directory_entry(kernel_directory, TRY_LARGE), place | PLAIN | PTE_LARGE);
        for (u32 at = 0x100000; at < LARGE_PAGE; at += 0x3F004)
            EXPECT(name, "a word", *(volatile u32 *)(TRY_LARGE + at), *(volatile u32 *)(PAGE_OFFSET + place + at));
        *(volatile u32 *)(TRY_LARGE + inside) = 0x4444;
        EXPECT(name, "a word written", direct(frame)[0], 0x4444);
        frame_put(frame);
        set_pmd(directory_entry(kernel_directory, TRY_LARGE), 0);
        flush_tlb_kernel();
    }
    EXPECT(name, "a read when it is gone", try_read((void *)TRY_LARGE, &value), 1);
    passed(name);
}

/* A page table that is written through another mapping than the direct one, as HIGHPTE kernels do. */
void check_mapped_table(void)
{
    const char *name = "mapped page table";
    u32 table = frame_get(), page = frame_get();
    u32 window = fixmap_address(FIX_TABLE);

    alloc_pt(table);
    set_fixmap(FIX_TABLE, table, KERNEL_PAGE);
    set_linear_mapping(1, window, 1, table);
    set_pte_at(NULL, TRY_LARGE + 5 * PAGE_SIZE, (pte *)window + 5, page << 12 | PLAIN);
    set_pmd(directory_entry(kernel_directory, TRY_LARGE), table << 12 | KERNEL_PAGE);
    *(volatile u32 *)(TRY_LARGE + 5 * PAGE_SIZE) = 0x5555;
    EXPECT(name, "the word", direct(page)[0], 0x5555);
    set_pte_at(NULL, TRY_LARGE + 5 * PAGE_SIZE, (pte *)window + 5, 0);
    set_pmd(directory_entry(kernel_directory, TRY_LARGE), 0);
    flush_tlb_kernel();
    set_linear_mapping(1, 0, 0, 0);
    set_fixmap(FIX_TABLE, 0, 0);
    release_pt(table);
    frame_put(table);
    frame_put(page);
    passed(name);
}

/* The boot of Linux finds out whether the processor heeds write protection on a mapping of its own directory. */
void check_directory_protection(void)
{
    const char *name = "write protection of the directory";
    u32 *window = (u32 *)fixmap_address(FIX_TEST), value;

    set_fixmap(FIX_TEST, kernel_frame(kernel_directory), PTE_PRESENT | PTE_USER | PTE_ACCESSED);
    EXPECT(name, "a read", try_read(window, &value), 0);
    EXPECT(name, "the entry", value, (u32)get_entry(&kernel_directory[0]));
    EXPECT(name, "a write", try_write(window, 0), 1);
    EXPECT(name, "the error code", last_fault.error, 3);
    set_fixmap(FIX_TEST, 0, 0);
    EXPECT(name, "a read when it is gone", try_read(window, &value), 1);
    passed(name);
}

/* A directory of its own, written before and while it is loaded. */
void check_address_space(void)
{
    const char *name = "address space";
    static struct address_space space;
    volatile u32 *user = (u32 *)USER_HEAP;
    u32 first = frame_get(), second = frame_get(), value;

    space_create(&space);
    set_pte_at(&space, USER_HEAP, space_entry(&space, USER_HEAP, true), first << 12 | PLAIN | PTE_USER);
    EXPECT(name, "a read before", try_read((void *)user, &value), 1);
    space_switch(&space);
    EXPECT(name, "CR3", read_cr3(), (u32)space.directory - PAGE_OFFSET);
    user[0] = 0x6666;
    EXPECT(name, "the word", direct(first)[0], 0x6666);
    set_pte_at(&space, USER_HEAP, space_entry(&space, USER_HEAP, true), second << 12 | PLAIN | PTE_USER);
    flush_tlb_single(USER_HEAP);
    EXPECT(name, "the other page's word", user[0], 0);
    set_pte_at(&space, USER_HEAP, space_entry(&space, USER_HEAP, true), first << 12 | PLAIN | PTE_USER);
    flush_tlb_single(USER_HEAP);
    EXPECT(name, "the first page's word", user[0], 0x6666);
    frame_put(second);
    space_empty(&space);
    space_switch(&kernel_space);
    EXPECT(name, "a read behind", try_read((void *)user, &value), 1);
    space_destroy(&space);
    passed(name);
}

/* A table that the kernel gets while another directory is loaded: its entry is copied there at the first fault. */
void check_late_table(void)
{
    const char *name = "late kernel table";
    static struct address_space space;
    u32 table = frame_get(), page = frame_get();

    space_create(&space);
    space_switch(&space);
    alloc_pt(table);
    pte *entries = frame_address(table);
    set_pte_at(NULL, TRY_LATE, &entries[TRY_LATE >> 12 & (ENTRIES - 1)], page << 12 | PLAIN);
    set_pmd(directory_entry(kernel_directory, TRY_LATE), table << 12 | KERNEL_PAGE);
#ifndef PAE                                 /* where the kernel's part is one directory for all */
    EXPECT(name, "the entry in the loaded directory", get_entry(directory_entry(space.directory, TRY_LATE)), 0);
#endif
    *(volatile u32 *)TRY_LATE = 0x7777;
    EXPECT(name, "the word", direct(page)[0], 0x7777);
    EXPECT(name, "the entry behind it", get_entry(directory_entry(space.directory, TRY_LATE)) >> 12, table);
    set_pte_at(NULL, TRY_LATE, &entries[TRY_LATE >> 12 & (ENTRIES - 1)], 0);
#ifndef PAE
    set_pmd(directory_entry(space.directory, TRY_LATE), 0);
#endif
    set_pmd(directory_entry(kernel_directory, TRY_LATE), 0);
    flush_tlb_kernel();
    space_switch(&kernel_space);
    space_destroy(&space);
    release_pt(table);
    frame_put(table);
    frame_put(page);
    passed(name);
}
