/*
 * The VMI back end of the mainline form: what 32-bit Linux 2.6.32 does with a ROM, in its order.
 *
 * A call whose arguments are those of a slot goes into the slot as it is; others have a function of ours around them.
 */
#include "kernel.h"
#include "ops.h"
#include "pages.h"
#include "rom.h"

static struct {
    void (*cpuid)(void);
    void (*set_ldt)(u32 selector);
    void (*set_tr)(u32 selector);
    void (*write_idt_entry)(struct descriptor *table, u32 index, u32 low, u32 high);
    void (*write_gdt_entry)(struct descriptor *table, u32 index, u32 low, u32 high);
    void (*write_ldt_entry)(struct descriptor *table, u32 index, u32 low, u32 high);
    void (*set_kernel_stack)(u32 selector, u32 sp0);
    void (*allocate_page)(u32 frame, u32 flags, u32 source, u32 base, u32 count);
    void (*release_page)(u32 frame, u32 flags);
    void (*set_pte)(pte value, pte *entry, u32 flags);
    void (*update_pte)(pte *entry, u32 flags);
    void (*set_linear_mapping)(u32 slot, u32 address, u32 pages, u32 frame);
    void (*flush_tlb)(u32 what);
    void (*set_initial_ap_state)(const struct ap_state *state, u32 apic);
    void (*set_lazy_mode)(u32 mode);
} vmi;

/* Patching. */

static u32 branch_into(u8 opcode, u8 *buffer, u32 address, u32 target, u32 length)
{
    EXPECT("VMI", "room for a branch", length >= 5, true);
    buffer[0] = opcode;
    *(u32 *)(buffer + 1) = target - address - 5;
    return 5;
}

static u32 patch_call(u32 call, void *buffer, u32 address, u32 length)
{
    u32 stub;
    enum relocation type = rom_relocation(call, &stub);
    switch (type) {
    case RELOCATION_CALL:
        return branch_into(0xE8, buffer, address, stub, length);
    case RELOCATION_JUMP:
        return branch_into(0xE9, buffer, address, stub, length);
    case RELOCATION_NOP:
        return 0;
    case RELOCATION_NONE:
        return length;
    default:
        failed("VMI", "the relocation's type", type, RELOCATION_CALL);
    }
}

/* Six operations have sites of the ROM; the calls of all others stay indirect. */
static u32 vmi_patch(u8 type, u16 clobbers, void *buffer, u32 address, u32 length)
{
    (void)clobbers;
    switch (type) {
    case PV_TYPE(pv_irq_ops.irq_disable):
        return patch_call(VMI_DisableInterrupts, buffer, address, length);
    case PV_TYPE(pv_irq_ops.irq_enable):
        return patch_call(VMI_EnableInterrupts, buffer, address, length);
    case PV_TYPE(pv_irq_ops.restore_fl):
        return patch_call(VMI_SetInterruptMask, buffer, address, length);
    case PV_TYPE(pv_irq_ops.save_fl):
        return patch_call(VMI_GetInterruptMask, buffer, address, length);
    case PV_TYPE(pv_cpu_ops.iret):
        return patch_call(VMI_IRET, buffer, address, length);
    case PV_TYPE(pv_cpu_ops.irq_enable_sysexit):
        return patch_call(VMI_SYSEXIT, buffer, address, length);
    default:
        return length;
    }
}

/* Functions between a slot and a call. */

static void vmi_cpuid(u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
    u32 a = *eax, b, c = *ecx, d;
    asm volatile("call *%[rom]" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : [rom] "r"(vmi.cpuid) : "cc");
    *eax = a;
    *ebx = b;
    *ecx = c;
    *edx = d;
}

static void vmi_load_tls(const struct descriptor *tls, u32 cpu)
{
    (void)cpu;
    if (gdt[GDT_TLS].low != tls->low || gdt[GDT_TLS].high != tls->high)
        write_gdt_entry(gdt, GDT_TLS, tls->low, tls->high);
}

/* The descriptor is written even for "no LDT". */
static void vmi_set_ldt(const void *base, u32 entries)
{
    struct descriptor value = segment((u32)base, entries * 8 - 1, ACCESS_LDT, 0);
    write_gdt_entry(gdt, GDT_LDT, value.low, value.high);
    vmi.set_ldt(entries ? GDT_LDT * 8 : 0);
}

static void vmi_set_tr(void)
{
    vmi.set_tr(GDT_TSS * 8);
}

static void vmi_write_idt_entry(struct descriptor *table, u32 index, const struct descriptor *value)
{
    vmi.write_idt_entry(table, index, value->low, value->high);
}

static void vmi_write_gdt_entry(struct descriptor *table, u32 index, const struct descriptor *value, u32 type)
{
    (void)type;
    vmi.write_gdt_entry(table, index, value->low, value->high);
}

