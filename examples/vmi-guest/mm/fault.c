/* Page faults: pages on demand, copies on write, and what cannot be helped. */
#include "task.h"

#define ERROR_PRESENT 1
#define ERROR_WRITE 2
#define ERROR_USER 4

extern u8 user_start[], user_text_end[], user_end[], user_image[];

static u32 shared_frame;

static void map(u32 address, u32 frame, u32 flags)
{
    pte *entry = space_entry(current_space, address, true);
    set_pte_at(current_space, address, entry, frame << 12 | PTE_PRESENT | PTE_USER | flags);
    flush_tlb_single(address);
}

/* The first touch of a page: of the program (from its image), of heap or stack (zeros), of the shared page. */
static bool bring(u32 address)
{
    u32 page = address & ~(PAGE_SIZE - 1);
    if (page >= USER_BASE && page < (u32)user_end) {
        u32 frame = frame_get();
        u32 *to = frame_address(frame), *from = (u32 *)(user_image + (page - (u32)user_start));
        for (u32 at = 0; at < PAGE_SIZE / 4; at++)
            to[at] = from[at];
        map(page, frame, page < (u32)user_text_end ? 0 : PTE_WRITE);
        return true;
    }
    if ((page >= USER_HEAP && page < USER_HEAP_END) || (page >= USER_STACK_LOW && page < USER_STACK_TOP)) {
        map(page, frame_get(), PTE_WRITE);
        return true;
    }
    if (page == USER_SHARED) {
        if (!shared_frame)
            shared_frame = frame_get();
        frame_share(shared_frame);
        map(page, shared_frame, PTE_WRITE | PTE_KEPT);
        return true;
    }
    return false;
}

/* A write to a page that fork left for both: the last user takes it, others take a copy. */
static bool take_copy(u32 address)
{
    u32 page = address & ~(PAGE_SIZE - 1);
    pte *entry = space_entry(current_space, page, false);
    u32 value = entry ? (u32)get_entry(entry) : 0;
    if (!(value & PTE_PRESENT) || !(value & PTE_COPY))
        return false;
    u32 old = value >> 12;
    if (frame_users(old) == 1) {
        set_pte_at(current_space, page, entry, (value & ~PTE_COPY) | PTE_WRITE | PTE_DIRTY);
        flush_tlb_single(page);
        return true;
    }
    u32 frame = frame_get();
    u32 *to = frame_address(frame), *from = frame_address(old);
    for (u32 at = 0; at < PAGE_SIZE / 4; at++)
        to[at] = from[at];
    map(page, frame, PTE_WRITE);
    frame_put(old);
    return true;
}

bool user_fault(u32 address, u32 error)
{
    if (address >= PAGE_OFFSET || current_space == &kernel_space)
        return false;
    if (!(error & ERROR_PRESENT))
        return bring(address);
    return error & ERROR_WRITE && take_copy(address);
}

/* The kernel's part of the loaded directory lacks a table that the kernel has. */
static bool late_table(u32 address, u32 error)
{
    if (address < PAGE_OFFSET || error & (ERROR_PRESENT | ERROR_USER) || current_space == &kernel_space)
        return false;
    pte entry = get_entry(directory_entry(kernel_directory, address));
    pte *own = directory_entry(current_space->directory, address);
    if (!(entry & PTE_PRESENT) || get_entry(own) & PTE_PRESENT)
        return false;
    set_pmd(own, entry);
    return true;
}

/* Comes with interrupts off: CR2 first, then they may go on if they were on. */
void page_fault(struct registers *r)
{
    u32 address = read_cr2();
    if (late_table(address, r->error))
        return;
    if (r->eflags & EFLAGS_IF)
        irq_enable();
    if (user_fault(address, r->error))
        return;
    if (from_user(r))
        task_end(STATUS_KILLED | r->vector);
    last_fault.address = address;
    if (!fix_up(r)) {
        printf("kernel: page fault at %x, address %x, error %x\n", r->eip, address, r->error);
        failed("kernel", "an exception", 14, 0);
    }
}
