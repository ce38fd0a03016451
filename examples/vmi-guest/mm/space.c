/* Address spaces of tasks: the kernel's part is cloned, the user's part is shared on fork and copied on write. */
#include "pages.h"

#define USER_TABLE (PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED | PTE_DIRTY)

/* The kernel's entries are there before the page becomes a directory, as 2.6.32 does it. */
void space_create(struct address_space *space)
{
    u32 frame = frame_get();
    space->directory = frame_address(frame);
    for (u32 at = KERNEL_ENTRIES_FIRST; at < 1024; at++)
        space->directory[at] = kernel_directory[at];
    alloc_pd_clone(frame, kernel_frame(kernel_directory), KERNEL_ENTRIES_FIRST, 1024 - KERNEL_ENTRIES_FIRST);
}

u32 *space_entry(struct address_space *space, u32 address, bool make)
{
    u32 *entry = &space->directory[address >> 22];
    if (!(get_entry(entry) & PTE_PRESENT)) {
        if (!make)
            return NULL;
        u32 frame = frame_get();
        alloc_pt(frame);
        set_pmd(entry, frame << 12 | USER_TABLE);
    }
    u32 *table = frame_address(get_entry(entry) >> 12);
    return table + (address >> 12 & 1023);
}

/* Calls `visit` for every page that is present in the user's part. */
static void each_page(struct address_space *space, struct address_space *other,
                      void (*visit)(struct address_space *, struct address_space *, u32, u32 *))
{
    for (u32 at = 0; at < KERNEL_ENTRIES_FIRST; at++) {
        if (!(get_entry(&space->directory[at]) & PTE_PRESENT))
            continue;
        u32 *table = frame_address(get_entry(&space->directory[at]) >> 12);
        for (u32 page = 0; page < 1024; page++)
            if (get_entry(&table[page]) & PTE_PRESENT)
                visit(space, other, at << 22 | page << 12, &table[page]);
    }
}

/* Both lose the right to write: the one that writes first gets a copy. */
static void copy_page(struct address_space *from, struct address_space *to, u32 address, u32 *entry)
{
    u32 value = get_entry(entry);
    if (value & PTE_WRITE && !(value & PTE_KEPT)) {
        pte_test_and_clear(from, address, entry, PTE_BIT_WRITE);
        value = (get_entry(entry) | PTE_COPY) & ~PTE_DIRTY;
        set_pte_at(from, address, entry, value);
    }
    set_pte_at(to, address, space_entry(to, address, true), value & ~PTE_ACCESSED);
    frame_share(value >> 12);
}

void space_copy(struct address_space *to, struct address_space *from)
{
    space_create(to);
    lazy_mmu_enter();
    each_page(from, to, copy_page);
    lazy_mmu_leave();
    flush_tlb_user();
}

static void drop_page(struct address_space *space, struct address_space *other, u32 address, u32 *entry)
{
    (void)other;
    frame_put(pte_swap(space, address, entry, 0) >> 12);
}

/* Everything of the user's: pages, then the tables, each unhooked before it is released. */
void space_empty(struct address_space *space)
{
    lazy_mmu_enter();
    each_page(space, NULL, drop_page);
    for (u32 at = 0; at < KERNEL_ENTRIES_FIRST; at++) {
        u32 value = get_entry(&space->directory[at]);
        if (!(value & PTE_PRESENT))
            continue;
        set_pmd(&space->directory[at], 0);
        release_pt(value >> 12);
        frame_put(value >> 12);
    }
    lazy_mmu_leave();
    flush_tlb_user();
}

/* No longer loaded anywhere. */
void space_destroy(struct address_space *space)
{
    u32 frame = kernel_frame(space->directory);
    release_pd(frame);
    frame_put(frame);
    space->directory = NULL;
}

void space_switch(struct address_space *space)
{
    if (space == current_space)
        return;
    current_space = space;
    write_cr3((u32)space->directory - PAGE_OFFSET);
}
