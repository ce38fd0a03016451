/* Page table operations of the annotated forms, with the flags that tell the hypervisor what is updated. */
#ifndef ANNOTATED_PAGES_H
#define ANNOTATED_PAGES_H

/* `space` is NULL for the kernel's own part, which is in every address space. */
static inline u32 entry_flags(struct address_space *space, u32 address, u32 level)
{
    if (space && space != current_space)
        return level;
    return level | VMI_PAGE_CURRENT_AS | (address & VMI_PAGE_VA_MASK);
}

static inline u32 entry_flags_defer(struct address_space *space, u32 address, u32 level)
{
    u32 flags = entry_flags(space, address, level);
    return flags & VMI_PAGE_CURRENT_AS ? flags | VMI_PAGE_DEFER : flags;
}

static inline void set_pte(pte *entry, u32 value)
{
    set_entry(entry, value, VMI_PAGE_PT);
}

static inline void set_pte_at(struct address_space *space, u32 address, pte *entry, u32 value)
{
    set_entry(entry, value, entry_flags(space, address, VMI_PAGE_PT));
}

static inline void set_pmd(pte *entry, u32 value)
{
    set_entry(entry, value, VMI_PAGE_PD);
}

static inline u32 pte_swap(struct address_space *space, u32 address, pte *entry, u32 value)
{
    return swap_entry(entry, value, entry_flags(space, address, VMI_PAGE_PT));
}

static inline bool pte_test_and_clear(struct address_space *space, u32 address, pte *entry, u32 bit)
{
    return test_and_clear_entry_bit(entry, bit, entry_flags(space, address, VMI_PAGE_PT));
}

static inline bool pte_test_and_set(struct address_space *space, u32 address, pte *entry, u32 bit)
{
    return test_and_set_entry_bit(entry, bit, entry_flags_defer(space, address, VMI_PAGE_PT));
}

/* The descriptor of an LDT goes into the GDT first; no entries: no LDT. */
static inline void set_ldt(const void *base, u32 entries)
{
    struct descriptor value = segment((u32)base, entries * 8 - 1, ACCESS_LDT, 0);
    write_gdt_entry(gdt, GDT_LDT, value.low, value.high);
    load_ldt_selector(entries ? GDT_LDT * 8 : 0);
}

static inline void load_tls(const struct descriptor *tls)
{
    if (gdt[GDT_TLS].low != tls->low || gdt[GDT_TLS].high != tls->high)
        write_gdt_entry(gdt, GDT_TLS, tls->low, tls->high);
}

static inline void startup_ipi_hook(u32 id, u32 eip, u32 esp)
{
    extern void fill_ap_state(struct ap_state *, u32, u32);
    static struct ap_state state PAGE_ALIGNED;
    fill_ap_state(&state, eip, esp);
    set_initial_ap_state(&state, id);
}

#endif
