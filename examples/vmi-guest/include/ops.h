/* The sensitive operations of this form, and what all forms build of them. */
#ifndef OPS_H
#define OPS_H

#include "descriptors.h"
#include "types.h"

struct address_space {
    pte *directory;                     /* with PAE: the four pointers to directories */
};

extern struct address_space *current_space;

/* The privilege level at which this kernel runs: 0 on the bare machine, read back from CS after VMI_Init. */
extern u32 kernel_rpl;

#ifdef FORM_MAINLINE
#include "pvsites.h"
#include "timer_ops.h"
#else
#include "annotated.h"
#include "annotated_pages.h"
#endif

static inline u32 irq_save(void)
{
    u32 flags = save_fl();
    irq_disable();
    return flags;
}

static inline bool irqs_on(void)
{
    return (save_fl() & EFLAGS_IF) != 0;
}

static inline u32 kernel_frame(const void *address)
{
    return ((u32)address - PAGE_OFFSET) >> 12;
}

#ifdef FORM_MAINLINE
/* Direct changes that the hypervisor is told of afterwards. With PAE the low half, which has the bits, goes first. */
static inline pte pte_swap(struct address_space *space, u32 address, pte *entry, u32 value)
{
    u32 *half = (u32 *)entry;
    asm volatile("xchgl %0, %1" : "+r"(value), "+m"(half[0]));
    pte old = value;
#ifdef PAE
    old |= (u64)half[1] << 32;
    half[1] = 0;
#endif
    pte_update(space, address, entry);
    return old;
}

static inline bool pte_test_and_clear(struct address_space *space, u32 address, pte *entry, u32 bit)
{
    bool old;
    asm volatile("lock btrl %2, %1" : "=@ccc"(old), "+m"(*(u32 *)entry) : "r"(bit));
    pte_update(space, address, entry);
    return old;
}

static inline bool pte_test_and_set(struct address_space *space, u32 address, pte *entry, u32 bit)
{
    bool old;
    asm volatile("lock btsl %2, %1" : "=@ccc"(old), "+m"(*(u32 *)entry) : "r"(bit));
    pte_update_defer(space, address, entry);
    return old;
}
#endif

#endif
