/* One function a check; each prints a line "name: ok", or ends the run. */
#ifndef CHECKS_H
#define CHECKS_H

#include "kernel.h"
#include "ops.h"

/* interrupts.c */
void check_interrupt_mask(void);
void check_tick(void);
void check_pending_tick(void);

/* descriptors.c */
void check_descriptor_tables(void);
void check_descriptor_entries(void);
void check_gates(void);
void check_far_calls(void);

/* processor.c */
void check_control_registers(void);
void check_identity(void);
void check_model_registers(void);
void check_time_stamp(void);
void check_outside_interface(void);

/* debug.c */
void check_watchpoint(void);
void check_breakpoint(void);
void check_single_step(void);

/* faults.c */
void check_kernel_faults(void);

/* paging.c */
void check_mapping(void);
void check_accessed_dirty(void);
void check_protection(void);
void check_directory_protection(void);
void check_late_table(void);
void check_lazy_updates(void);
void check_large_page(void);
void check_mapped_table(void);
void check_address_space(void);

/* clocks.c */
void check_one_shot(void);
void check_local_timer(void);
void check_cycle_counters(void);
void check_wall_clock(void);

/* devices.c */
void check_local_apic(void);
void check_second_processor(void);
void check_ports(void);
void check_string_ports(void);

/* thread.c */
void check_kernel_thread(void);

/* rfc.c: calls that only 13.0 has. */
void check_entry_calls(void);
void check_long_entries(void);

#endif
