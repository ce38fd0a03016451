/* Off: through the hypervisor if there is one below, else through the chip set's ACPI port. */
#include "kernel.h"
#include "ops.h"

#define PM1A_CONTROL 0x604              /* of the PIIX4, where SeaBIOS puts it */
#define SLEEP_S5 0x2000

void power_off(void)
{
#ifndef FORM_MAINLINE
    if (kernel_rpl)
        vmi_shutdown();
#endif
    outw(PM1A_CONTROL, SLEEP_S5);
#ifndef FORM_MAINLINE
    vmi_reboot(1);                      /* still here: it was no such chip set */
#endif
    for (;;)
        asm volatile("cli; hlt");
}