static void vmi_write_ldt_entry(struct descriptor *table, u32 index, const struct descriptor *value)
{
    vmi.write_ldt_entry(table, index, value->low, value->high);
}

static void vmi_load_sp0(struct tss *task, struct thread_stack *stack)
{
    task->esp0 = stack->sp0;
    vmi.set_kernel_stack(KERNEL_DS, task->esp0);
}

static void vmi_flush_tlb_user(void)
{
    vmi.flush_tlb(VMI_FLUSH_TLB);
}

static void vmi_flush_tlb_kernel(void)
{
    vmi.flush_tlb(VMI_FLUSH_TLB | VMI_FLUSH_GLOBAL);
}

static void vmi_nop(void)
{
}

static void vmi_start_context_switch(void *previous)
{
    (void)previous;
    vmi.set_lazy_mode(2);
}

static void vmi_end_context_switch(void *next)
{
    (void)next;
    vmi.set_lazy_mode(0);
}

static void vmi_enter_lazy_mmu(void)
{
    vmi.set_lazy_mode(1);
}

static void vmi_leave_lazy_mmu(void)
{
    vmi.set_lazy_mode(0);
}

static void vmi_allocate_pte(struct address_space *space, u32 frame)
{
    (void)space;
    vmi.allocate_page(frame, VMI_PAGE_PT, 0, 0, 0);
}

static void vmi_allocate_pmd(struct address_space *space, u32 frame)
{
    (void)space;
    vmi.allocate_page(frame, VMI_PAGE_PD, 0, 0, 0);
}

static void vmi_allocate_pmd_clone(u32 frame, u32 source, u32 start, u32 count)
{
    vmi.allocate_page(frame, VMI_PAGE_PD | VMI_PAGE_CLONE, source, start, count);
}

static void vmi_release_pte(u32 frame)
{
    vmi.release_page(frame, VMI_PAGE_PT);
}

static void vmi_release_pmd(u32 frame)
{
    vmi.release_page(frame, VMI_PAGE_PD);
}

/* Updates can wait for a flush only in the address space that is loaded; NULL is the kernel's part. */
static u32 flags_of(struct address_space *space, u32 address, u32 level)
{
    if (space && space != current_space)
        return level;
    return level | VMI_PAGE_CURRENT_AS | (address & VMI_PAGE_VA_MASK);
}

static u32 flags_of_deferred(struct address_space *space, u32 address, u32 level)
{
    u32 flags = flags_of(space, address, level);
    return flags & VMI_PAGE_CURRENT_AS ? flags | VMI_PAGE_DEFER : flags;
}

static void vmi_set_pte(pte *entry, pte value)
{
    vmi.set_pte(value, entry, VMI_PAGE_PT);
}

static void vmi_set_pte_at(struct address_space *space, u32 address, pte *entry, pte value)
{
    vmi.set_pte(value, entry, flags_of(space, address, VMI_PAGE_PT));
}

static void vmi_set_pmd(pte *entry, pte value)
{
    vmi.set_pte(value, entry, VMI_PAGE_PD);
}

static void vmi_update_pte(struct address_space *space, u32 address, pte *entry)
{
    vmi.update_pte(entry, flags_of(space, address, VMI_PAGE_PT));
}

static void vmi_update_pte_defer(struct address_space *space, u32 address, pte *entry)
{
    vmi.update_pte(entry, flags_of_deferred(space, address, VMI_PAGE_PT));
}

#ifdef PAE
static void vmi_set_pte_atomic(pte *entry, pte value)
{
    extern void native_store_at_once(pte *, pte);
    native_store_at_once(entry, value);
    vmi.update_pte(entry, VMI_PAGE_PT);
}

static void vmi_set_pud(pte *entry, pte value)
{
    vmi.set_pte(value, entry, VMI_PAGE_PDP);
}

static void vmi_pte_clear(struct address_space *space, u32 address, pte *entry)
{
    vmi.set_pte(0, entry, flags_of(space, address, VMI_PAGE_PT));
}

static void vmi_pmd_clear(pte *entry)
{
    vmi.set_pte(0, entry, VMI_PAGE_PD);
}
#endif

/* The state is on the stack, and the pointer to it is linear. */
static void vmi_startup_ipi_hook(u32 id, u32 eip, u32 esp)
{
    extern void fill_ap_state(struct ap_state *, u32, u32);
    struct ap_state state;
    fill_ap_state(&state, eip, esp);
    vmi.set_initial_ap_state(&state, id);
}

static u64 vmi_get_wallclock(void)
{
    return vmi_timer_ops.get_wallclock();
}

static u64 vmi_sched_clock(void)
{
    return vmi_timer_ops.get_cycle_counter(VMI_CYCLES_AVAILABLE);
}

