/*
 * Numbers of the paravirt slots that assembly uses, in words from the beginning of the patch template; paravirt.h
 * checks them against the structures.
 */
#ifndef SLOTS_H
#define SLOTS_H

#define PV_CPU_FIRST 3
#define PV_IRQ_FIRST 43

#define PV_CPU_READ_CR0 6
#define PV_CPU_IRQ_ENABLE_SYSEXIT 36
#define PV_CPU_IRET 39
#define PV_IRQ_DISABLE 45
#define PV_IRQ_ENABLE 46

/* Registers that a site may lose. */
#define CLBR_NONE 0
#define CLBR_EAX 1
#define CLBR_ECX 2
#define CLBR_EDX 4
#define CLBR_EDI 8
#define CLBR_RET 5
#define CLBR_ANY 15
#define CLBR_CALLEE_SAVE CLBR_ECX

#endif
