/*
 * Entry by Multiboot: 32-bit protected mode, no paging, EBX the information structure.
 * Makes the boot page tables (8 MiB at 0 and at PAGE_OFFSET, 4 KiB pages), turns paging on and calls the kernel.
 */
#include "layout.h"

#define PHYSICAL(symbol) (symbol - PAGE_OFFSET)
#define ENTRY_FLAGS 0x63            /* present, writable, accessed, dirty */

    .section .head, "ax"
    .balign 4
multiboot_header:
    .long 0x1BADB002
    .long 0x00000002                /* memory information */
    .long -(0x1BADB002 + 0x00000002)

    .globl start
start:
    cli
    cld
    movl $PHYSICAL(boot_stack_top), %esp
    pushl $0
    popfl
    movl 4(%ebx), %eax
    movl 8(%ebx), %edx
    movl %eax, PHYSICAL(lower_kilobytes)
    movl %edx, PHYSICAL(upper_kilobytes)
    movl 16(%ebx), %eax
    testl $4, (%ebx)                /* is there a command line? */
    je 1f
    movl %eax, PHYSICAL(command_line)
1:

    movl $PHYSICAL(boot_tables), %edi
    movl $ENTRY_FLAGS, %eax
1:  stosl
    addl $PAGE_SIZE, %eax
    cmpl $BOOT_MAPPED, %eax
    jb 1b

    movl $PHYSICAL(kernel_directory), %edi
    movl $PHYSICAL(boot_tables) + ENTRY_FLAGS, %eax
    xorl %ecx, %ecx
2:  movl %eax, (%edi, %ecx, 4)
    movl %eax, (PAGE_OFFSET >> 20)(%edi, %ecx, 4)
    addl $PAGE_SIZE, %eax
    incl %ecx
    cmpl $BOOT_MAPPED >> 22, %ecx
    jb 2b

    movl $PHYSICAL(kernel_directory), %eax
    movl %eax, %cr3
    movl $0x80050033, %eax          /* paging, alignment mask, write protect, numeric errors, ET, MP, protection */
    movl %eax, %cr0
    jmp 3f
3:  movl $high, %eax
    jmp *%eax

    .text
high:
    movl $boot_stack_top, %esp
    lgdt early_gdt_pointer
    ljmp $KERNEL_CS, $4f
4:  movl $KERNEL_DS, %eax
    movl %eax, %ss
    movl $USER_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl $KERNEL_PERCPU, %eax
    movl %eax, %fs
    xorl %eax, %eax
    movl %eax, %gs
    lldt %ax
    call kernel_main
5:  jmp 5b

    .data
    .balign 4
    .word 0
early_gdt_pointer:
    .word GDT_ENTRIES * 8 - 1
    .long early_gdt

    .balign 4
    .globl lower_kilobytes, upper_kilobytes, command_line
command_line:                       /* physical, 0 for none */
    .long 0
lower_kilobytes:
    .long 0
upper_kilobytes:
    .long 0

    .section .bss.pages, "aw", @nobits
    .balign PAGE_SIZE
    .globl kernel_directory, boot_tables, boot_stack_top
kernel_directory:
    .skip PAGE_SIZE
boot_tables:
    .skip BOOT_MAPPED >> 10
    .balign KERNEL_STACK
    .skip KERNEL_STACK
boot_stack_top:
