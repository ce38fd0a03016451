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
static pte fixmap_table[ENTRIES] PAGE_ALIGNED;

/* Linux: the fixed mappings end a page below the hypervisor's. */
u32 fixmap_address(u32 slot)
{
    return -reserved_top - PAGE_SIZE - (slot + 1) * PAGE_SIZE;
}

pte *kernel_entry(u32 address)
{
    return table_entry(get_entry(directory_entry(kernel_directory, address)), address);
}

static void add_table(u32 address)
{
    u32 frame = frame_get();
    alloc_pt(frame);
    set_pmd(directory_entry(kernel_directory, address), frame << 12 | KERNEL_PAGE);
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
    u32 bottom = fixmap_address(FIX_SLOTS - 1);
    EXPECT("memory", "the directory's entry of fixed mappings", bottom >> DIRECTORY_SHIFT, top >> DIRECTORY_SHIFT);
    set_pmd(directory_entry(kernel_directory, top), (kernel_frame(fixmap_table) << 12) | KERNEL_PAGE);
}

static void map_low_memory(void)
{
    for (u32 start = 0; start < LOW_MEMORY; start += LARGE_PAGE) {
        pte *entry = directory_entry(kernel_directory, PAGE_OFFSET + start);
        if (cpu_features & FEATURE_PSE) {
            set_pmd(entry, start | KERNEL_PAGE | PTE_LARGE | global);
            continue;
        }
        u32 frame;
        bool present = get_entry(entry) & PTE_PRESENT;
        if (present) {
            frame = (u32)(get_entry(entry) >> 12);
        } else {
            frame = frame_get();
            alloc_pt(frame);
        }
        pte *table = frame_address(frame);
        for (u32 page = 0; page < ENTRIES; page++)
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

#ifdef PAE
    alloc_pd(kernel_frame(directory_entry(kernel_directory, PAGE_OFFSET)));
#else
    alloc_pd(kernel_frame(kernel_directory));
#endif
    map_low_memory();
    add_table(TRY_TABLE);
#ifndef FORM_MAINLINE
    add_table(APIC_LINEAR);
#endif
    write_cr3((u32)kernel_directory - PAGE_OFFSET);
    flush_tlb_kernel();

    /* The identity mapping of the boot has served. With PAE the pointers lead to a page of zeros, as in 2.6.32. */
#ifdef PAE
    static pte zeros[ENTRIES] PAGE_ALIGNED;
    for (u32 quarter = 0; quarter < PAGE_OFFSET >> 30; quarter++)
        set_pud(&kernel_directory[quarter], kernel_frame(zeros) << 12 | PTE_PRESENT);
#else
    for (u32 at = 0; at < BOOT_MAPPED; at += LARGE_PAGE)
        set_pmd(directory_entry(kernel_directory, at), 0);
#endif
    flush_tlb_kernel();
}
