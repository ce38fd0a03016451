/* Addresses, selectors and vectors, for C and assembly. Selectors and vectors are those of 32-bit Linux 2.6.32. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define PAGE_OFFSET 0xC0000000
#define PAGE_SIZE 4096
#define BOOT_MAPPED 0x00800000      /* bytes of low memory in the boot page tables */
#define LOW_MEMORY 0x01000000       /* bytes of memory that this kernel uses: 16 MiB */

/* What an entry of a directory covers, and how many entries a table and a directory have. */
#ifdef PAE
#define DIRECTORY_SHIFT 21
#define ENTRIES 512
#else
#define DIRECTORY_SHIFT 22
#define ENTRIES 1024
#endif

/* Where kernel mappings are tried out: a page table, a large page, a table that comes late. */
#define TRY_TABLE 0xE0000000
#define TRY_LARGE 0xE0400000
#define TRY_LATE 0xE0800000

/* The program of ring 3. */
#define USER_BASE 0x08048000
#define USER_HEAP 0x20000000
#define USER_HEAP_END 0x20100000
#define USER_SHARED 0x40000000
#define USER_STACK_LOW 0xBFFC0000
#define USER_STACK_TOP 0xBFFFF000

/* Entries of the GDT. */
#define GDT_TLS 6
#define GDT_KERNEL_CS 12
#define GDT_KERNEL_DS 13
#define GDT_USER_CS 14
#define GDT_USER_DS 15
#define GDT_TSS 16
#define GDT_LDT 17
#define GDT_BIOS 18
#define GDT_PERCPU 27
#define GDT_DOUBLE_FAULT 31
#define GDT_ENTRIES 32

#define KERNEL_CS (GDT_KERNEL_CS * 8)
#define KERNEL_DS (GDT_KERNEL_DS * 8)
#define USER_CS (GDT_USER_CS * 8 + 3)
#define USER_DS (GDT_USER_DS * 8 + 3)
#define KERNEL_PERCPU (GDT_PERCPU * 8)

#define RPL_MASK 3
#define USER_RPL 3

#define VECTOR_TIMER 0x30           /* IRQ 0: the first 8259A stands at 0x30 */
#define VECTOR_LVTT 0x41
#define VECTOR_SYSCALL 0x80
#define VECTOR_SPURIOUS 0xFF

#define KERNEL_STACK 8192

#define EFLAGS_TF 0x100
#define EFLAGS_IF 0x200
#define EFLAGS_IOPL 0x3000

#endif
