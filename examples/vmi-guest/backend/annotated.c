/*
 * The annotated forms find their ROM, start it and patch themselves.
 *
 * Version 1 calls slots of 32 bytes: call n is at ROM + 32 n. Version 2 asks the ROM for each call. A kernel that was
 * patched on disk goes through the same motions: the same bytes are written again.
 */
#include "calls.h"
#include "kernel.h"
#include "ops.h"
#include "pages.h"
#include "rom.h"

struct annotation {
    u32 call;
    u8 *site;
    const u8 *translation;
    u8 length, translation_length;
    signed char growth;
    u8 call_offset;
};

_Static_assert(sizeof(struct annotation) == 16, "annotation");

extern const struct annotation __vmi_annotation[], __vmi_annotation_end[];

#define LONGEST_FILL 12

/* Operand-size prefixes before one nop, at most twelve bytes at a time. */
static void fill(u8 *to, u32 length)
{
    while (length) {
        u32 unit = length < LONGEST_FILL ? length : LONGEST_FILL;
        for (u32 at = 0; at + 1 < unit; at++)
            *to++ = 0x66;
        *to++ = 0x90;
        length -= unit;
    }
}

static void put_branch(u8 *at, u8 opcode, u32 target)
{
    *at = opcode;
    *(u32 *)(at + 1) = target - (u32)at - 5;
}

static void copy_translation(const struct annotation *entry)
{
    for (u32 at = 0; at < entry->translation_length; at++)
        entry->site[at] = entry->translation[at];
    fill(entry->site + entry->translation_length, entry->length - entry->translation_length);
}

#ifdef FORM_RFC_V1

#define SLOT 32

/* What a translation may consist of; its calls are all made to reach the slot. */
static void patch(const struct annotation *entry)
{
    u32 at = 0, slot = (u32)rom + entry->call * SLOT;

    copy_translation(entry);
    while (at < entry->translation_length) {
        u8 *code = entry->site + at;
        switch (*code) {
        case 0xE8:
            put_branch(code, 0xE8, slot);
            at += 5;
            break;
        case 0x68:
            at += 5;
            break;
        case 0x6A:
            at += 2;
            break;
        case 0x50: case 0x51: case 0x52: case 0x53: case 0x55: case 0x56: case 0x57:
            at += 1;
            break;
        case 0x8D:
            EXPECT("annotation", "a pop of arguments", code[1] << 8 | code[2], 0x6424);
            at += 4;
            break;
        default:
            failed("annotation", "a translation's byte", *code, 0xE8);
        }
    }
}

#else

static void patch(const struct annotation *entry)
{
    u32 stub;
    enum relocation type = rom_relocation(entry->call, &stub);

    switch (type) {
    case RELOCATION_NONE:
        break;
    case RELOCATION_NOP:
        fill(entry->site, entry->length);
        break;
    case RELOCATION_CALL:
    case RELOCATION_JUMP:
        copy_translation(entry);
        put_branch(entry->site + entry->call_offset, type == RELOCATION_CALL ? 0xE8 : 0xE9, stub);
        break;
    default:
        failed("annotation", "the relocation's type", type, RELOCATION_CALL);
    }
}

#endif

void vmi_patch_all(void)
{
    if (!rom)
        return;
    for (const struct annotation *entry = __vmi_annotation; entry < __vmi_annotation_end; entry++) {
        EXPECT("annotation", "a call of the interface", entry->call < VMI_CALLS, true);
        patch(entry);
    }
}

void vmi_setup(void)
{
#ifdef FORM_RFC_V1
    rom_probe(13, false);
    if (rom)
        reserved_top = 0x04000000;      /* the document gives the hypervisor the last 64 MiB */
#else
    rom_probe(3, false);
    if (rom)
        reserved_top = -rom->virtual_top;
#endif
    fixmap_init();
    if (!rom)
        return;
    u32 flags = irq_save();
    if (!rom_init()) {
        vmi_patch_all();
        set_linear_mapping(0, PAGE_OFFSET, LOW_MEMORY >> 12, 0);
    }
    restore_fl(flags);
}
