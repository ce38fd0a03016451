/* The VMI option ROM as a guest finds it. */
#ifndef ROM_H
#define ROM_H

#include "types.h"

struct rom_header {
    u16 signature;
    u8 units;
    u8 entry[4];
    u8 pad0;
    u32 vmi_signature;
    u8 minor, major;
    u8 jump_slots, reserved1;
    u32 virtual_top;
    u16 reserved2;
    u16 license;
    u16 pci, pnp;
    u32 pad3;
    u8 room[96];
    u8 init[8];
    u8 get_relocation[8];
} __attribute__((packed));

_Static_assert(sizeof(struct rom_header) == 0x90, "ROM header");

enum relocation { RELOCATION_NONE, RELOCATION_CALL, RELOCATION_JUMP, RELOCATION_NOP };

/* The ROM that was found and accepted, at its address in the direct map; NULL for none. */
extern const struct rom_header *rom;

/* Looks from 0xC0000 to 0xE0000 every 2 KiB for a ROM of this form's interface. */
void rom_probe(u8 major, bool check_license);

/* VMI_Init: 0, or what the ROM said. Interrupts must be off. */
u32 rom_init(void);

/* GetRelocationInfo of API 3.0: the answer's type, and the stub's linear address. */
enum relocation rom_relocation(u32 call, u32 *stub);

#endif
