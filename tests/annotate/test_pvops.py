"""Which paravirt slot is which operation.

The type numbers here were counted by hand from the headers of the kernels
named, not from specs/pvops/: include/asm-i386/paravirt.h (2.6.21, 2.6.22),
include/asm-x86/paravirt.h (2.6.24), paravirt_types.h (2.6.32, 3.18, 5.10, 6.1).
The functions in the slots are those of the initialisers in paravirt.c.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.annotate.paravirt_words import Words, words
from tests.elfwriter import ElfWriter
from vmipatch import facts
from vmipatch.annotate import pvops
from vmipatch.image import Image, open_image

TEXT = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
NOP = "_paravirt_nop"
MIDDLE = "not where a function begins"
Objects = dict[str, list[str | None]]
# What the initialisers of arch/x86/kernel/paravirt.c (and those before it) hold, where it is no native_ of the name.
FUNCTIONS = {
    "startup_ipi_hook": NOP, "set_lazy_mode": NOP, "lazy_mode.leave": NOP, "kmap_atomic_pte": "kmap_atomic",
    "spin_unlock": "__ticket_spin_unlock", "irq_enable_syscall_ret": "native_irq_enable_sysexit",
}  # fmt: skip


def kernel(path: Path, release: str | None, objects: Objects, bits: int = 32, symbols: bool = True) -> Image:
    """A kernel whose paravirt objects lie apart and hold the functions named (None: an empty slot)."""
    text, word = TEXT[bits], bits // 8
    functions = sorted({f for slots in objects.values() for f in slots if f is not None} - {MIDDLE})
    code = {name: text + 16 * i for i, name in enumerate(functions)}
    if NOP in code:
        code[MIDDLE] = code[NOP] + 3
    elf = ElfWriter(bits=bits)
    elf.section(".text", b"\xc3" * 16 * (len(functions) + 1), address=text, flags="ax")
    banner = f"Linux version {release} (builder@example)\n\0".encode() if release else b"\0"
    elf.section(".rodata", banner, address=text + 0x100000, flags="a")
    data, places = b"", {}
    for name, slots in objects.items():
        places[name] = text + 0x200000 + len(data)
        data += b"".join((0 if f is None else code[f]).to_bytes(word, "little") for f in slots)
        data += b"\xa5" * 0x40  # what follows an object is no function
    elf.section(".data", data, address=text + 0x200000, flags="aw")
    if symbols:
        for name in functions:
            elf.symbol(name, code[name], ".text", size=16)
        for name, address in places.items():
            elf.symbol(name, address, ".data", type="object")
    file = path / "vmlinux"
    file.write_bytes(elf.build())
    return open_image(file)


def slots(size: int, held: dict[int, str], fill: str | None = NOP) -> list[str | None]:
    """An object of ``size`` slots that hold ``held``, by place, and ``fill`` elsewhere."""
    return [held.get(place, fill) for place in range(size)]


# 2.6.24: 5 slots of pv_init_ops, 5 of pv_time_ops, 32 of pv_cpu_ops, 7 of pv_irq_ops, 6 of pv_apic_ops.
OF_2_6_24: Objects = {
    "pv_init_ops": slots(5, {0: "native_patch"}),
    "pv_time_ops": slots(5, {3: "native_sched_clock"}),
    "pv_cpu_ops": slots(
        32,
        {2: "native_clts", 3: "native_read_cr0", 4: "native_write_cr0", 7: "native_write_cr4",
         19: "native_load_esp0", 21: "native_wbinvd", 22: "native_io_delay", 23: "native_cpuid",
         26: "native_read_tsc", 28: "native_irq_enable_sysexit", 29: "native_iret"},
    ),
    "pv_irq_ops": slots(7, {1: "native_save_fl", 2: "native_restore_fl", 3: "native_irq_disable",
                            4: "native_irq_enable", 5: "native_safe_halt"}),
    "pv_apic_ops": slots(6, {0: "native_apic_write", 2: "native_apic_read"}),
    "pv_mmu_ops": slots(29, {2: "native_read_cr2", 4: "native_read_cr3", 9: "native_flush_tlb",
                             18: "native_set_pte"}),
}  # fmt: skip
TYPES_2_6_24 = {
    12: "pv_cpu_ops.clts", 13: "pv_cpu_ops.read_cr0", 14: "pv_cpu_ops.write_cr0", 16: "pv_cpu_ops.read_cr4",
    29: "pv_cpu_ops.load_esp0", 31: "pv_cpu_ops.wbinvd", 32: "pv_cpu_ops.io_delay", 33: "pv_cpu_ops.cpuid",
    34: "pv_cpu_ops.read_msr", 36: "pv_cpu_ops.read_tsc", 38: "pv_cpu_ops.irq_enable_sysexit",
    39: "pv_cpu_ops.iret", 43: "pv_irq_ops.save_fl", 45: "pv_irq_ops.irq_disable", 47: "pv_irq_ops.safe_halt",
}  # fmt: skip
# 2.6.32: 1, 2, 40 and 6 slots, then one of pv_apic_ops where there is a local APIC.
OF_2_6_32: Objects = {
    "pv_init_ops": slots(1, {0: "native_patch"}),
    "pv_time_ops": slots(2, {0: "native_sched_clock"}),
    "pv_cpu_ops": slots(
        40,
        {2: "native_clts", 3: "native_read_cr0", 6: "native_read_cr4", 21: "native_load_sp0",
         23: "native_wbinvd", 24: "native_io_delay", 26: "native_read_msr_safe", 30: "native_read_tsc",
         33: "native_irq_enable_sysexit", 36: "native_iret", 37: "native_swapgs"},
    ),
    "pv_irq_ops": slots(
        6,
        {0: "native_save_fl", 1: "native_restore_fl", 2: "native_irq_disable",
         3: "native_irq_enable", 4: "native_safe_halt", 5: "native_halt"},
    ),
    "pv_apic_ops": slots(1, {}),
    "pv_mmu_ops": slots(34, {0: "native_read_cr2", 3: "native_write_cr3", 7: "native_flush_tlb",
                             20: "native_set_pte", 27: "_paravirt_ident_32", 28: "_paravirt_ident_32",
                             29: "_paravirt_ident_32", 30: "_paravirt_ident_32", 33: "native_set_fixmap"}),
    "pv_lock_ops": slots(6, {0: "__ticket_spin_is_locked", 2: "__ticket_spin_lock", 5: "__ticket_spin_unlock"}),
}  # fmt: skip
PAE_MMU = slots(
    40,
    {0: "native_read_cr2", 3: "native_write_cr3", 7: "native_flush_tlb", 20: "native_set_pte",
     27: "_paravirt_ident_64", 31: "native_set_pte_atomic", 34: "native_set_pud", 35: "_paravirt_ident_64",
     39: "native_set_fixmap"},
)  # fmt: skip
TYPES_2_6_32 = {
    5: "pv_cpu_ops.clts", 6: "pv_cpu_ops.read_cr0", 9: "pv_cpu_ops.read_cr4", 24: "pv_cpu_ops.load_sp0",
    26: "pv_cpu_ops.wbinvd", 27: "pv_cpu_ops.io_delay", 29: "pv_cpu_ops.read_msr", 33: "pv_cpu_ops.read_tsc",
    36: "pv_cpu_ops.irq_enable_sysexit", 37: "pv_cpu_ops.usergs_sysret64", 39: "pv_cpu_ops.iret",
    43: "pv_irq_ops.save_fl", 46: "pv_irq_ops.irq_enable", 47: "pv_irq_ops.safe_halt",
}  # fmt: skip
# 6.1 without PARAVIRT_XXL, every slot as its initialiser fills it.
OF_6_1: Objects = {
    "pv_ops": [
        "native_io_delay", "native_flush_tlb_local", "native_flush_tlb_global", "native_flush_tlb_one_user",
        "native_flush_tlb_multi", "tlb_remove_page", NOP, NOP, "native_queued_spin_lock_slowpath",
        "__raw_callee_save___native_queued_spin_unlock", NOP, NOP,
        "__raw_callee_save___native_vcpu_is_preempted",
    ]
}  # fmt: skip
NAMES_6_1 = [
    "cpu.io_delay", "mmu.flush_tlb_user", "mmu.flush_tlb_kernel", "mmu.flush_tlb_one_user", "mmu.flush_tlb_multi",
    "mmu.tlb_remove_table", "mmu.exit_mmap", "mmu.notify_page_enc_status_changed",
    "lock.queued_spin_lock_slowpath", "lock.queued_spin_unlock", "lock.wait", "lock.kick",
    "lock.vcpu_is_preempted",
]  # fmt: skip


def check(image: Image, objects: Objects, types: dict[int, str]) -> pvops.Resolver:
    """Every type has its op, and so has the slot that stands there."""
    resolver = pvops.resolve(image)
    assert {n: resolver.name_of_type(n) for n in types} == types
    word = image.bits // 8
    place = {}
    number = 0
    for name, held in objects.items():
        base = image.symbols.lookup(name)
        assert base is not None
        for i in range(len(held)):
            place[number] = base + i * word
            number += 1
    assert {n: resolver.name_of_slot(place[n]) for n in types} == types
    by_address = {slot.address: slot for slot in resolver.slots()}
    for n, name in types.items():
        slot = by_address[place[n]]
        assert (slot.type, slot.name) == (n, name)
        assert slot.function == resolver.function(slot.address)
        assert slot.function == int.from_bytes(image.read(slot.address, word), "little")
    return resolver


def test_2_6_20_numbers_ops(tmp_path: Path) -> None:
    objects: Objects = {"paravirt_ops": slots(40, {})}
    resolver = pvops.resolve(kernel(tmp_path, "2.6.21", objects))
    names = ["irq_disable", "irq_enable", "restore_flags", "save_flags", "save_flags_irq_disable"]
    assert [resolver.name_of_type(n) for n in range(8)] == [*names, "interrupt_return", "sti_sysexit", None]
    assert resolver.slots() == []


def test_2_6_22(tmp_path: Path) -> None:
    held = {14: "native_cpuid", 17: "native_clts", 18: "native_read_cr0", 26: "native_write_cr4",
            27: "native_save_fl", 29: "native_irq_disable", 33: "native_wbinvd", 36: "native_read_tsc",
            51: "native_load_esp0", 53: "native_io_delay", 63: "native_flush_tlb", 72: "native_set_pte",
            82: "native_irq_enable_sysexit", 83: "native_iret"}  # fmt: skip
    # The first four words are data: numbers, and a pointer to a name, which no function begins at.
    objects: Objects = {"paravirt_ops": [None, None, None, MIDDLE, *(held.get(i, NOP) for i in range(4, 84))]}
    types = {14: "cpuid", 17: "clts", 20: "read_cr2", 27: "save_fl", 28: "restore_fl", 29: "irq_disable",
             30: "irq_enable", 31: "safe_halt", 33: "wbinvd", 34: "read_msr", 40: "load_tr_desc", 45: "set_ldt",
             52: "set_iopl_mask", 57: "apic_write", 59: "apic_read", 81: "set_lazy_mode",
             82: "irq_enable_sysexit", 83: "iret"}  # fmt: skip
    check(kernel(tmp_path, "2.6.22", objects), objects, {n: f"paravirt_ops.{name}" for n, name in types.items()})


def test_2_6_24(tmp_path: Path) -> None:
    check(kernel(tmp_path, "2.6.24", OF_2_6_24), OF_2_6_24, TYPES_2_6_24)


def test_2_6_24_after_the_apic(tmp_path: Path) -> None:
    """With a local APIC the ops of pv_mmu_ops count from 55; a slot in pv_apic_ops proves it."""
    types = {49: "pv_apic_ops.apic_write", 51: "pv_apic_ops.apic_read", 57: "pv_mmu_ops.read_cr2",
             59: "pv_mmu_ops.read_cr3", 64: "pv_mmu_ops.flush_tlb_user", 73: "pv_mmu_ops.set_pte"}  # fmt: skip
    check(kernel(tmp_path, "2.6.24", OF_2_6_24), OF_2_6_24, types)


@pytest.mark.parametrize("pae", [False, True])
def test_2_6_32(tmp_path: Path, pae: bool) -> None:
    """The page-table layout is told from the functions, and moves everything after it."""
    objects = dict(OF_2_6_32)
    if pae:
        objects["pv_mmu_ops"] = PAE_MMU
    image = kernel(tmp_path, "2.6.32-5-686", objects)
    resolver = pvops.resolve(image)
    for number, name in TYPES_2_6_32.items():
        assert resolver.name_of_type(number) == name
    locks, mmu = image.symbols.lookup("pv_lock_ops"), image.symbols.lookup("pv_mmu_ops")
    assert locks is not None
    assert mmu is not None
    assert resolver.name_of_slot(locks + 4 * 5) == "pv_lock_ops.spin_unlock"
    assert resolver.name_of_slot(mmu + 4 * 20) == "pv_mmu_ops.set_pte"
    assert resolver.name_of_slot(mmu + 4 * (39 if pae else 33)) == "pv_mmu_ops.set_fixmap"
    assert resolver.name_of_slot(mmu + 4 * 31) == f"pv_mmu_ops.{'set_pte_atomic' if pae else 'lazy_mode.enter'}"


def test_apic_or_not_leaves_the_types_after_it_open(tmp_path: Path) -> None:
    """pv_apic_ops of 2.6.32 proves nothing (its one slot is a nop): slots keep their names, types lose theirs."""
    image = kernel(tmp_path, "2.6.32", OF_2_6_32)
    resolver = pvops.resolve(image)
    mmu = image.symbols.lookup("pv_mmu_ops")
    assert mmu is not None
    assert resolver.name_of_slot(mmu) == "pv_mmu_ops.read_cr2"
    assert resolver.name_of_type(50) is None
    assert [slot.type for slot in resolver.slots() if slot.address == mmu] == [None]


@pytest.mark.parametrize("release", ["6.1.0-50-686", "6.3.1", "5.18"])
def test_6_1(tmp_path: Path, release: str) -> None:
    image = kernel(tmp_path, release, OF_6_1)
    resolver = check(image, OF_6_1, {n: f"pv_ops.{name}" for n, name in enumerate(NAMES_6_1)})
    assert len(resolver.slots()) == 13
    assert resolver.name_of_type(13) is None


def test_5_10_with_and_without_what_stable_updates_took_away(tmp_path: Path) -> None:
    """5.10.133 and later have neither usergs_sysret64 nor swapgs; both layouts are told apart."""
    head = ["native_patch", "native_sched_clock", "native_steal_clock", "native_io_delay", *slots(27, {
        0: "native_get_debugreg", 6: "native_load_gdt", 17: "native_load_sp0",
        18: "native_tss_invalidate_io_bitmap", 19: "native_tss_update_io_bitmap", 20: "native_wbinvd",
        26: "native_read_pmc"})]  # fmt: skip
    tail = slots(2, {}) + slots(6, {0: "native_save_fl", 1: "native_restore_fl", 5: "native_halt"})
    tail += slots(45, {0: "native_flush_tlb_local", 4: "tlb_remove_page", 6: "native_read_cr2",
                       22: "native_set_pte", 24: "__ptep_modify_prot_start", 30: "native_set_pud",
                       35: "native_set_p4d", 39: "native_set_fixmap",
                       41: "__raw_callee_save___native_queued_spin_unlock"})  # fmt: skip
    old: Objects = {"pv_ops": [*head, "native_usergs_sysret64", "native_iret", "native_swapgs", *tail]}
    new: Objects = {"pv_ops": [*head, "native_iret", *tail]}
    check(kernel(tmp_path, "5.10.0", old, 64), old,
          {31: "pv_ops.cpu.usergs_sysret64", 32: "pv_ops.cpu.iret", 33: "pv_ops.cpu.swapgs",
           36: "pv_ops.irq.save_fl", 48: "pv_ops.mmu.read_cr2"})  # fmt: skip
    check(kernel(tmp_path, "5.10.262", new, 64), new,
          {31: "pv_ops.cpu.iret", 34: "pv_ops.irq.save_fl", 36: "pv_ops.irq.irq_disable",
           46: "pv_ops.mmu.read_cr2"})  # fmt: skip


def test_a_slot_out_of_place_proves_the_layout_wrong(tmp_path: Path) -> None:
    """A vendor's kernel with a slot more than any release had: nothing has a name, not even what would fit."""
    moved = list(OF_6_1["pv_ops"])
    moved.insert(2, "vendor_hook")
    image = kernel(tmp_path, "6.1.0", {"pv_ops": moved})
    resolver = pvops.resolve(image)
    base = image.symbols.lookup("pv_ops")
    assert base is not None
    assert [resolver.name_of_slot(base + 4 * i) for i in range(14)] == [None] * 14
    assert [resolver.name_of_type(i) for i in range(14)] == [None] * 14
    assert resolver.slots() == []


