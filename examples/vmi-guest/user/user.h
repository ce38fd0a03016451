/* What the program of ring 3 is made of. */
#ifndef USER_H
#define USER_H

#include "layout.h"
#include "syscalls.h"
#include "types.h"

/* start.user.S: the two ways into the kernel. */
u32 call_int(u32 number, u32 first, u32 second, u32 third);
u32 call_sysenter(u32 number, u32 first, u32 second, u32 third);

/* library.user.c */
u32 call(u32 number, u32 first);
void say(const char *text);
void NORETURN end(u32 status);
void ok(const char *name);
void expect(const char *name, const char *what, u32 found, u32 expected);

/* The status of a child that runs `function`: what it returned, or 0x100 + the exception that ended it. */
u32 run_child(u32 (*function)(void));
u32 start_child(u32 (*function)(void));
u32 wait_child(void);

#define KILLED 0x100

/* memory.user.c */
void check_demand(void);
void check_copies(void);
void check_shared_page(void);
void check_bad_pointers(void);

/* debug.user.c */
void check_user_debug(void);

/* faults.user.c */
void check_exceptions(void);
void check_port_rights(void);

/* tasks.user.c */
void check_calls(void);
void check_children(void);
void check_preemption(void);
void check_fpu(void);
void check_segments(void);

#endif
