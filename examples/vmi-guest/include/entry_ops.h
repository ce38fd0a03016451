/*
 * Sensitive operations in assembly.
 *
 * GET_CR0 may lose EAX, ECX and EDX; the others but IRET and SYSEXIT keep what their name or argument says.
 */
#ifdef FORM_MAINLINE

#include "slots.h"

#define PV_CPU(word) pv_cpu_ops + ((word) - PV_CPU_FIRST) * 4
#define PV_IRQ(word) pv_irq_ops + ((word) - PV_IRQ_FIRST) * 4

.macro pv_note type, clobbers
    .pushsection .parainstructions, "a"
    .balign 4
    .long 771b
    .byte \type, 772b - 771b
    .short \clobbers
    .popsection
.endm

/* The call keeps what the caller cannot lose: `lost` are registers that it can. */
.macro pv_irq type, lost
771:
    .if (~(\lost)) & CLBR_EAX
    pushl %eax
    .endif
    .if (~(\lost)) & CLBR_ECX
    pushl %ecx
    .endif
    .if (~(\lost)) & CLBR_EDX
    pushl %edx
    .endif
    call *%cs:PV_IRQ(\type)
    .if (~(\lost)) & CLBR_EDX
    popl %edx
    .endif
    .if (~(\lost)) & CLBR_ECX
    popl %ecx
    .endif
    .if (~(\lost)) & CLBR_EAX
    popl %eax
    .endif
772:
    pv_note \type, \lost
.endm

.macro DISABLE_INTERRUPTS lost=CLBR_NONE
    pv_irq PV_IRQ_DISABLE, \lost
.endm

.macro ENABLE_INTERRUPTS lost=CLBR_NONE
    pv_irq PV_IRQ_ENABLE, \lost
.endm

.macro INTERRUPT_RETURN
771: jmp *%cs:PV_CPU(PV_CPU_IRET)
772:
    pv_note PV_CPU_IRET, CLBR_NONE
.endm

.macro ENABLE_INTERRUPTS_SYSEXIT
771: jmp *%cs:PV_CPU(PV_CPU_IRQ_ENABLE_SYSEXIT)
772:
    pv_note PV_CPU_IRQ_ENABLE_SYSEXIT, CLBR_NONE
.endm

/* Without an annotation, as in 2.6.32. */
.macro GET_CR0
    call *%cs:PV_CPU(PV_CPU_READ_CR0)
.endm

#else

#include "site.h"

#define CLBR_NONE 0
#define CLBR_EAX 1
#define CLBR_ANY 15

.macro DISABLE_INTERRUPTS lost=CLBR_NONE
    site VMI_DisableInterrupts, "cli"
.endm

.macro ENABLE_INTERRUPTS lost=CLBR_NONE
    site VMI_EnableInterrupts, "sti"
.endm

.macro INTERRUPT_RETURN
    site VMI_IRET, "iret"
.endm

.macro ENABLE_INTERRUPTS_SYSEXIT
    site VMI_SYSEXIT, "sti; sysexit"
.endm

.macro GET_CR0
    site VMI_GetCR0, "movl %cr0, %eax"
.endm

#endif
