"""The older interfaces under L4Ka, which spoke them all: the switch, and calls that only they have."""

from __future__ import annotations

import struct

import pytest
from pagedguest import BASE, DATA, GDT, IDT, STACK_TOP, TABLES, PagedGuest

ABIS = ("vmi-13.0", "vmi-13.0-l4ka", "vmi-13.3", "vmi-6.1")
ENTRY = TABLES + 0x3F0 * 4
HANDLER_6 = 0x48000 + 16 * 6


def started(abi: str) -> PagedGuest:
    guest = PagedGuest("l4ka", abi)
    assert guest.init() == 0
    assert guest.cpu.get("cpl") == 1
    assert guest.personality.abi.name == abi
    return guest


@pytest.mark.parametrize("abi", ABIS)
def test_the_switch_and_page_table_calls(abi: str) -> None:
    guest = started(abi)
    if abi == "vmi-13.3":
        # Two calls of the name: 86 has value, pointer, flags; 45 is the old one.
        guest.call("SetPxE", eax=0x300003, edx=BASE + ENTRY, ecx=1)
        assert guest.word(ENTRY) == 0x300003
        guest.call("SetPxE0", eax=BASE + ENTRY, edx=0x301003)
    elif abi == "vmi-6.1":
        # As in 13.0: pointer, value (A6).
        guest.call("SetPte", eax=BASE + ENTRY, edx=0x301003)
    else:
        guest.call("SetPxE", eax=BASE + ENTRY, edx=0x301003)
    assert guest.word(ENTRY) == 0x301003
    swap = "SwapPte" if abi == "vmi-6.1" else "SwapPxE"
    guest.call(swap, eax=BASE + ENTRY, edx=0x302003)
    assert (guest.cpu.get("eax"), guest.word(ENTRY)) == (0x301003, 0x302003)
    guest.call("InvalPage", eax=BASE + 0x3F0000)
    assert guest.personality.violation is None


def test_translations_of_the_afterburner() -> None:
    guest = started("vmi-13.0-l4ka")
    for name in ("PhysToMachine", "MachineToPhys"):
        guest.call(name, eax=0x123000)
        assert guest.cpu.get("eax") == 0x123000
    guest.call("PhysIsCoherent", eax=0x123)
    assert guest.cpu.get("eax") == 1


def test_calls_that_only_the_first_interface_has() -> None:
    guest = started("vmi-6.1")
    guest.call("STTS")
    guest.call("SMSW")
    assert guest.cpu.get("eax") & 8
    guest.call("CLTS")
    guest.call("LMSW", eax=0x19)
    guest.call("SMSW")
    assert guest.cpu.get("eax") & 0xF == 0x9
    guest.call("SetIOPLMask", eax=0x1000)
    guest.call("GetIOPLMask")
    assert guest.cpu.get("eax") == 0x1000
    guest.call("SetEFLAGS", eax=0x200)
    assert guest.personality.virtual_if
    guest.call("SaveAndDisableIRQs")
    assert guest.cpu.get("eax") & 0x200
    assert not guest.personality.virtual_if
    guest.call("RestoreIRQs", eax=0x200)
    assert guest.personality.virtual_if
    guest.call("CLI")
    guest.call("GetEFLAGS")
    assert not guest.cpu.get("eax") & 0x200


def test_whole_tables_are_taken_over_anew() -> None:
    """UpdateGDT and UpdateIDT come after the guest's own writes."""
    guest = started("vmi-6.1")
    guest.memory.write(GDT + 0xA0, bytes.fromhex("ff000010009340 00".replace(" ", "")))
    guest.memory.write(IDT + 48, struct.pack("<HHBBH", HANDLER_6 + 1 & 0xFFFF, 0x60, 0, 0x8E, BASE + HANDLER_6 >> 16))
    guest.call("UpdateGDT")
    guest.call("UpdateIDT")
    guest.run("mov fs, eax", eax=0xA1)
    assert (guest.cpu.get("fs_base"), guest.cpu.get("fs_limit")) == (0x1000, 0xFF)
    guest.memory.write(HANDLER_6 + 1, b"\xeb\xfe")
    guest.run("ud2", limit=10)
    assert guest.cpu.get("eip") == BASE + HANDLER_6 + 1
    assert guest.cpu.get("esp") == BASE + STACK_TOP - 12


def test_reading_through_the_old_names() -> None:
    guest = started("vmi-6.1")
    guest.memory.write(DATA, struct.pack("<I", 0x12345678))
    guest.call("GetPteVal", eax=BASE + DATA)
    assert guest.cpu.get("eax") == 0x12345678
