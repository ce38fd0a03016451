/* Address spaces of tasks: the kernel's part is cloned, the user's part is shared on fork and copied on write. */
#include "pages.h"

#define USER_TABLE (PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED | PTE_DIRTY)

#ifdef PAE

#define KERNEL_QUARTER (PAGE_OFFSET >> 30)

/* The kernel's quarter is shared; the others get their directories at once, since the processor caches the pointers. */
void space_create(struct address_space *space)
{
    u32 frame = frame_get();
    pte *pointers = frame_address(frame);
    pointers[KERNEL_QUARTER] = kernel_directory[KERNEL_QUARTER];
    alloc_pd_clone(frame, kernel_frame(kernel_directory), KERNEL_QUARTER, 1);
    for (u32 quarter = 0; quarter < KERNEL_QUARTER; quarter++) {
        u32 directory = frame_get();
        alloc_pd(directory);
        set_pud(&pointers[quarter], directory << 12 | PTE_PRESENT);
    }
    space->directory = pointers;
}

/* No longer loaded anywhere. The pointers go directly, and of their page nothing is told: 2.6.32. */
void space_destroy(struct address_space *space)
{
    for (u32 quarter = 0; quarter < KERNEL_QUARTER; quarter++) {
        u32 frame = (u32)(space->directory[quarter] >> 12);
        space->directory[quarter] = 0;
        release_pd(frame);
        frame_put(frame);
    }
    frame_put(kernel_frame(space->directory));
    space->directory = NULL;
}

#else

#define KERNEL_ENTRIES_FIRST (PAGE_OFFSET >> DIRECTORY_SHIFT)

/* The kernel's entries are there before the page becomes a directory, as 2.6.32 does it. */
void space_create(struct address_space *space)
{
    u32 frame = frame_get();
    space->directory = frame_address(frame);
    for (u32 at = KERNEL_ENTRIES_FIRST; at < ENTRIES; at++)
        space->directory[at] = kernel_directory[at];
    alloc_pd_clone(frame, kernel_frame(kernel_directory), KERNEL_ENTRIES_FIRST, ENTRIES - KERNEL_ENTRIES_FIRST);
}

/* No longer loaded anywhere. Linux up to 2.6.24 says that it lets go of a directory, later ones do not. */
void space_destroy(struct address_space *space)
{
    static bool told;
    u32 frame = kernel_frame(space->directory);
    told = !told;
    if (told)
        release_pd(frame);
    frame_put(frame);
    space->directory = NULL;
}

#endif

pte *space_entry(struct address_space *space, u32 address, bool make)
{
    pte *entry = directory_entry(space->directory, address);
    if (!(get_entry(entry) & PTE_PRESENT)) {
        if (!make)
            return NULL;
        u32 frame = frame_get();
        alloc_pt(frame);
        set_pmd(entry, frame << 12 | USER_TABLE);
    }
    return table_entry(get_entry(entry), address);
}

/* Calls `visit` for every page that is present in the user's part. */
static void each_page(struct address_space *space, struct address_space *other,
                      void (*visit)(struct address_space *, struct address_space *, u32, pte *))
{
    for (u32 start = 0; start < PAGE_OFFSET; start += LARGE_PAGE) {
        pte table = get_entry(directory_entry(space->directory, start));
        if (!(table & PTE_PRESENT))
            continue;
        for (u32 address = start; address < start + LARGE_PAGE; address += PAGE_SIZE) {
            pte *entry = table_entry(table, address);
            if (get_entry(entry) & PTE_PRESENT)
                visit(space, other, address, entry);
        }
    }
}

/* Both lose the right to write: the one that writes first gets a copy. */
static void copy_page(struct address_space *from, struct address_space *to, u32 address, pte *entry)
{
    u32 value = (u32)get_entry(entry);
    if (value & PTE_WRITE && !(value & PTE_KEPT)) {
        pte_test_and_clear(from, address, entry, PTE_BIT_WRITE);
        value = ((u32)get_entry(entry) | PTE_COPY) & ~PTE_DIRTY;
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

static void drop_page(struct address_space *space, struct address_space *other, u32 address, pte *entry)
{
    (void)other;
    frame_put((u32)(pte_swap(space, address, entry, 0) >> 12));
}

/* Everything of the user's: pages, then the tables, each unhooked before it is released. */
void space_empty(struct address_space *space)
{
    lazy_mmu_enter();
    each_page(space, NULL, drop_page);
    for (u32 start = 0; start < PAGE_OFFSET; start += LARGE_PAGE) {
        pte *entry = directory_entry(space->directory, start);
        u32 frame = (u32)(get_entry(entry) >> 12);
        if (!(get_entry(entry) & PTE_PRESENT))
            continue;
        set_pmd(entry, 0);
        release_pt(frame);
        frame_put(frame);
    }
    lazy_mmu_leave();
    flush_tlb_user();
}

void space_switch(struct address_space *space)
{
    if (space == current_space)
        return;
    current_space = space;
    write_cr3((u32)space->directory - PAGE_OFFSET);
}
