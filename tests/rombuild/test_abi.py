"""The ABI files against the published tables, typed in here from their sources."""

# ruff: noqa: SIM905 (tables of names read better as text)
from __future__ import annotations

import pytest

from vmipatch.errors import UsageError
from vmipatch.isa.assemble import assemble
from vmipatch.rombuild import abi

# Linux 2.6.32 asm/vmi.h, with the port calls of the mid-2006 header that mainline leaves unnamed (49 to 60).
V30 = """CPUID WRMSR RDMSR SetGDT SetLDT SetIDT SetTR GetGDT GetLDT GetIDT GetTR WriteGDTEntry WriteLDTEntry
WriteIDTEntry UpdateKernelStack SetCR0 SetCR2 SetCR3 SetCR4 GetCR0 GetCR2 GetCR3 GetCR4 WBINVD SetDR GetDR RDPMC RDTSC
CLTS EnableInterrupts DisableInterrupts GetInterruptMask SetInterruptMask IRET SYSEXIT Halt Reboot Shutdown SetPxE
SetPxELong UpdatePxE UpdatePxELong MachineToPhysical PhysicalToMachine AllocatePage ReleasePage InvalPage FlushTLB
SetLinearMapping IN INB INW INS INSB INSW OUT OUTB OUTW OUTS OUTSB OUTSW SetIOPLMask SetInitialAPState APICWrite
APICRead IODelay GetCycleFrequency GetCycleCounter SetAlarm CancelAlarm GetWallclockTime WallclockUpdated SetCallbacks
SetLazyMode""".split()
# The patch series of 13 March 2006, interface definition.
V130 = """Init CPUID WRMSR RDMSR SetGDT SetLDT SetIDT SetTR GetGDT GetLDT GetIDT GetTR WriteGDTEntry WriteLDTEntry
WriteIDTEntry UpdateKernelStack SetCR0 SetCR2 SetCR3 SetCR4 GetCR0 GetCR2 GetCR3 GetCR4 INVD WBINVD SetDR GetDR RDPMC
RDTSC CLTS EnableInterrupts DisableInterrupts GetInterruptMask SetInterruptMask IRET SYSEXIT Pause Halt Reboot Shutdown
SetPxE GetPxE SwapPxE SetPxELong GetPxELong SwapPxELongAtomic TestAndSetPxEBit TestAndClearPxEBit AllocatePage
ReleasePage InvalPage FlushTLB FlushDeferredCalls SetLinearMapping IN INB INW INS INSB INSW OUT OUTB OUTW OUTS OUTSB
OUTSW SetIOPLMask DeactivatePxELongAtomic TestAndSetPxELongBit TestAndClearPxELongBit SetInitialAPState APICWrite
APICRead IODelay GetCycleFrequency GetCycleCounter SetAlarm CancelAlarm GetWallclockTime WallclockUpdated""".split()
# The afterburner's older headers.
V61 = """Init CPUID WRMSR RDMSR SetGDT SetIDT SetLDT SetTR GetGDT GetIDT GetLDT GetTR UpdateGDT UpdateIDT UpdateLDT
UpdateKernelStack SetCR0 SetCR2 SetCR3 SetCR4 GetCR0 GetCR2 GetCR3 GetCR4 LMSW SMSW CLTS STTS SetDR GetDR RDPMC RDTSC
INVD WBINVD INB INW INL OUTB OUTW OUTL INSB INSW INSL OUTSB OUTSW OUTSL SetIOPLMask GetIOPLMask UpdateIOBitmap
UpdateInterruptBitmap SetEFLAGS GetEFLAGS SaveAndDisableIRQs RestoreIRQs STI CLI IRET IRET16 SysExit StiSysexit SysRet
SafeHalt Halt Pause Shutdown Reboot GetPteVal GetPdeVal SetPte SwapPte TestAndSetPteBit TestAndClearPteBit SetPteLong
SwapPteLong TestAndSetPteLongBit TestAndClearPteLongBit ClonePageTable ClonePageDirectory RegisterPageMapping
RegisterPageUsage ReleasePage InvalPage FlushTLB FlushTLBAll SetDeferredMode FlushDeferredCalls PhysToMachine
MachineToPhys""".split()
L4KA = [*V130, "PhysToMachine", "MachineToPhys", "PhysIsCoherent"]
SANOS = [
    *({"SetPxE": "SetPxE0", "SetPxELong": "SetPxELong0"}.get(n, n) for n in V130),
    "GetRelocationInfo",
    "SetPxE",
    "SetPxELong",
]

