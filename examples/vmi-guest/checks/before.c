/* Before VMI_Init: a kernel that was patched on disk calls the ROM already, and must find it acting natively. */
#include "kernel.h"
#include "ops.h"

void checks_before_init(void)
{
    const char *name = "before VMI_Init: interrupt mask";
    EXPECT(name, "IF at the start", irqs_on(), false);
    u32 flags = irq_save();
    irq_enable();
    EXPECT(name, "IF when enabled", irqs_on(), true);
    irq_disable();
    EXPECT(name, "IF when disabled", irqs_on(), false);
    irq_enable();
    restore_fl(flags);
    EXPECT(name, "IF when restored", irqs_on(), false);
    passed(name);

    name = "before VMI_Init: page fault fixed up";
    u32 value;
    EXPECT(name, "a read of nothing", try_read((void *)0xE0000000, &value), 1);
    EXPECT(name, "the vector", last_fault.vector, 14);
    EXPECT(name, "the error code", last_fault.error, 0);
    EXPECT(name, "CR2", last_fault.address, 0xE0000000);
    passed(name);
}
