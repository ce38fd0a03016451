/* Finding the ROM, starting it, and what is said about it. */
#include "rom.h"
#include "kernel.h"
#include "ops.h"

#define ROM_AREA 0xC0000
#define ROM_AREA_END 0xE0000
#define ROM_STEP 2048
#define VMI_SIGNATURE 0x696D5663
#define PCI_VENDOR_VMWARE 0x15AD
#define PCI_DEVICE_VMI 0x0801

const struct rom_header *rom;

/* Why there is none, for the line about the back end. */
static const char *absent = "native";
static const char *manufacturer, *product, *remark = "";

static bool equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static bool acceptable(const struct rom_header *found, u8 major, bool check_license)
{
    const char *base = (const char *)found;

    if (found->signature != 0xAA55 || found->vmi_signature != VMI_SIGNATURE)
        return false;
    if (found->major != major) {
        absent = "native: the ROM is of another interface";
        return false;
    }
    if (!found->pci) {
        absent = "native: the ROM has no PCI header";
        return false;
    }
    const u16 *pci = (const u16 *)(base + found->pci);
    if (pci[2] != PCI_VENDOR_VMWARE || pci[3] != PCI_DEVICE_VMI)
        remark = " (of an unknown manufacturer)";
    if (check_license) {
        const char *license = found->license ? base + found->license : "unspecified";
        if (!equal(license, "GPL") && !equal(license, "GPL v2")) {
            absent = "native: the ROM's licence is not the GPL";
            return false;
        }
    }
    manufacturer = product = "unknown";
    if (found->pnp) {
        const u16 *pnp = (const u16 *)(base + found->pnp);
        if (pnp[7])
            manufacturer = base + pnp[7];
        if (pnp[8])
            product = base + pnp[8];
    }
    return true;
}

void rom_probe(u8 major, bool check_license)
{
    for (u32 place = ROM_AREA; place < ROM_AREA_END; place += ROM_STEP) {
        const struct rom_header *found = (const struct rom_header *)(PAGE_OFFSET + place);
        if (acceptable(found, major, check_license)) {
            rom = found;
            return;
        }
    }
}

u32 rom_init(void)
{
    u32 result;
    u16 cs;
    asm volatile("call *%1" : "=a"(result) : "r"(rom->init) : "edx", "ecx", "memory", "cc");
    if (result) {
        absent = "native: the ROM did not initialise";
        rom = NULL;
        return result;
    }
    asm volatile("movw %%cs, %0" : "=r"(cs));
    kernel_rpl = cs & RPL_MASK;
    return 0;
}

enum relocation rom_relocation(u32 call, u32 *stub)
{
    u32 eip = call, type;
    asm volatile("call *%2" : "+a"(eip), "=d"(type) : "r"(rom->get_relocation) : "ecx", "memory", "cc");
    *stub = eip;
    return type & 0xFF;
}

void vmi_describe(void)
{
    if (rom)
        printf("%s %s%s at %x", manufacturer, product, remark, (u32)rom - PAGE_OFFSET);
    else
        printf("%s", absent);
}
