/*
 * The patcher of 2.6.32: each site is copied out, given to the back end's function, padded with nops, and put back.
 * On the bare machine the short operations come inline; others become direct calls where the site may lose what a
 * C function loses.
 */
#include "kernel.h"
#include "ops.h"

#define LONGEST 254

static const u8 nops[][8] = {
    {}, {0x90}, {0x89, 0xF6}, {0x8D, 0x76, 0}, {0x8D, 0x74, 0x26, 0}, {0x90, 0x8D, 0x74, 0x26, 0},
    {0x8D, 0xB6, 0, 0, 0, 0}, {0x8D, 0xB4, 0x26, 0, 0, 0, 0}, {0x90, 0x8D, 0xB4, 0x26, 0, 0, 0, 0},
};

static void add_nops(u8 *to, u32 length)
{
    while (length) {
        u32 unit = length < ARRAY_SIZE(nops) ? length : ARRAY_SIZE(nops) - 1;
        for (u32 at = 0; at < unit; at++)
            *to++ = nops[unit][at];
        length -= unit;
    }
}

void apply_paravirt(struct paravirt_site *first, struct paravirt_site *end)
{
    u8 buffer[LONGEST];
    for (struct paravirt_site *site = first; site < end; site++) {
        u32 length = site->length;
        EXPECT("patcher", "a site's length", length <= LONGEST, true);
        for (u32 at = 0; at < length; at++)
            buffer[at] = site->address[at];
        u8 *address = site->address;
        u32 used = pv_init_ops.patch(site->type, site->clobbers, buffer, (u32)address, length);
        EXPECT("patcher", "what a site holds", used <= length, true);
        add_nops(buffer + used, length - used);
        for (u32 at = 0; at < length; at++)
            address[at] = buffer[at];
    }
}

struct inline_code {
    u8 type, length, code[3];
};

/* The operations of which 2.6.32 has native code to put in. */
static const struct inline_code inline_codes[] = {
    {PV_TYPE(pv_irq_ops.irq_disable), 1, {0xFA}},
    {PV_TYPE(pv_irq_ops.irq_enable), 1, {0xFB}},
    {PV_TYPE(pv_irq_ops.restore_fl), 2, {0x50, 0x9D}},
    {PV_TYPE(pv_irq_ops.save_fl), 2, {0x9C, 0x58}},
    {PV_TYPE(pv_cpu_ops.iret), 1, {0xCF}},
    {PV_TYPE(pv_cpu_ops.irq_enable_sysexit), 3, {0xFB, 0x0F, 0x35}},
    {PV_TYPE(pv_mmu_ops.read_cr2), 3, {0x0F, 0x20, 0xD0}},
    {PV_TYPE(pv_mmu_ops.read_cr3), 3, {0x0F, 0x20, 0xD8}},
    {PV_TYPE(pv_mmu_ops.write_cr3), 3, {0x0F, 0x22, 0xD8}},
    {PV_TYPE(pv_cpu_ops.clts), 2, {0x0F, 0x06}},
    {PV_TYPE(pv_cpu_ops.read_tsc), 2, {0x0F, 0x31}},
};

/* What the slot of a type holds: the types count through the objects as if they lay one behind the other. */
static void *slot_of(u32 type)
{
    static const struct {
        void *object;
        u32 size;
    } objects[] = {
        {&pv_init_ops, sizeof pv_init_ops}, {&pv_time_ops, sizeof pv_time_ops}, {&pv_cpu_ops, sizeof pv_cpu_ops},
        {&pv_irq_ops, sizeof pv_irq_ops}, {&pv_apic_ops, sizeof pv_apic_ops}, {&pv_mmu_ops, sizeof pv_mmu_ops},
    };
    u32 at = type * sizeof(void *);
    for (u32 object = 0; object < ARRAY_SIZE(objects); object++) {
        if (at < objects[object].size)
            return ((void **)objects[object].object)[at / sizeof(void *)];
        at -= objects[object].size;
    }
    failed("patcher", "a type", type, 0);
}

static u32 branch(u8 opcode, u8 *buffer, u32 address, const void *target)
{
    buffer[0] = opcode;
    *(u32 *)(buffer + 1) = (u32)target - address - 5;
    return 5;
}

static u32 patch_default(u8 type, u16 clobbers, u8 *buffer, u32 address, u32 length)
{
    void *target = slot_of(type);
    extern u32 _paravirt_ident_32(u32);
#ifdef PAE
    extern u64 _paravirt_ident_64(u64);
    if (target == (void *)_paravirt_ident_64)
        return 0;
#endif

    if (!target) {
        buffer[0] = 0x0F;
        buffer[1] = 0x0B;
        return 2;
    }
    if (target == (void *)native_nop || target == (void *)_paravirt_ident_32)
        return 0;
    if (type == PV_TYPE(pv_cpu_ops.iret) || type == PV_TYPE(pv_cpu_ops.irq_enable_sysexit))
        return length < 5 ? length : branch(0xE9, buffer, address, target);
    if (CLBR_ANY & ~clobbers || length < 5)
        return length;
    return branch(0xE8, buffer, address, target);
}

u32 native_patch(u8 type, u16 clobbers, void *buffer, u32 address, u32 length)
{
    u8 *to = buffer;
    for (u32 at = 0; at < ARRAY_SIZE(inline_codes); at++) {
        const struct inline_code *found = &inline_codes[at];
        if (found->type != type)
            continue;
        if (found->length > length)
            return length;
        for (u32 byte = 0; byte < found->length; byte++)
            to[byte] = found->code[byte];
        return found->length;
    }
    return patch_default(type, clobbers, to, address, length);
}

void vmi_patch_all(void)
{
    u32 flags = irq_save();
    apply_paravirt(__parainstructions, __parainstructions_end);
    restore_fl(flags);
}