def test_what_a_slot_contradicts_has_no_name_and_the_rest_has(tmp_path: Path) -> None:
    """Two functions that changed places: neither slot is named, and what stands apart from them is."""
    held = list(OF_6_1["pv_ops"])
    held[2], held[3] = held[3], held[2]
    image = kernel(tmp_path, "6.1.0", {"pv_ops": held})
    resolver = pvops.resolve(image)
    base = image.symbols.lookup("pv_ops")
    assert base is not None
    names = [None if i in (2, 3) else f"pv_ops.{name}" for i, name in enumerate(NAMES_6_1)]
    assert [resolver.name_of_slot(base + 4 * i) for i in range(13)] == names
    assert [resolver.name_of_type(i) for i in range(13)] == names


def test_a_pointer_to_no_function_takes_its_silent_neighbour_s_name_with_it(tmp_path: Path) -> None:
    held = list(OF_6_1["pv_ops"])
    held[6] = MIDDLE
    image = kernel(tmp_path, "6.1.0", {"pv_ops": held})
    resolver = pvops.resolve(image)
    base = image.symbols.lookup("pv_ops")
    assert base is not None
    # Slot 7 holds a function that does nothing: between slot 6 and a slot that speaks for the layout.
    names = [None if i in (6, 7) else f"pv_ops.{name}" for i, name in enumerate(NAMES_6_1)]
    assert [resolver.name_of_slot(base + 4 * i) for i in range(13)] == names


def test_a_vendor_s_slot_in_one_object_leaves_the_others_their_names_but_not_their_types(tmp_path: Path) -> None:
    """2.6.32 with a slot more behind pv_cpu_ops.read_tsc: what comes before it and other objects are as ever."""
    objects = dict(OF_2_6_32)
    objects["pv_cpu_ops"] = list(objects["pv_cpu_ops"])
    objects["pv_cpu_ops"].insert(31, "vendor_hook")
    image = kernel(tmp_path, "2.6.32-5-686", objects)
    resolver = pvops.resolve(image)
    cpu, irq, mmu = (image.symbols.lookup(name) for name in ("pv_cpu_ops", "pv_irq_ops", "pv_mmu_ops"))
    assert cpu is not None
    assert irq is not None
    assert mmu is not None
    assert resolver.name_of_slot(cpu + 4 * 30) == "pv_cpu_ops.read_tsc"
    assert resolver.name_of_type(33) == "pv_cpu_ops.read_tsc"
    # native_irq_enable_sysexit stands where the header has usergs_sysret64, native_iret one too far: nothing from
    # read_tsc on is known.
    assert [resolver.name_of_slot(cpu + 4 * i) for i in range(31, 41)] == [None] * 10
    assert resolver.name_of_slot(irq) == "pv_irq_ops.save_fl"
    assert resolver.name_of_slot(mmu + 4 * 20) == "pv_mmu_ops.set_pte"
    assert resolver.name_of_type(43) is None


def test_another_release_s_layout_counts_if_the_functions_prove_it(tmp_path: Path) -> None:
    """A backport: the banner says 5.10, the object is that of 6.1."""
    image = kernel(tmp_path, "5.10.99", OF_6_1)
    check(image, OF_6_1, {n: f"pv_ops.{name}" for n, name in enumerate(NAMES_6_1)})


def test_without_a_banner_the_functions_alone_decide(tmp_path: Path) -> None:
    image = kernel(tmp_path, None, OF_6_1)
    assert image.version is None
    check(image, OF_6_1, {n: f"pv_ops.{name}" for n, name in enumerate(NAMES_6_1)})


def test_a_hypervisor_s_functions_do_not_speak_against_a_layout(tmp_path: Path) -> None:
    """In the memory of a KVM guest some slots hold functions that we do not know."""
    held = list(OF_6_1["pv_ops"])
    held[4], held[11] = "kvm_flush_tlb_multi", "kvm_kick_cpu"
    objects: Objects = {"pv_ops": held}
    image = kernel(tmp_path, "6.1.0", objects)
    check(image, objects, {n: f"pv_ops.{name}" for n, name in enumerate(NAMES_6_1)})


def test_mostly_unknown_functions_prove_nothing(tmp_path: Path) -> None:
    held = [f"secret_{i}" for i in range(13)]
    held[0], held[1], held[2] = "native_io_delay", "native_flush_tlb_local", "native_flush_tlb_global"
    resolver = pvops.resolve(kernel(tmp_path, "6.1.0", {"pv_ops": list(held)}))
    assert resolver.slots() == []
    assert resolver.name_of_type(0) is None


def test_without_symbols_the_release_tells_what_no_configuration_changes(tmp_path: Path) -> None:
    small = pvops.resolve(kernel(tmp_path, "6.1.0", OF_6_1, symbols=False))
    assert [small.name_of_type(n) for n in range(13)] == [f"pv_ops.{name}" for name in NAMES_6_1]
    assert small.slots() == []
    large = pvops.resolve(kernel(tmp_path, "6.1.0", OF_6_1, bits=64, symbols=False))
    assert large.name_of_type(0) == "pv_ops.cpu.io_delay"
    assert large.name_of_type(1) is None  # with PARAVIRT_XXL it is get_debugreg, else flush_tlb_user


@pytest.mark.parametrize("release", ["2.6.16", "3.5", "4.15", "7.0", None])
def test_nothing_tells(tmp_path: Path, release: str | None) -> None:
    """No layout was checked against these releases, and the image has no symbols: no op has a name."""
    resolver = pvops.resolve(kernel(tmp_path, release, OF_6_1, symbols=False))
    assert [resolver.name_of_type(n) for n in range(256)] == [None] * 256
    assert resolver.slots() == []
    assert resolver.name_of_slot(0xC1200000) is None


def test_objects_that_reach_beyond_the_image(tmp_path: Path) -> None:
    """A symbol that points nowhere, or to the last word of the file, is no evidence and no crash."""
    for address in (0, 0xFFFFFFFF, 0xC1000000 + 12):
        elf = ElfWriter(bits=32)
        elf.section(".text", b"\xc3" * 16, address=0xC1000000, flags="ax")
        elf.section(".rodata", b"Linux version 6.1.0 \n\0", address=0xC1100000, flags="a")
        elf.symbol("native_io_delay", 0xC1000000, ".text").symbol("pv_ops", address, "*ABS*", type="object")
        file = tmp_path / "vmlinux"
        file.write_bytes(elf.build())
        assert pvops.resolve(open_image(file)).name_of_slot(address) in (None, "pv_ops.cpu.io_delay")


@pytest.mark.parametrize("row", words(), ids=lambda row: f"{row.release} {row.configuration}".strip())
def test_every_configuration_that_moves_a_slot(row: Words, tmp_path: Path) -> None:
    """Each member has its name at the word that the release's header gives it, and no type a wrong one."""
    objects: Objects = {name: [NOP] * size for name, size in row.sizes.items()}
    places = [(name, place) for name, size in row.sizes.items() for place in range(size)]
    for number, member in row.numbers.items():
        name, place = places[number]
        objects[name][place] = FUNCTIONS.get(member, f"native_{member}")
    if "paravirt_ops" in objects:
        objects["paravirt_ops"][:4] = [None, None, None, MIDDLE]
    image = kernel(tmp_path, row.release, objects)
    resolver = pvops.resolve(image)
    named = 0
    for number, member in row.numbers.items():
        name, place = places[number]
        base = image.symbols.lookup(name)
        assert base is not None
        assert resolver.name_of_slot(base + 4 * place) == f"{name}.{member}"
        assert resolver.name_of_type(number) in (f"{name}.{member}", None)
        named += resolver.name_of_type(number) is not None
    assert named >= 7


# The data


def layouts() -> list[str]:
    return [name for name in facts.names("pvops") if name.startswith("linux-")]


def test_layouts_say_where_they_begin_and_do_not_overlap() -> None:
    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    spans = sorted((version(s["since"]), version(s["until"])) for s in (facts.load("pvops", n) for n in layouts()))
    assert all(start < end for start, end in spans)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(name == f"linux-{facts.load('pvops', name)['since']}" for name in layouts())


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("bits", [32, 64])
def test_every_configuration_names_each_op_once_and_fits_into_a_byte(name: str, bits: int) -> None:
    variants = pvops._variants(name, bits)
    assert len(variants) <= 64
    for variant in variants:
        ops = [word.name for word in variant]
        assert len(set(ops)) == len(ops) <= 256


def test_every_native_function_belongs_to_a_slot_that_some_layout_has() -> None:
    fields = {f for n in layouts() for g in facts.load("pvops", n).get("group", ()) for f in g["slots"]}
    assert set(facts.load("pvops", "native-functions")["native"]) <= fields
