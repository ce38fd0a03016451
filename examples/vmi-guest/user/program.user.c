/* The program of ring 3: its checks in turn. */
#include "user.h"

u32 user_main(void)
{
    check_calls();
    check_demand();
    check_children();
    check_copies();
    check_shared_page();
    check_bad_pointers();
    check_exceptions();
    check_port_rights();
    check_user_debug();
    check_segments();
    check_fpu();
    check_preemption();
    return 0;
}