# Native bytes: the table of section 2.2 of the ABI notes, assembled there with GNU as.
NATIVE = {
    "CPUID": "0FA2", "WRMSR": "0F30", "RDMSR": "0F32", "RDPMC": "0F33", "RDTSC": "0F31", "SetGDT": "0F0110",
    "SetIDT": "0F0118", "GetGDT": "0F0100", "GetIDT": "0F0108", "SetLDT": "0F00D0", "SetTR": "0F00D8",
    "GetLDT": "0F00C0", "GetTR": "0F00C8", "SetCR0": "0F22C0", "SetCR2": "0F22D0", "SetCR3": "0F22D8",
    "SetCR4": "0F22E0", "GetCR0": "0F20C0", "GetCR2": "0F20D0", "GetCR3": "0F20D8", "GetCR4": "0F20E0",
    "WBINVD": "0F09", "CLTS": "0F06", "EnableInterrupts": "FB", "DisableInterrupts": "FA", "GetInterruptMask": "9C58",
    "SetInterruptMask": "509D", "IRET": "CF", "SYSEXIT": "FB0F35", "Halt": "FBF4", "SetPxE": "8902",
    "SetPxELong": "8951048901", "InvalPage": "0F0138", "IN": "ED", "INB": "EC", "INW": "66ED", "OUT": "EF",
    "OUTB": "EE", "OUTW": "66EF", "INS": "F36D", "INSB": "F36C", "INSW": "66F36D", "OUTS": "F36F", "OUTSB": "F36E",
    "OUTSW": "66F36F", "SetIOPLMask": "9C812424FFCFFFFF0904249D", "IODelay": "E680", "GetCycleFrequency": "31C031D2",
    "Shutdown": "FAF4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "calls"),
    [
        ("vmi-3.0", 0, V30),
        ("vmi-13.0", 4, V130),
        ("vmi-6.1", 4, V61),
        ("vmi-13.0-l4ka", 4, L4KA),
        ("vmi-13.3", 4, SANOS),
    ],
)
def test_numbers(name: str, first: int, calls: list[str]) -> None:
    spec = abi.load(name)
    assert spec.numbers == dict(enumerate(calls, first))
    assert spec.count == first + len(calls)


def test_totals() -> None:
    assert (len(V30), len(V130) + 4, len(V61) + 4) == (74, 85, 92)


@pytest.mark.parametrize("name", list(NATIVE))
def test_native_bytes(name: str) -> None:
    call = abi.load("vmi-3.0").calls[name]
    wanted = bytes.fromhex(NATIVE[name])
    assert call.native == wanted
    assert call.asm is not None
    assert assemble(call.asm).code.startswith(wanted)


@pytest.mark.parametrize("name", abi.names())
def test_interrupt_calls_keep_every_register(name: str) -> None:
    kept = [c for c in abi.load(name).calls.values() if c.keep_all]
    assert len(kept) == (6 if name == "vmi-6.1" else 4)
    for call in kept:
        assert call.may_change <= {"eax", "flags"}
        assert ("eax" in call.may_change) == ("eax" in call.results)


def test_header_layout() -> None:
    """struct vrom_header of Linux 2.6.32, offsets counted from its members."""
    header = abi.load("vmi-3.0").header
    assert {name: offset for name, (offset, _) in header.items()} == {
        "rom_sig": 0, "rom_len": 2, "rom_entry": 3, "pad0": 7, "vrom_sig": 8, "api_min": 12, "api_maj": 13,
        "jump_slots": 14, "reserved1": 15, "virtual_top": 16, "reserved2": 20, "license_off": 22, "pci_off": 24,
        "pnp_off": 26, "pad3": 28, "reserved": 32,
    }  # fmt: skip
    for name in abi.names():
        end = 0
        for offset, size in abi.load(name).header.values():
            assert offset == end
            end = offset + size
        assert end == 0x80


def test_versions() -> None:
    assert {n: (abi.load(n).major, abi.load(n).minor) for n in abi.names()} == {
        "vmi-3.0": (3, 0), "vmi-13.0": (13, 0), "vmi-13.0-l4ka": (13, 0), "vmi-13.3": (13, 3), "vmi-6.1": (6, 1),
    }  # fmt: skip
    assert abi.by_version(13, 3) == ("vmi-13.3",)
    assert abi.by_version(7, 0) == ()
    with pytest.raises(UsageError, match=r"vmi-3\.0"):
        abi.require("vmi-4.0")