/* Filling the slots. */

/* A function of the ROM, NULL where it has none to call. */
static void *function_of(u32 call)
{
    u32 stub;
    enum relocation type = rom_relocation(call, &stub);
    EXPECT("VMI", "a jump where a call must be", type == RELOCATION_JUMP, false);
    return type == RELOCATION_CALL ? (void *)stub : NULL;
}

static void fill(void *slot, u32 call)
{
    u32 stub;
    switch (rom_relocation(call, &stub)) {
    case RELOCATION_CALL:
        *(u32 *)slot = stub;
        break;
    case RELOCATION_NOP:
        *(void **)slot = (void *)vmi_nop;
        break;
    default:
        break;                          /* NONE: as on the bare machine; a jump is of no use here */
    }
}

static void wrap(void *slot, void *wrapper, void *cached, u32 call)
{
    void *found = function_of(call);
    if (found) {
        *(void **)slot = wrapper;
        *(void **)cached = found;
    }
}

static void fill_cpu_ops(void)
{
    wrap(&pv_cpu_ops.cpuid, vmi_cpuid, &vmi.cpuid, VMI_CPUID);
    fill(&pv_cpu_ops.clts, VMI_CLTS);
    fill(&pv_cpu_ops.get_debugreg, VMI_GetDR);
    fill(&pv_cpu_ops.set_debugreg, VMI_SetDR);
    fill(&pv_cpu_ops.read_cr0, VMI_GetCR0);
    fill(&pv_mmu_ops.read_cr2, VMI_GetCR2);
    fill(&pv_mmu_ops.read_cr3, VMI_GetCR3);
    fill(&pv_cpu_ops.read_cr4, VMI_GetCR4);
    fill(&pv_cpu_ops.write_cr0, VMI_SetCR0);
    fill(&pv_mmu_ops.write_cr2, VMI_SetCR2);
    fill(&pv_mmu_ops.write_cr3, VMI_SetCR3);
    fill(&pv_cpu_ops.write_cr4, VMI_SetCR4);
    fill(&pv_irq_ops.save_fl, VMI_GetInterruptMask);
    fill(&pv_irq_ops.restore_fl, VMI_SetInterruptMask);
    fill(&pv_irq_ops.irq_disable, VMI_DisableInterrupts);
    fill(&pv_irq_ops.irq_enable, VMI_EnableInterrupts);
    fill(&pv_cpu_ops.wbinvd, VMI_WBINVD);
    fill(&pv_cpu_ops.read_tsc, VMI_RDTSC);
    wrap(&pv_cpu_ops.load_tr_desc, vmi_set_tr, &vmi.set_tr, VMI_SetTR);
    wrap(&pv_cpu_ops.set_ldt, vmi_set_ldt, &vmi.set_ldt, VMI_SetLDT);
    fill(&pv_cpu_ops.load_gdt, VMI_SetGDT);
    fill(&pv_cpu_ops.load_idt, VMI_SetIDT);
    fill(&pv_cpu_ops.store_gdt, VMI_GetGDT);
    fill(&pv_cpu_ops.store_idt, VMI_GetIDT);
    fill(&pv_cpu_ops.store_tr, VMI_GetTR);
    pv_cpu_ops.load_tls = vmi_load_tls;
    wrap(&pv_cpu_ops.write_ldt_entry, vmi_write_ldt_entry, &vmi.write_ldt_entry, VMI_WriteLDTEntry);
    wrap(&pv_cpu_ops.write_gdt_entry, vmi_write_gdt_entry, &vmi.write_gdt_entry, VMI_WriteGDTEntry);
    wrap(&pv_cpu_ops.write_idt_entry, vmi_write_idt_entry, &vmi.write_idt_entry, VMI_WriteIDTEntry);
    wrap(&pv_cpu_ops.load_sp0, vmi_load_sp0, &vmi.set_kernel_stack, VMI_UpdateKernelStack);
    fill(&pv_cpu_ops.set_iopl_mask, VMI_SetIOPLMask);
    fill(&pv_cpu_ops.io_delay, VMI_IODelay);
    wrap(&pv_cpu_ops.start_context_switch, vmi_start_context_switch, &vmi.set_lazy_mode, VMI_SetLazyMode);
    wrap(&pv_cpu_ops.end_context_switch, vmi_end_context_switch, &vmi.set_lazy_mode, VMI_SetLazyMode);
}

