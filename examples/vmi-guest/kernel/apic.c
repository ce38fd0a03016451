/* The local APIC: mapped, and let the 8259A through. */
#include "pages.h"

#define APIC_PHYSICAL 0xFEE00000

void apic_init(void)
{
    if (!(cpu_features & FEATURE_APIC))
        return;
#ifdef FORM_MAINLINE
    set_fixmap(FIX_APIC, APIC_PHYSICAL >> 12, KERNEL_PAGE | PTE_CACHE_OFF);
#else
    set_pte_at(NULL, APIC_LINEAR, kernel_entry(APIC_LINEAR), APIC_PHYSICAL | KERNEL_PAGE | PTE_CACHE_OFF);
    flush_tlb_single(APIC_LINEAR);
#endif
    apic_write(APIC_TPR, 0);
    /* Enabled first: while it is not, its entries stay masked. */
    apic_write(APIC_SPIV, 0x100 | VECTOR_SPURIOUS);
    apic_write(APIC_LVTT, 0x10000);
    apic_write(APIC_LVT0, 0x700);       /* external interrupts: the 8259A's */
    apic_write(APIC_LVT1, 0x400);       /* NMI */
}
