/* The state that a second processor would start in. */
#include "kernel.h"
#include "ops.h"
#include "pages.h"

void fill_ap_state(struct ap_state *state, u32 eip, u32 esp)
{
    u8 *bytes = (u8 *)state;
    for (u32 at = 0; at < sizeof *state; at++)
        bytes[at] = 0;
    state->gdtr_limit = sizeof gdt - 1;
    state->gdtr_base = (u32)gdt;
    state->idtr_limit = sizeof idt - 1;
    state->idtr_base = (u32)idt;
    state->cs = KERNEL_CS;
    state->eip = eip;
    state->ss = KERNEL_DS;
    state->esp = esp;
    state->ds = state->es = USER_DS;
    state->fs = KERNEL_PERCPU;
    state->cr3 = (u32)kernel_directory - PAGE_OFFSET;
    state->cr0 = 0x80050023;
    state->cr4 = read_cr4();
}