static void fill_mmu_ops(void)
{
    wrap(&pv_mmu_ops.lazy_mode.enter, vmi_enter_lazy_mmu, &vmi.set_lazy_mode, VMI_SetLazyMode);
    wrap(&pv_mmu_ops.lazy_mode.leave, vmi_leave_lazy_mmu, &vmi.set_lazy_mode, VMI_SetLazyMode);
    wrap(&pv_mmu_ops.flush_tlb_user, vmi_flush_tlb_user, &vmi.flush_tlb, VMI_FlushTLB);
    wrap(&pv_mmu_ops.flush_tlb_kernel, vmi_flush_tlb_kernel, &vmi.flush_tlb, VMI_FlushTLB);
    fill(&pv_mmu_ops.flush_tlb_single, VMI_InvalPage);

#ifdef PAE
    vmi.set_pte = function_of(VMI_SetPxELong);
    vmi.update_pte = function_of(VMI_UpdatePxELong);
#else
    vmi.set_pte = function_of(VMI_SetPxE);
    vmi.update_pte = function_of(VMI_UpdatePxE);
#endif
    if (vmi.set_pte) {
        pv_mmu_ops.set_pte = vmi_set_pte;
        pv_mmu_ops.set_pte_at = vmi_set_pte_at;
        pv_mmu_ops.set_pmd = vmi_set_pmd;
#ifdef PAE
        pv_mmu_ops.set_pte_atomic = vmi_set_pte_atomic;
        pv_mmu_ops.set_pud = vmi_set_pud;
        pv_mmu_ops.pte_clear = vmi_pte_clear;
        pv_mmu_ops.pmd_clear = vmi_pmd_clear;
#endif
    }
    if (vmi.update_pte) {
        pv_mmu_ops.pte_update = vmi_update_pte;
        pv_mmu_ops.pte_update_defer = vmi_update_pte_defer;
    }
    vmi.allocate_page = function_of(VMI_AllocatePage);
    if (vmi.allocate_page) {
        pv_mmu_ops.alloc_pte = vmi_allocate_pte;
        pv_mmu_ops.alloc_pmd = vmi_allocate_pmd;
        pv_mmu_ops.alloc_pmd_clone = vmi_allocate_pmd_clone;
    }
    vmi.release_page = function_of(VMI_ReleasePage);
    if (vmi.release_page) {
        pv_mmu_ops.release_pte = vmi_release_pte;
        pv_mmu_ops.release_pmd = vmi_release_pmd;
    }
    vmi.set_linear_mapping = function_of(VMI_SetLinearMapping);
}

static void fill_time_ops(void)
{
    u32 stub;
    if (rom_relocation(VMI_GetCycleFrequency, &stub) == RELOCATION_NONE || options.no_timer)
        return;
    /* Whatever its type: the address is used. */
    vmi_timer_ops.get_cycle_frequency = (void *)stub;
    vmi_timer_ops.get_cycle_counter = function_of(VMI_GetCycleCounter);
    vmi_timer_ops.get_wallclock = function_of(VMI_GetWallclockTime);
    vmi_timer_ops.wallclock_updated = function_of(VMI_WallclockUpdated);
    vmi_timer_ops.set_alarm = function_of(VMI_SetAlarm);
    vmi_timer_ops.cancel_alarm = function_of(VMI_CancelAlarm);
    platform.wallclock = vmi_get_wallclock;
    pv_time_ops.sched_clock = vmi_sched_clock;
}

static void activate(void)
{
    if (rom_init())
        return;
    pv_info.enabled = true;
    pv_info.kernel_rpl = kernel_rpl;
    pv_info.name = "vmi";
    pv_init_ops.patch = vmi_patch;

    fill_cpu_ops();
    fill_mmu_ops();

    /* These two must be patched: an indirect jump could not tell whether the ROM wants a jump or a call. */
    pv_cpu_ops.irq_enable_sysexit = (void *)0xFEEDBAB0;
    pv_cpu_ops.iret = (void *)0x0BADBAB0;

    wrap(&pv_apic_ops.startup_ipi_hook, vmi_startup_ipi_hook, &vmi.set_initial_ap_state, VMI_SetInitialAPState);
    fill(&apic.read, VMI_APICRead);
    fill(&apic.write, VMI_APICWrite);
    fill_time_ops();
    fill(&pv_irq_ops.safe_halt, VMI_Halt);

    /* The first pass, before an interrupt can come: IRET must be the ROM's by then. The second is with all others. */
    apply_paravirt(__parainstructions, __parainstructions_end);

    if (vmi.set_linear_mapping)
        vmi.set_linear_mapping(0, PAGE_OFFSET, LOW_MEMORY >> 12, 0);
}

void set_linear_mapping(u32 slot, u32 address, u32 pages, u32 frame)
{
    if (vmi.set_linear_mapping)
        vmi.set_linear_mapping(slot, address, pages, frame);
}

void vmi_setup(void)
{
    rom_probe(3, true);
    if (rom)
        reserved_top = -rom->virtual_top;
    fixmap_init();
    if (!rom)
        return;
    u32 flags = irq_save();
    activate();
    restore_fl(flags & EFLAGS_IF);
}
