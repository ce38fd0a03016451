/* Numbers of system calls, for the kernel and the program of ring 3. */
#ifndef SYSCALLS_H
#define SYSCALLS_H

#define SYS_END 1           /* status */
#define SYS_FORK 2
#define SYS_WRITE 3         /* text, length */
#define SYS_WAIT 4          /* where the status goes */
#define SYS_YIELD 5
#define SYS_NUMBER 6
#define SYS_IOPL 7          /* level */
#define SYS_TLS 8           /* base; a selector comes back */
#define SYS_LDT 9           /* the same */
#define SYS_TICKS 10
#define SYS_FRAMES 11
#define SYS_FEATURES 12

#define SYS_WATCH 13        /* address of a word whose writes trap; 0: none */
#define SYS_TRAPS 14        /* how many debug traps there were */
#define SYS_PORTS 15        /* port, 1 allowed, 0 not */
#define SYS_EXEC 16         /* of a kernel thread: becomes the program of ring 3 */

#define SYS_FAULT ((u32)-14)
#define SYS_INVALID ((u32)-22)

#endif
