/* Ways into the kernel and out of it: exceptions, interrupts, system calls, the switch of tasks. */
#include "layout.h"
#include "entry_ops.h"

/* Offsets in struct registers. */
#define R_EAX 24
#define R_DS 28
#define R_ES 32
#define R_FS 36
#define R_EIP 48
#define R_CS 52
#define R_ESP 60

    .text

.macro SAVE_ALL
    cld
    pushl %fs
    pushl %es
    pushl %ds
    pushl %eax
    pushl %ebp
    pushl %edi
    pushl %esi
    pushl %edx
    pushl %ecx
    pushl %ebx
    movl $USER_DS, %edx
    movl %edx, %ds
    movl %edx, %es
    movl $KERNEL_PERCPU, %edx
    movl %edx, %fs
.endm

.macro exception name, vector, has_error=0
    .globl \name
\name:
    .if \has_error == 0
    pushl $0
    .endif
    pushl $\vector
    jmp exception_common
.endm

    exception divide_error, 0
    exception debug, 1
    exception nmi, 2
    exception breakpoint, 3
    exception overflow, 4
    exception bounds, 5
    exception invalid_opcode, 6
    exception coprocessor_overrun, 9
    exception invalid_tss, 10, 1
    exception segment_not_present, 11, 1
    exception stack_segment, 12, 1
    exception general_protection, 13, 1
    exception page_fault_entry, 14, 1
    exception coprocessor_error, 16
    exception alignment_check, 17, 1
    exception unexpected, 255

exception_common:
    SAVE_ALL
    movl %esp, %eax
    call exception_from
return_from_exception:
    DISABLE_INTERRUPTS CLBR_ANY
    movl %esp, %eax
    call leave_kernel               /* ring 3 only: schedules if it is time to */
restore_all:
    popl %ebx
    popl %ecx
    popl %edx
    popl %esi
    popl %edi
    popl %ebp
    popl %eax
    popl %ds
    popl %es
    popl %fs
    addl $8, %esp
    .globl interrupt_return
interrupt_return:
    INTERRUPT_RETURN

/* #NM asks CR0 first: with EM set there would be nothing to restore. */
    .globl device_not_available
device_not_available:
    pushl $0
    pushl $7
    SAVE_ALL
    GET_CR0
    testl $4, %eax
    jne 1f
    call fpu_restore
    jmp return_from_exception
1:  movl %esp, %eax
    call exception_from
    jmp return_from_exception

/* By a task gate, on a stack of its own. */
    .globl double_fault
double_fault:
    call double_fault_from
1:  jmp 1b

    .globl timer_entry, lvtt_entry, spurious_entry
timer_entry:
    pushl $0
    pushl $VECTOR_TIMER
    jmp interrupt_common
lvtt_entry:
    pushl $0
    pushl $VECTOR_LVTT
interrupt_common:
    SAVE_ALL
    movl %esp, %eax
    call timer_interrupt
    jmp return_from_exception
spurious_entry:
    INTERRUPT_RETURN

/* int 0x80: a trap gate, so interrupts stay on. */
    .globl system_call_entry
system_call_entry:
    pushl %eax
    pushl $VECTOR_SYSCALL
    SAVE_ALL
    movl %esp, %eax
    call system_call
    movl %eax, R_EAX(%esp)
    .globl return_from_fork
return_from_fork:
    jmp return_from_exception

/*
 * SYSENTER: the MSR says where the TSS is, whose second word is the stack of the task. EBP is the user's stack, the
 * return address is fixed. Interrupts are off by the processor and go on when the frame is complete.
 */
    .globl sysenter_entry
sysenter_entry:
    movl 4(%esp), %esp
    pushl $USER_DS
    pushl %ebp
    pushfl
    orl $EFLAGS_IF, (%esp)
    pushl $USER_CS
    pushl $sysenter_return
    pushl %eax
    pushl $VECTOR_SYSCALL
    SAVE_ALL
    ENABLE_INTERRUPTS CLBR_NONE
    movl %esp, %eax
    call system_call
    movl %eax, R_EAX(%esp)
    DISABLE_INTERRUPTS CLBR_EAX
    cmpb $0, need_schedule
    jne return_from_exception
    cmpl $sysenter_return, R_EIP(%esp)
    jne return_from_exception
    movl R_EIP(%esp), %edx
    movl R_ESP(%esp), %ecx
    movl R_EAX(%esp), %eax
    movl 0(%esp), %ebx
    movw R_FS(%esp), %fs
    .globl system_exit
system_exit:
    ENABLE_INTERRUPTS_SYSEXIT

/* switch_stacks(from, to): the first word of a task is its kernel stack. Returns `from` as the one that ran before. */
    .globl switch_stacks
switch_stacks:
    pushl %ebp
    pushl %ebx
    pushl %esi
    pushl %edi
    movl %esp, (%eax)
    movl (%edx), %esp
    popl %edi
    popl %esi
    popl %ebx
    popl %ebp
    ret

/* A new task starts here, its register frame on the stack. */
    .globl task_first
task_first:
    call schedule_tail
    jmp return_from_fork
