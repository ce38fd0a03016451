"""What stubs do natively, before VMI_Init and on the native ROM: the same in every ROM of an ABI.

Run under Unicorn at CPL 0; the argument registers of the ABIs are written here from their documents.
"""

from __future__ import annotations

import pytest
from romguest import DATA, PAIRS, TOP, Guest, rom

from vmipatch.rombuild.inspect import relocations

SLOT_PAIRS = [p for p in PAIRS if p[1] in ("vmi-13.0", "vmi-13.3", "vmi-13.0-l4ka")]


def words(guest: Guest, address: int, count: int) -> list[int]:
    return [guest.u32(address + 4 * n) for n in range(count)]


@pytest.mark.parametrize(("hypervisor", "abi"), SLOT_PAIRS)
def test_page_tables_13(hypervisor: str, abi: str) -> None:
    guest = Guest(rom(hypervisor, abi).data)
    call = lambda number, *stack, **registers: guest.call(32 * number, *stack, **registers)  # noqa: E731
    call(45, eax=DATA, edx=0x1067)  # SetPxE: EAX pointer, EDX value
    assert guest.u32(DATA) == 0x1067
    assert call(46, eax=DATA)["eax"] == 0x1067  # GetPxE
    assert call(47, eax=DATA, edx=0x2067)["eax"] == 0x1067  # SwapPxE
    assert guest.u32(DATA) == 0x2067
    call(48, eax=0x3067, edx=0x80000000, ecx=DATA + 8)  # SetPxELong: EDX:EAX value, ECX pointer
    assert words(guest, DATA + 8, 2) == [0x3067, 0x80000000]
    after = call(49, eax=DATA + 8)
    assert (after["eax"], after["edx"]) == (0x3067, 0x80000000)
    after = call(50, eax=0x4067, edx=1, ecx=DATA + 8)  # SwapPxELongAtomic
    assert (after["eax"], after["edx"]) == (0x3067, 0x80000000)
    assert words(guest, DATA + 8, 2) == [0x4067, 1]
    assert call(51, eax=DATA, edx=3)["eax"] == 0  # TestAndSetPxEBit
    assert guest.u32(DATA) == 0x206F
    assert call(51, eax=DATA, edx=3)["eax"] & 1 == 1
    assert call(52, eax=DATA, edx=0)["eax"] & 1 == 1  # TestAndClearPxEBit
    assert guest.u32(DATA) == 0x206E
    assert call(74, eax=DATA + 8, edx=0)["eax"] & 1 == 1
    assert call(73, eax=DATA + 8, edx=35)["eax"] == 0
    assert words(guest, DATA + 8, 2) == [0x4066, 9]
    after = call(72, eax=DATA + 8)  # DeactivatePxELongAtomic
    assert (after["eax"], after["edx"]) == (0x4066, 9)
    assert words(guest, DATA + 8, 2) == [0, 0]
    for number in (16, 17, 18):  # Write*DTEntry: EAX table, EDX index, ECX low, stack high
        call(number, 0x00CF9B00, eax=DATA + 0x100, edx=number - 14, ecx=0xFFFF)
        assert words(guest, DATA + 0x100 + 8 * (number - 14), 2) == [0xFFFF, 0x00CF9B00]
    guest.write(DATA + 0x400, 0x12345678)
    assert call(77, eax=DATA + 0x400)["eax"] == 0x12345678  # APICRead: a mapped address
    call(76, eax=DATA + 0x400, edx=0x55)
    assert guest.u32(DATA + 0x400) == 0x55
    if abi == "vmi-13.3":
        call(86, eax=0x5067, edx=DATA + 0x20, ecx=0)  # the new SetPxE
        assert guest.u32(DATA + 0x20) == 0x5067
        call(87, 0, eax=0x6067, edx=7, ecx=DATA + 0x28)
        assert words(guest, DATA + 0x28, 2) == [0x6067, 7]
    assert guest.traps == []


@pytest.mark.parametrize("hypervisor", [p[0] for p in PAIRS if p[1] == "vmi-3.0"])
def test_calls_of_3_0(hypervisor: str) -> None:
    answers = relocations(rom(hypervisor, "vmi-3.0").data)
    guest = Guest(rom(hypervisor, "vmi-3.0").data)
    call = lambda number, *stack, **registers: guest.call(answers.of(number).offset, *stack, **registers)  # noqa: E731
    call(38, eax=0x1067, edx=DATA, ecx=1)  # SetPxE: EAX value, EDX pointer, ECX flags
    assert guest.u32(DATA) == 0x1067
    call(39, 1, eax=0x2067, edx=5, ecx=DATA + 8)
    assert words(guest, DATA + 8, 2) == [0x2067, 5]
    guest.uc.mem_write(DATA + 0x20, (0x37).to_bytes(2, "little") + (0x00100000).to_bytes(4, "little"))
    call(3, eax=DATA + 0x20)  # SetGDT, then what the processor says
    call(7, eax=DATA + 0x28)
    assert bytes(guest.uc.mem_read(DATA + 0x28, 6)) == bytes(guest.uc.mem_read(DATA + 0x20, 6))
    call(5, eax=DATA + 0x20)
    call(9, eax=DATA + 0x30)
    assert bytes(guest.uc.mem_read(DATA + 0x30, 6)) == bytes(guest.uc.mem_read(DATA + 0x20, 6))
    call(24, eax=3, edx=0x00401234)  # SetDR, GetDR
    call(24, eax=0, edx=0x00400000)
    assert call(25, eax=3)["eax"] == 0x00401234
    assert call(25, eax=0)["eax"] == 0x00400000
    call(16, eax=0xBADF00D)
    assert call(20)["eax"] == 0xBADF00D
    cr0 = call(19)["eax"]
    call(15, eax=cr0 | 8)
    assert call(19)["eax"] == cr0 | 8
    call(28)  # CLTS
    assert call(19)["eax"] == cr0
    assert guest.traps == []
    assert words(guest, TOP + 0xE00, 64) == [0] * 64, "no state before VMI_Init"


@pytest.mark.parametrize("ring", [0, 1])
def test_6_1_calls_keep_every_register(ring: int) -> None:
    """The interrupt calls that only 6.1 has; std is flags alone there."""
    guest = Guest(rom("l4ka", "vmi-6.1").data, ring)
    marks = {name: 0xA0B0C000 + 0x11 * n for n, name in enumerate(("eax", "ecx", "edx", "ebx", "ebp", "esi", "edi"))}

    def call(number: int, **given: int) -> int:
        after = guest.call(32 * number, **given)
        assert {n: after[n] for n in marks if n != "eax"} == {n: given.get(n, marks[n]) for n in marks if n != "eax"}
        return after["eax"]

    def flag() -> bool:
        return bool((guest["eflags"] if ring == 0 else guest.u32(TOP + 0xE00)) & 0x200)

    call(58)
    assert flag()
    assert call(56) & 0x200  # SaveAndDisableIRQs
    assert not flag()
    assert not call(56) & 0x200
    call(57, eax=0x202)  # RestoreIRQs
    assert flag()
    call(54, eax=0x46)  # SetEFLAGS
    assert not flag()
    assert guest["eflags"] & 0x44 == 0x44
    assert not call(55) & 0x200
    call(72, eax=DATA, edx=0x1067) if ring == 0 else None
    assert call(70, eax=DATA) == (0x1067 if ring == 0 else 0)
