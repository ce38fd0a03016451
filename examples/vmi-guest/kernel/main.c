/* The order of things, which is that of 32-bit Linux 2.6.32 as far as the hypervisor can tell. */
#include "task.h"

extern u32 upper_kilobytes;
extern u8 user_image[];

#ifdef FORM_MAINLINE
/* The tables and slots of this form are those of that release: whoever patches it goes by this line. */
const char linux_banner[] = "Linux version 2.6.32 (vmi-guest: not Linux, but the paravirt layout of 2.6.32 UP)";
#endif

void kernel_main(void)
{
    outb(0x21, 0xFF);
    outb(0xA1, 0xFF);
    console_init();
    printf("vmi-guest: start\n");
    if (upper_kilobytes < (LOW_MEMORY >> 10) - 1024)
        failed("memory", "KiB above 1 MiB", upper_kilobytes, (LOW_MEMORY >> 10) - 1024);
    options_read();
    traps_early();
    checks_before_init();

    vmi_setup();
    cpu_identify();
    printf("vmi-guest: backend ");
    vmi_describe();
    printf(", ring %u, features %x\n", kernel_rpl, cpu_features);

    frames_init();
    kernel_map_init();
    tasks_init();
    cpu_init();
    traps_init();
    time_init();
    apic_init();
    irq_enable();
    vmi_patch_all();

    checks_of_kernel();
    user_program();

    printf("vmi-guest: done\n");
    power_off();
}
