/* The checks of ring 0 (or 1), in turn. */
#include "checks.h"
#include "pages.h"

void checks_of_kernel(void)
{
    static void (*const checks[])(void) = {
        check_descriptor_tables, check_descriptor_entries, check_gates, check_far_calls, check_control_registers,
        check_identity,
        check_model_registers, check_time_stamp, check_kernel_faults, check_interrupt_mask, check_tick,
        check_pending_tick, check_outside_interface, check_watchpoint, check_breakpoint, check_single_step,
        check_mapping, check_accessed_dirty, check_protection, check_lazy_updates, check_large_page,
        check_mapped_table, check_directory_protection, check_address_space, check_late_table,
#ifdef FORM_RFC_V1
        check_entry_calls, check_long_entries,
#endif
        check_ports, check_string_ports, check_local_apic, check_second_processor, check_one_shot, check_local_timer,
        check_cycle_counters, check_wall_clock, check_kernel_thread,
    };
    u32 before = frames_free();
    for (u32 at = 0; at < ARRAY_SIZE(checks); at++)
        checks[at]();
    EXPECT("memory", "frames after the kernel's checks", frames_free(), before);
}
