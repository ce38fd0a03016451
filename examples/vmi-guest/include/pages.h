/* Physical frames, kernel mappings and address spaces. A frame is a page's physical address / 4096. */
#ifndef PAGES_H
#define PAGES_H

#include "kernel.h"
#include "ops.h"

#define PTE_PRESENT 1
#define PTE_WRITE 2
#define PTE_USER 4
#define PTE_CACHE_OFF 0x10
#define PTE_ACCESSED 0x20
#define PTE_DIRTY 0x40
#define PTE_LARGE 0x80
#define PTE_GLOBAL 0x100
#define PTE_COPY 0x200                  /* ours: copy on write */
#define PTE_KEPT 0x400                  /* ours: a shared page, never copied */

#define PTE_BIT_ACCESSED 5
#define PTE_BIT_DIRTY 6
#define PTE_BIT_WRITE 1

#define KERNEL_PAGE (PTE_PRESENT | PTE_WRITE | PTE_ACCESSED | PTE_DIRTY)
#define LARGE_PAGE (1u << DIRECTORY_SHIFT)

extern pte kernel_directory[], boot_tables[];

/* frames.c */
void frames_init(void);
u32 frame_get(void);                    /* a zeroed frame with one user */
void frame_share(u32 frame);
void frame_put(u32 frame);
u32 frame_users(u32 frame);
u32 frames_free(void);

static inline void *frame_address(u32 frame)
{
    return (void *)(PAGE_OFFSET + (frame << 12));
}

/* The entry of a directory that covers an address, and of a table. With PAE a quarter has a directory of its own. */
static inline pte *directory_entry(pte *directory, u32 address)
{
#ifdef PAE
    directory = frame_address((u32)(directory[address >> 30] >> 12));
#endif
    return &directory[address >> DIRECTORY_SHIFT & (ENTRIES - 1)];
}

static inline pte *table_entry(pte entry, u32 address)
{
    pte *table = frame_address((u32)(entry >> 12));
    return &table[address >> 12 & (ENTRIES - 1)];
}

/* kernelmap.c */
enum { FIX_APIC, FIX_TABLE, FIX_TEST, FIX_SLOTS };
void fixmap_init(void);                 /* when `reserved_top` is known */
void kernel_map_init(void);
pte *kernel_entry(u32 address);         /* the page table entry of an address in the kernel's own tables */
void set_fixmap(u32 slot, u32 frame, u32 flags);
u32 fixmap_address(u32 slot);

/* space.c */
extern struct address_space kernel_space;
void space_create(struct address_space *space);
void space_copy(struct address_space *to, struct address_space *from);
void space_empty(struct address_space *space);
void space_destroy(struct address_space *space);
void space_switch(struct address_space *space);
pte *space_entry(struct address_space *space, u32 address, bool make);

/* fault.c */
bool user_fault(u32 address, u32 error);
void page_fault(struct registers *r);

#endif
