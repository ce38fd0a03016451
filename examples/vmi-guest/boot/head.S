/*
 * Entry by Multiboot: 32-bit protected mode, no paging, EBX the information structure.
 * Makes the boot page tables (8 MiB at 0 and at PAGE_OFFSET, 4 KiB pages), turns paging on and calls the kernel.
 */
#include "layout.h"

#define PHYSICAL(symbol) (symbol - PAGE_OFFSET)
#ifdef PAE
#define BOOT_DIRECTORY boot_directory
#define ENTRY_SIZE 8
#else
#define BOOT_DIRECTORY kernel_directory
#define ENTRY_SIZE 4
#endif
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
2:  stosl
#ifdef PAE
    movl $0, (%edi)
    addl $4, %edi
#endif
    addl $PAGE_SIZE, %eax
    cmpl $BOOT_MAPPED, %eax
    jb 2b

/* One directory's entries, for both places; with PAE the pointers of two quarters lead to the same directory. */
    movl $PHYSICAL(BOOT_DIRECTORY), %edi
    movl $PHYSICAL(boot_tables) + ENTRY_FLAGS, %eax
    xorl %ecx, %ecx
3:  movl %eax, (%edi, %ecx, ENTRY_SIZE)
#ifndef PAE
    movl %eax, (PAGE_OFFSET >> 20)(%edi, %ecx, 4)
#endif
    addl $PAGE_SIZE, %eax
    incl %ecx
    cmpl $BOOT_MAPPED >> DIRECTORY_SHIFT, %ecx
    jb 3b
#ifdef PAE
    movl $PHYSICAL(boot_directory) + 1, %eax
    movl %eax, PHYSICAL(kernel_directory)
    movl %eax, PHYSICAL(kernel_directory) + 24
    movl $0x20, %eax
    movl %eax, %cr4
#endif

    movl $PHYSICAL(kernel_directory), %eax
    movl %eax, %cr3
    movl $0x80050033, %eax          /* paging, alignment mask, write protect, numeric errors, ET, MP, protection */
    movl %eax, %cr0
    jmp 4f
4:  movl $high, %eax
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
    .skip (BOOT_MAPPED >> 12) * ENTRY_SIZE
#ifdef PAE
boot_directory:
    .skip PAGE_SIZE
#endif
    .balign KERNEL_STACK
    .skip KERNEL_STACK
boot_stack_top:
