"""What the stubs say to their hypervisors: VMI_Init, the call gate, and the published hypercalls.

Numbers and structures are written here from the public headers (Xen's public/xen.h, Linux 2.6.32's
asm/lguest_hcall.h, linux/lguest.h, linux/kvm_para.h), the gate's from docs/abis.md.
"""

from __future__ import annotations

import pytest
from romguest import BASE, DATA, DEPRIVILEGED, REGISTERS, TOP, Guest, rom
from unicorn import UC_HOOK_INSN
from unicorn import x86_const as x86

from vmipatch.rombuild.inspect import relocations

SIGNATURES = {
    "vmware": b"VMwareVMware",
    "xen": b"XenVMMXenVMM",
    "kvm": b"KVMKVMKVM\0\0\0",
    "lguest": b"lguestlguest",
    "l4ka": b"L4KaL4KaL4Ka",
}
PAE = 0x20  # of CR4
DIRECT = 0xC0000000  # the guest's direct map, as it tells SetLinearMapping


def at(hypervisor: str, number: int, abi: str = "vmi-3.0") -> int:
    return relocations(rom(hypervisor, abi).data).of(number).offset


def mapped(hypervisor: str) -> Guest:
    """A guest at CPL 1 after SetLinearMapping of the data and stack pages (linear X is physical X + 0x10000000)."""
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    guest.call(at(hypervisor, 48), 0x10000, eax=0, edx=0, ecx=0x1000)  # 16 MiB from 0 at frame 0x10000
    return guest


def words(guest: Guest, address: int, count: int) -> list[int]:
    return [guest.u32(address + 4 * n) for n in range(count)]


def signed_in(guest: Guest, signature: bytes) -> list[int]:
    asked: list[int] = []

    def cpuid(uc: object, _data: object) -> int:
        asked.append(guest["eax"])
        for number, name in enumerate(("ebx", "ecx", "edx")):
            guest[name] = int.from_bytes(signature[4 * number : 4 * number + 4], "little")
        guest["eax"] = 0x40000001
        return 1

    guest.uc.hook_add(UC_HOOK_INSN, cpuid, None, 1, 0, x86.UC_X86_INS_CPUID)
    return asked


@pytest.mark.parametrize("abi", ["vmi-3.0", "vmi-13.0"])
@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_init_asks_only_its_own_hypervisor(hypervisor: str, abi: str) -> None:
    for name, signature in [*SIGNATURES.items(), ("bare", b"GenuineIntel")]:
        for answer in (0, 2):
            guest = Guest(rom(hypervisor, abi).data)
            asked = signed_in(guest, signature)
            guest.on_trap = lambda kind, g, answer=answer: g.__setitem__("eax", answer)  # type: ignore[misc]
            after = guest.call(0x80)
            assert asked == [0x40000000]
            if name == hypervisor:
                ((kind, registers),) = guest.traps
                assert kind == "in 0x564d"
                assert (registers["eax"], registers["ebx"], registers["edx"]) == (0x696D5663, BASE, 0x564D)
                assert after["eax"] == answer
            else:
                assert guest.traps == []
                assert after["eax"] == 0xFFFFFFFF
            assert {n: v for n, v in after.items() if n not in ("eax", "esp")} == {
                n: 0xA0B0C000 + 0x11 * i for i, n in enumerate(REGISTERS) if n != "eax"
            }


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
@pytest.mark.parametrize("at_byte", [0, 5, 11])
def test_init_compares_the_whole_signature(hypervisor: str, at_byte: int) -> None:
    signature = bytearray(SIGNATURES[hypervisor])
    signature[at_byte] ^= 0x20
    guest = Guest(rom(hypervisor, "vmi-3.0").data)
    signed_in(guest, bytes(signature))
    assert guest.call(0x80)["eax"] == 0xFFFFFFFF
    assert guest.traps == []


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_linear_mappings(hypervisor: str) -> None:
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    for slot in range(6):
        guest.call(at(hypervisor, 48), 0x100 + slot, eax=slot, edx=0xC0000000 + (slot << 24), ecx=slot + 1)
    for slot in range(4):
        where = TOP + 0xE40 + 16 * slot
        wanted = [0xC0000000 + (slot << 24), (slot + 1) << 12, (0x100 + slot) << 12, 0]
        assert words(guest, where, 4) == wanted
    assert words(guest, TOP + 0xE80, 8) == [0] * 8


def test_the_end_of_a_mapping() -> None:
    """Xen writes machine addresses: the last word of a mapping has one, the next has none."""
    guest = Guest(rom("xen", "vmi-3.0").data, ring=1)
    guest.call(at("xen", 48), 0x500, eax=2, edx=DATA, ecx=1)
    guest.call(at("xen", 48), 0x700, eax=1, edx=DATA + 0x2000, ecx=1)
    seen: list[list[int]] = []

    def answer(kind: str, g: Guest) -> None:
        seen.append(words(g, g["ebx"], 2))
        g["eax"] = 0

    guest.on_trap = answer
    for address, wanted in (
        (DATA, [0x500000, 0]),
        (DATA + 0xFFC, [0x500FFC, 0]),
        (DATA + 0x1000, None),
        (DATA + 0x1FFC, None),
        (DATA + 0x2000, [0x700000, 0]),
        (DATA + 0x3000, None),
    ):
        seen.clear()
        guest.call(at("xen", 38), eax=0x1067, edx=address, ecx=1)
        assert seen == ([wanted] if wanted else []), hex(address)
        assert (guest.u32(address) == 0x1067) == (wanted is None)


def test_xen_refuses() -> None:
    """A mapping that was told longer than memory is: Xen answers -EINVAL, and the stub writes in place, which Xen
    emulates; set_gdt goes through the gate."""
    guest = mapped("xen")

    def answer(kind: str, g: Guest) -> None:
        g["eax"] = -22

    guest.on_trap = answer
    table = DATA + 0x1000
    guest.call(at("xen", 38), eax=0x1067, edx=table, ecx=1)
    assert (guest.traps[-1][1]["eax"], guest.u32(table)) == (1, 0x1067)
    guest.call(at("xen", 12), 0x00CF9B00, eax=table, edx=3, ecx=0x1234FFFF)
    assert (guest.traps[-1][1]["eax"], words(guest, table + 24, 2)) == (10, [0x1234FFFF, 0x00CF9B00])
    guest.uc.mem_write(DATA, (0x2FF).to_bytes(2, "little") + table.to_bytes(4, "little"))
    guest.traps.clear()
    guest.call(at("xen", 3), eax=DATA)
    assert [r["eax"] for _, r in guest.traps] == [2, 0x564D]


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_init_again_is_done_already(hypervisor: str) -> None:
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    assert guest.call(0x80)["eax"] == 0
    assert guest.traps == []


def test_native_init() -> None:
    for abi in ("vmi-3.0", "vmi-13.0", "vmi-6.1"):
        guest = Guest(rom("native", abi).data)
        assert guest.call(0x80)["eax"] == 0
        assert guest.traps == []


@pytest.mark.parametrize("abi", ["vmi-3.0", "vmi-13.0"])
@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_the_gate(hypervisor: str, abi: str) -> None:
    """SetAlarm: three registers and two stack words go in, results come out of the frame."""
    number = 68 if abi == "vmi-3.0" else 81
    guest = Guest(rom(hypervisor, abi).data, ring=1)

    def answer(kind: str, g: Guest) -> None:
        frame = g["ebx"]
        assert words(g, frame, 3) == [0xA0B0C066, 0xA0B0C055, 0xA0B0C044]  # EDI, ESI, EBP
        assert words(g, frame + 16, 4) == [0xA0B0C033, 222, 333, 111]  # EBX, EDX, ECX, EAX
        assert g.u32(frame + 32) == number
        assert words(g, frame + 40, 2) == [444, 555]
        g.write(frame + 28, 0x11112222)
        g.write(frame + 20, 0x33334444)

    guest.on_trap = answer
    after = guest.call(at(hypervisor, number, abi), 444, 555, eax=111, edx=222, ecx=333)
    assert (after["eax"], after["edx"], after["ecx"]) == (0x11112222, 0x33334444, 333)
    for name in ("ebx", "ebp", "esi", "edi"):
        assert after[name] == 0xA0B0C000 + 0x11 * REGISTERS.index(name)
    ((kind, registers),) = guest.traps
    assert (
        kind
        == {"vmware": "in 0x5658", "kvm": "vmcall", "lguest": "int 0x1f", "xen": "int 0x82", "l4ka": "int 0x30"}[
            hypervisor
        ]
    )
    if hypervisor == "vmware":
        assert (registers["eax"], registers["ecx"] & 0xFFFF, registers["edx"]) == (0x564D5868, 0x564D, 0x5658)
    else:
        assert registers["eax"] == 0x564D


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_shadow_values(hypervisor: str) -> None:
    guest = Guest(rom(hypervisor, "vmi-3.0").data, ring=1)
    guest.write(TOP + 0xE10, 0x80050033)
    guest.write(TOP + 0xE18, 0x00345000)
    guest.write(TOP + 0xE1C, 0x6D0)
    guest.write(TOP + (8 if hypervisor in ("xen", "lguest") else 0xE14), 0xBADF00D)
    guest.uc.mem_write(TOP + 0xE20, bytes.fromhex("ff0000501bc0"))
    guest.uc.mem_write(TOP + 0xE28, bytes.fromhex("ff07006029d1"))
    assert guest.call(at(hypervisor, 19))["eax"] == 0x80050033
    assert guest.call(at(hypervisor, 20))["eax"] == 0xBADF00D
    assert guest.call(at(hypervisor, 21))["eax"] == 0x00345000
    assert guest.call(at(hypervisor, 22))["eax"] == 0x6D0
    guest.call(at(hypervisor, 7), eax=DATA)
    guest.call(at(hypervisor, 9), eax=DATA + 8)
    assert bytes(guest.uc.mem_read(DATA, 8)) == bytes.fromhex("ff0000501bc00000")
    assert bytes(guest.uc.mem_read(DATA + 8, 8)) == bytes.fromhex("ff07006029d10000")


def test_xen_page_tables() -> None:
    guest = mapped("xen")
    seen: list[list[int]] = []
    guest.on_trap = lambda kind, g: seen.append(words(g, g["ebx"], 4))
    guest.call(at("xen", 38), eax=0x00123067, edx=DATA + 0x10, ecx=1)
    _, registers = guest.traps[-1]
    # mmu_update(1): {u64 machine address, u64 value}, one of them, DOMID_SELF
    assert (registers["eax"], registers["ecx"], registers["edx"], registers["esi"]) == (1, 1, 0, 0x7FF0)
    assert seen[-1] == [0x10000000 + DATA + 0x10, 0, 0x00123067, 0]
    # Eight bytes: until PAE is on Xen would write four of them, so the stub writes and Xen emulates.
    before = len(guest.traps)
    guest.call(at("xen", 39), 1, eax=0x00123067, edx=0x80000000, ecx=DATA + 0x18)
    assert (len(guest.traps), words(guest, DATA + 0x18, 2)) == (before, [0x00123067, 0x80000000])
    guest.write(TOP + 0xE1C, PAE)
    guest.call(at("xen", 39), 1, eax=0x00123067, edx=0x80000000, ecx=DATA + 0x18)
    assert seen[-1] == [0x10000000 + DATA + 0x18, 0, 0x00123067, 0x80000000]
    # An address that no mapping covers is written, for Xen to emulate.
    before = len(guest.traps)
    guest.call(at("xen", 38), eax=7, edx=TOP + 0xF00, ecx=1)
    assert (len(guest.traps), guest.u32(TOP + 0xF00)) == (before, 7)
    for number, given, wanted in (
        (17, {"eax": 0x00345000}, [5, 0x345, 0]),  # SetCR3: NEW_BASEPTR
        (47, {"eax": 1}, [6, 0, 0]),  # FlushTLB: TLB_FLUSH_LOCAL
        (46, {"eax": 0xC1234000}, [7, 0xC1234000, 0]),  # InvalPage: INVLPG_LOCAL
        (23, {}, [12, 0, 0]),  # WBINVD: FLUSH_CACHE
        (44, {"eax": 0x99, "edx": 1}, [0, 0x99, 0]),  # AllocatePage: PIN_L1_TABLE
        (44, {"eax": 0x99, "edx": 2}, [1, 0x99, 0]),
        (44, {"eax": 0x99, "edx": 0x12}, [1, 0x99, 0]),
        (44, {"eax": 0x99, "edx": 4}, [2, 0x99, 0]),
        (45, {"eax": 0x99, "edx": 1}, [4, 0x99, 0]),  # ReleasePage: UNPIN_TABLE
    ):
        guest.call(at("xen", number), **given)
        kind, registers = guest.traps[-1]
        assert (kind, registers["eax"], registers["ecx"], registers["esi"]) == ("int 0x82", 26, 1, 0x7FF0)
        assert seen[-1][:3] == wanted, number


def test_xen_descriptors() -> None:
    guest = mapped("xen")
    seen: list[list[int]] = []

    def answer(kind: str, g: Guest) -> None:
        seen.append(words(g, g["ebx"], 4) if g["eax"] in (0, 2, 26) and g["ebx"] else [])
        g["eax"] = 0

    guest.on_trap = answer
    table = DATA + 0x1000
    guest.call(at("xen", 11), 0x00CF9B00, eax=table, edx=3, ecx=0x0000FFFF)
    _, r = guest.traps[-1]
    # update_descriptor(10): machine address low, high, descriptor low, high
    assert (r["eax"], r["ebx"], r["ecx"], r["edx"], r["esi"]) == (10, 0x10000000 + table + 24, 0, 0xFFFF, 0x00CF9B00)
    guest.uc.mem_write(DATA, (0x2FF).to_bytes(2, "little") + table.to_bytes(4, "little"))
    guest.call(at("xen", 3), eax=DATA)
    _, r = guest.traps[-1]
    assert (r["eax"], r["ecx"]) == (2, 0x60)  # set_gdt: 96 entries
    assert seen[-1][0] == (0x10000000 + table) >> 12
    # SetIDT: every present gate to set_trap_table, one at a time; trap_info {u8 vector, u8 flags, u16 cs, u32 address}
    idt = DATA + 0x2000
    for vector in range(256):
        guest.write(idt + 8 * vector + 4, 0)
    for vector, low, high in (
        (3, 0x00601234, 0xC010EF00),
        (14, 0x00605678, 0xC0108E00),
        (0x80, 0x00609ABC, 0xC010EF00),
    ):
        guest.write(idt + 8 * vector, low)
        guest.write(idt + 8 * vector + 4, high)
    guest.uc.mem_write(DATA, (0x7FF).to_bytes(2, "little") + idt.to_bytes(4, "little"))
    guest.traps.clear()
    seen.clear()
    guest.call(at("xen", 5), eax=DATA, limit=20000)
    assert [r["eax"] for _, r in guest.traps] == [0, 0, 0, 0]
    assert guest.traps[0][1]["ebx"] == 0  # forget all
    assert seen[1:] == [
        [0x00600303, 0xC0101234, 0, 0],
        [0x0060040E, 0xC0105678, 0, 0],  # an interrupt gate masks events: flag 4
        [0x00600380, 0xC0109ABC, 0, 0],
    ]
    guest.call(at("xen", 13), 0xC0118E00, eax=idt, edx=0x30, ecx=0x00601000)
    assert seen[-1] == [0x00600430, 0xC0111000, 0, 0]
    assert words(guest, idt + 8 * 0x30, 2) == [0x00601000, 0xC0118E00]
    # WriteIDTEntry on another table is a descriptor's: Linux 2.6.26 writes LDTs so.
    guest.call(at("xen", 13), 0x00CFFB00, eax=table, edx=1, ecx=0xFFFF)
    assert guest.traps[-1][1]["eax"] == 10
    guest.write(table + 0x28, 0x5000001F)
    guest.write(table + 0x2C, 0xC1008234)
    guest.call(at("xen", 4), eax=0x28)
    assert seen[-1][:3] == [13, 0xC1345000, 4]  # SET_LDT: linear address, entries
    guest.call(at("xen", 4), eax=0)
    assert seen[-1][:3] == [13, 0, 0]


def test_xen_the_rest() -> None:
    guest = mapped("xen")
    for number, given, wanted in (
        (28, {}, {"eax": 5, "ebx": 0}),  # CLTS: fpu_taskswitch
        (15, {"eax": 0x80050033 | 8}, {"eax": 5, "ebx": 1}),
        (24, {"eax": 7, "edx": 0x401}, {"eax": 8, "ebx": 7, "ecx": 0x401}),  # set_debugreg
        (25, {"eax": 6}, {"eax": 9, "ebx": 6}),
        (14, {"eax": 0x68, "edx": 0xC1230000}, {"eax": 3, "ebx": 0x21, "ecx": 0xC1230000}),  # stack_switch
        (35, {}, {"eax": 29, "ebx": 1, "ecx": 0}),  # sched_op block
        (61, {"eax": 0x3000}, {"eax": 33, "ebx": 6}),  # physdev_op set_iopl
    ):
        guest.call(at("xen", number), **given)
        kind, registers = guest.traps[-1]
        assert kind == "int 0x82"
        assert {name: registers[name] for name in wanted} == wanted, number
    guest.call(at("xen", 0), eax=1)
    assert guest.traps[-1][0] == "xen prefix"


def test_lguest() -> None:
    guest = mapped("lguest")
    guest.write(TOP + 0xE18, 0x00345000)
    entry = DATA + 0x20
    physical = 0x10000000 + entry
    for number, stack, given, wanted in (
        (
            38,
            [],
            {"eax": 0x67, "edx": entry, "ecx": 0x08048011},
            {"eax": 14, "ebx": 0x345000, "ecx": 0x08048000, "edx": 0x67},
        ),
        (38, [], {"eax": 0x67, "edx": entry, "ecx": 1}, {"eax": 5, "ebx": 1}),
        (
            38,
            [],
            {"eax": 0x67, "edx": entry, "ecx": 2},
            {"eax": 15, "ebx": physical & ~0xFFF, "ecx": (physical & 0xFFF) // 4},
        ),
        (
            39,
            [0x08048011],
            {"eax": 0x67, "edx": 9, "ecx": entry},
            {"eax": 14, "ebx": 0x345000, "ecx": 0x08048000, "edx": 0x67, "esi": 9},
        ),
        (
            39,
            [2],
            {"eax": 0x67, "edx": 0, "ecx": entry},
            {"eax": 13, "ebx": physical & ~0xFFF, "ecx": (physical & 0xFFF) // 8},
        ),
        (
            39,
            [4],
            {"eax": 0x67, "edx": 0, "ecx": entry},
            {"eax": 15, "ebx": physical & ~0x1F, "ecx": (physical & 0x1F) // 8},
        ),
        (40, [], {"eax": entry, "edx": 0x08048011}, {"eax": 14, "ebx": 0x345000, "ecx": 0x08048000, "edx": 0x67}),
        (17, [], {"eax": 0x346000}, {"eax": 4, "ebx": 0x346000}),
        (47, [], {"eax": 1}, {"eax": 5, "ebx": 0}),
        (47, [], {"eax": 3}, {"eax": 5, "ebx": 1}),
        (46, [], {"eax": 0xC1234000}, {"eax": 14, "ebx": 0x346000, "ecx": 0xC1234000, "edx": 0}),
        (28, [], {}, {"eax": 8, "ebx": 0}),
        (15, [], {"eax": 0x8005003B}, {"eax": 8, "ebx": 8}),
        (14, [], {"eax": 0x68, "edx": 0xC1230000}, {"eax": 7, "ebx": 0x21, "ecx": 0xC1230000, "edx": 2}),
        (35, [], {}, {"eax": 10}),
    ):
        guest.write(TOP + 0xE18, 0x00345000 if number != 46 else 0x346000)
        guest.call(at("lguest", number), *stack, **given)
        kind, registers = guest.traps[-1]
        assert kind == "int 0x1f"
        assert {name: registers[name] for name in wanted} == wanted, (number, given)
        if number == 38:
            assert guest.u32(entry) == 0x67, "the guest writes its own tables"
    table = DATA + 0x1000
    guest.uc.mem_write(DATA, (31).to_bytes(2, "little") + table.to_bytes(4, "little"))
    for number, write, hypercall in ((3, 11, 18), (5, 13, 6)):
        for n in range(4):
            guest.write(table + 8 * n, 0x1000 + n)
            guest.write(table + 8 * n + 4, 0x2000 + n)
        guest.traps.clear()
        guest.call(at("lguest", number), eax=DATA)
        assert [[r[x] for x in ("eax", "ebx", "ecx", "edx")] for _, r in guest.traps] == [
            [hypercall, n, 0x1000 + n, 0x2000 + n] for n in range(4)
        ]
        guest.call(at("lguest", write), 0x4444, eax=table, edx=2, ecx=0x3333)
        _, r = guest.traps[-1]
        assert [r[x] for x in ("eax", "ebx", "ecx", "edx")] == [hypercall, 2, 0x3333, 0x4444]
        assert words(guest, table + 16, 2) == [0x3333, 0x4444]
    for seconds, nanoseconds in ((1_200_000_000, 987_654_321), (4, 999_999_999), (1_291_845_633, 999_999_999)):
        guest.write(TOP + 12, seconds)
        guest.write(TOP + 16, nanoseconds)
        after = guest.call(at("lguest", 70))
        assert after["edx"] << 32 | after["eax"] == seconds * 1_000_000_000 + nanoseconds


def test_kvm_mmu_op() -> None:
    guest = mapped("kvm")
    seen: list[list[int]] = []
    # EAX = 2, EBX = bytes, EDX:ECX = physical address (the mapping adds 0x10000000)
    guest.on_trap = lambda kind, g: seen.append(words(g, g["ecx"] - 0x10000000, g["ebx"] // 4) if g["eax"] == 2 else [])
    entry = DATA + 0x20
    guest.call(at("kvm", 39), 1, eax=0x67, edx=9, ecx=entry)
    assert guest.traps[-1][1]["eax"] == 0x564D, "before PAE is on WRITE_PTE would write four bytes: the gate"
    guest.write(TOP + 0xE1C, PAE)
    for number, stack, given, wanted in (
        (38, [], {"eax": 0x67, "edx": entry, "ecx": 1}, [1, 0, 0x10000000 + entry, 0, 0x67, 0]),
        (39, [1], {"eax": 0x67, "edx": 9, "ecx": entry}, [1, 0, 0x10000000 + entry, 0, 0x67, 9]),
        (47, [], {"eax": 1}, [2, 0]),
        (45, [], {"eax": 0x12345, "edx": 1}, [3, 0, 0x12345000, 0]),
        (45, [], {"eax": 0xFEDCBA, "edx": 1}, [3, 0, 0xDCBA000 | 0xE0000000, 0xF]),
    ):
        guest.call(at("kvm", number), *stack, **given)
        kind, registers = guest.traps[-1]
        assert (kind, registers["eax"], registers["edx"]) == ("vmcall", 2, 0)
        assert seen[-1] == wanted, number
    # What no mapping covers goes through the gate, with the arguments as they came.
    guest.call(at("kvm", 38), eax=0x67, edx=DIRECT, ecx=5)
    kind, registers = guest.traps[-1]
    assert (kind, registers["eax"]) == ("vmcall", 0x564D)
    assert words(guest, registers["ebx"] + 20, 4) == [DIRECT, 5, 0x67, 38]
