/*
 * The kernel's part of the address space: all of low memory at PAGE_OFFSET (in 4 MiB pages where the processor has
 * them), a table for mappings that are tried out, the fixed mappings below the hypervisor's part.
 */
#include "pages.h"

#define CR4_PSE 0x10
#define CR4_PGE 0x80

u32 reserved_top;
struct address_space kernel_space = {kernel_directory};
struct address_space *current_space = &kernel_space;

static u32 global;
static u32 fixmap_table[1024] PAGE_ALIGNED;

/* Linux: the fixed mappings end a page below the hypervisor's. */
u32 fixmap_address(u32 slot)
{
    return -reserved_top - PAGE_SIZE - (slot + 1) * PAGE_SIZE;
}

u32 *kernel_entry(u32 address)
{
    u32 *table = frame_address(get_entry(&kernel_directory[address >> 22]) >> 12);
    return table + (address >> 12 & 1023);
}

static void add_table(u32 address)
{
    u32 frame = frame_get();
    alloc_pt(frame);
    set_pmd(&kernel_directory[address >> 22], frame << 12 | KERNEL_PAGE);
}

void set_fixmap(u32 slot, u32 frame, u32 flags)
{
    u32 address = fixmap_address(slot);
    set_pte_at(NULL, address, kernel_entry(address), flags ? frame << 12 | flags | global : 0);
    flush_tlb_single(address);
}

/*
 * The fixed mappings get their table as soon as it is known where they end: before VMI_Init, which finds a table of
 * the kernel's in the boot directory that it was never told of. Linux does so for early_ioremap.
 */
void fixmap_init(void)
{
    u32 top = fixmap_address(0);
    EXPECT("memory", "the directory entries of fixed mappings", fixmap_address(FIX_SLOTS - 1) >> 22, top >> 22);
    set_pmd(&kernel_directory[top >> 22], (kernel_frame(fixmap_table) << 12) | KERNEL_PAGE);
}

static void map_low_memory(void)
{
    for (u32 start = 0; start < LOW_MEMORY; start += 1 << 22) {
        u32 *entry = &kernel_directory[(PAGE_OFFSET + start) >> 22];
        if (cpu_features & FEATURE_PSE) {
            set_pmd(entry, start | KERNEL_PAGE | PTE_LARGE | global);
            continue;
        }
        u32 frame;
        bool present = get_entry(entry) & PTE_PRESENT;
        if (present) {
            frame = get_entry(entry) >> 12;
        } else {
            frame = frame_get();
            alloc_pt(frame);
        }
        u32 *table = frame_address(frame);
        for (u32 page = 0; page < 1024; page++)
            set_pte(&table[page], (start + (page << 12)) | KERNEL_PAGE | global);
        if (!present)
            set_pmd(entry, frame << 12 | KERNEL_PAGE);
    }
}

/* On the boot page tables, behind VMI_Init. */
void kernel_map_init(void)
{
    u32 cr4 = read_cr4();
    if (cpu_features & FEATURE_PSE)
        cr4 |= CR4_PSE;
    if (cpu_features & FEATURE_PGE) {
        cr4 |= CR4_PGE;
        global = PTE_GLOBAL;
    }
    write_cr4(cr4);

    alloc_pd(kernel_frame(kernel_directory));
    map_low_memory();
    add_table(TRY_TABLE);
#ifndef FORM_MAINLINE
    add_table(APIC_LINEAR);
#endif
    write_cr3((u32)kernel_directory - PAGE_OFFSET);
    flush_tlb_kernel();

    /* The identity mapping of the boot has served. */
    for (u32 at = 0; at < BOOT_MAPPED >> 22; at++)
        set_pmd(&kernel_directory[at], 0);
    flush_tlb_kernel();
}
