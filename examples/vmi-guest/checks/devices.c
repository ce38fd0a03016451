/* The local APIC, a second processor's state, ports. */
#include "checks.h"

void check_local_apic(void)
{
    const char *name = "local APIC";
    if (cpu_features & FEATURE_APIC) {
        EXPECT(name, "the version's family", apic_read(APIC_VERSION) >> 4 & 0xF, 1);
        u32 id = apic_read(APIC_ID) >> 24;
        EXPECT(name, "the number", id, 0);
        apic_write(APIC_TPR, 0x20);
        EXPECT(name, "the priority", apic_read(APIC_TPR), 0x20);
        apic_write(APIC_TPR, 0);
        EXPECT(name, "the priority again", apic_read(APIC_TPR), 0);
        EXPECT(name, "the spurious vector", apic_read(APIC_SPIV), 0x100 | VECTOR_SPURIOUS);
    }
    passed(name);
}

/* Where a second processor would begin; there is none that would. */
static void NORETURN second_processor(void)
{
    for (;;)
        irq_disable();
}

void check_second_processor(void)
{
    static u8 stack[256];
    startup_ipi_hook(1, (u32)second_processor, (u32)(stack + sizeof stack));
    passed("state of a second processor");
}

#define PCI_ADDRESS 0xCF8
#define PCI_DATA 0xCFC
#define HOST_BRIDGE 0x80000000
#define COM1 0x3F8

void check_ports(void)
{
    const char *name = "ports";
    outb(0x70, 0x0F);
    u8 shutdown = inb(0x71);
    outb(0x70, 0x0F);
    EXPECT(name, "a byte twice", inb(0x71), shutdown);
    outl(PCI_ADDRESS, HOST_BRIDGE);
    EXPECT(name, "a double word", inl(PCI_ADDRESS), HOST_BRIDGE);
    EXPECT(name, "the host bridge", inl(PCI_DATA), 0x12378086);
    EXPECT(name, "its vendor", inw(PCI_DATA), 0x8086);
    EXPECT(name, "its device", inw(PCI_DATA + 2), 0x1237);
    outw(0x80, 0);
    io_delay();
    passed(name);
}

void check_string_ports(void)
{
    const char *name = "ports by strings";
    static const u32 addresses[] = {HOST_BRIDGE + 8, HOST_BRIDGE};
    static const u16 words[] = {1, 2, 3};
    u32 longs[3] = {0, 0, 0};
    u16 shorts[3] = {0, 0, 0};
    u8 bytes[3] = {0, 0, 0};

    outsl(PCI_ADDRESS, addresses, 2);
    EXPECT(name, "the last double word", inl(PCI_ADDRESS), HOST_BRIDGE);
    insl(PCI_DATA, longs, 2);
    EXPECT(name, "the first double word read", longs[0], 0x12378086);
    EXPECT(name, "the second double word read", longs[1], 0x12378086);
    EXPECT(name, "the one not read", longs[2], 0);
    insw(PCI_DATA, shorts, 2);
    EXPECT(name, "words read", (u32)shorts[0] << 16 | shorts[1], 0x80868086);
    EXPECT(name, "the word not read", shorts[2], 0);
    insb(PCI_DATA, bytes, 2);
    EXPECT(name, "bytes read", (u32)bytes[0] << 8 | bytes[1], 0x8686);
    EXPECT(name, "the byte not read", bytes[2], 0);
    insb(PCI_DATA, bytes, 0);
    EXPECT(name, "bytes behind a read of none", bytes[0], 0x86);
    outsw(0x80, words, 3);
    while (!(inb(COM1 + 5) & 0x40))
        cpu_pause();
    outsb(COM1, name, 16);
    printf(": ok\n");
}
