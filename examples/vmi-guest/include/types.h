/* Whole numbers, and the few things every file needs. */
#ifndef TYPES_H
#define TYPES_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;
typedef _Bool bool;

/* An entry of a page table or directory. */
#ifdef PAE
typedef u64 pte;
#else
typedef u32 pte;
#endif

#define true 1
#define false 0
#define NULL ((void *)0)

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define OFFSET_OF(type, member) __builtin_offsetof(type, member)
#define PAGE_ALIGNED __attribute__((aligned(4096)))
#define NORETURN __attribute__((noreturn))
#define MEMORY_BARRIER() asm volatile("" ::: "memory")

#endif
