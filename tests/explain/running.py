"""A made-up i386 kernel with a site of every family that changes at run time, and its memory after boot.

What boot and later events write is laid down here by hand, from the manuals and the kernel's
sources, and never by the code under test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.elfwriter import ElfWriter

TEXT = 0xC1000000
PHYSICAL = 0x01000000
RODATA, DATA, INIT, TABLES = TEXT + 0x4000, TEXT + 0x6000, TEXT + 0x8000, TEXT + 0xA000
END = TEXT + 0xE000
BANNER = b"Linux version 6.1.0-99-686 (made@up) (gcc 12) #1 SMP for a test\n\0"
FUNCTIONS, SIZE = 64, 64
XMM2 = 26

NOP5 = bytes.fromhex("3E8D742600")
MFENCE = bytes.fromhex("0FAEF0")

CPU_DATA, KEYS, CALL_KEY, TRACE_FUNCTION, OTHER = DATA, DATA + 0x400, DATA + 0x800, DATA + 0x804, DATA + 0x810
LIKELY, PADDED = 5, 6
"""Functions that differ: their label is taken while its key is off; their alternative's site is padding."""
FENTRY, CALLER, STUB, TRAMPOLINE, UPDATER = TEXT, TEXT + 16, TEXT + 32, TEXT + 48, TEXT + 56
FIRST = TEXT + 0x400
OFF_LOCK, OFF_LABEL, OFF_ALTERNATIVE, OFF_TARGET, OFF_POINTER = 5, 8, 13, 24, 32


def function(number: int) -> int:
    """The address of a function; its mcount call comes first."""
    return FIRST + number * SIZE


def call(opcode: int, address: int, target: int) -> bytes:
    return bytes((opcode,)) + struct.pack("<i", target - address - 5)


def text() -> bytearray:
    """The text on disk."""
    body = bytearray(b"\xcc" * 0x3000)

    def put(address: int, code: bytes) -> None:
        body[address - TEXT : address - TEXT + len(code)] = code

    put(FENTRY, b"\xc3")
    put(CALLER, b"\x60" + call(0xE8, CALLER + 1, STUB) + b"\x61\xc3")
    put(STUB, b"\xc3")
    put(TRAMPOLINE, call(0xE9, TRAMPOLINE, function(0)) + b"\x0f\xb9\xcc")
    # mov eax, key; mov edx, trampoline; mov ecx, another variable
    put(UPDATER, b"\xb8" + struct.pack("<I", CALL_KEY) + b"\xba" + struct.pack("<I", TRAMPOLINE))
    put(UPDATER + 10, b"\xb9" + struct.pack("<I", OTHER) + b"\xc3")
    for number in range(FUNCTIONS):
        at = function(number)
        put(at, call(0xE8, at, FENTRY))
        put(at + OFF_LOCK, b"\xf0\xff\x00")  # lock inc dword ptr [eax]
        put(at + OFF_LABEL, NOP5)
        put(at + OFF_ALTERNATIVE, alternative(number))
        put(at + OFF_ALTERNATIVE + 5, b"\xc3")
        put(at + OFF_TARGET, b"\x31\xc0\xc3")
        put(at + OFF_POINTER, b"\xb8" + struct.pack("<I", RODATA + number) + b"\xc3")  # mov eax, address
    return body


def alternative(number: int) -> bytes:
    """What an alternative's site holds on disk: lock add dword ptr [esp], 0; in one function single nops."""
    return b"\x90" * 5 if number == PADDED else bytes.fromhex("F083042400")


def key(number: int) -> int:
    """The static key of a function's label."""
    return KEYS + 8 * number


def pointers() -> list[int]:
    """The fields of the text that KASLR moves."""
    return [UPDATER + 1, UPDATER + 6, UPDATER + 11, *(function(n) + OFF_POINTER + 1 for n in range(FUNCTIONS))]


def build(folder: Path) -> Path:
    """The kernel's ELF, with the relocation table behind it as in a bzImage's payload."""
    rodata = BANNER.ljust(0x100, b"\0")
    labels, mcount, locks, alternatives = b"", b"", b"", b""
    label_at = RODATA + 0x100
    for n in range(FUNCTIONS):
        site = function(n) + OFF_LABEL
        where = label_at + 12 * n
        labels += struct.pack(
            "<iii", site - where, function(n) + OFF_TARGET - where - 4, key(n) - where - 8 + (n == LIKELY)
        )
        mcount += struct.pack("<I", function(n))
        locks += struct.pack("<i", function(n) + OFF_LOCK - (TABLES + 0x1000 + 4 * n))
        where = TABLES + 12 * n
        site = function(n) + OFF_ALTERNATIVE
        alternatives += struct.pack("<iiHBB", site - where, TABLES + 0x2000 - where - 4, XMM2, 5, 3)
    data = bytearray(0x1000)
    struct.pack_into("<II", data, CALL_KEY - DATA, function(0), STUB)
    notes = struct.pack("<III4s20s", 4, 20, 3, b"GNU\0", bytes(range(20)))
    exports = struct.pack("<II", CPU_DATA, TABLES + 0x3100)
    elf = ElfWriter(bits=32, entry=TEXT)
    elf.section(".text", bytes(text()), address=TEXT, flags="ax", align=4096)
    elf.section(".rodata", rodata + labels, address=RODATA, flags="aw", align=4096)
    elf.section(".notes", notes, address=RODATA + 0x1000, flags="a", type="note", align=4)
    elf.section(".data", bytes(data), address=DATA, flags="aw", align=4096)
    elf.section(".init.data", mcount, address=INIT, flags="aw", align=4096)
    elf.section(".altinstructions", alternatives, address=TABLES, flags="a", align=4096)
    elf.section(".smp_locks", locks, address=TABLES + 0x1000, flags="a", align=4096)
    elf.section(".altinstr_replacement", MFENCE, address=TABLES + 0x2000, flags="ax", align=4096)
    elf.section("__ksymtab", exports, address=TABLES + 0x3000, flags="a", align=4)
    elf.section("__ksymtab_strings", b"boot_cpu_data\0", address=TABLES + 0x3100, flags="a", align=4)
    for name, address in (("_text", TEXT), ("__fentry__", FENTRY), ("ftrace_caller", CALLER), ("ftrace_stub", STUB)):
        elf.symbol(name, address, ".text", size=16)
    elf.symbol("ftrace_call", CALLER + 1, ".text", size=5)
    elf.symbol("_etext", TEXT + 0x3000, ".text")
    for n in range(FUNCTIONS):
        elf.symbol(f"f{n}", function(n), ".text", size=SIZE)
    path = folder / "vmlinux"
    path.write_bytes(elf.build() + struct.pack(f"<{len(pointers()) + 1}I", 0, *pointers()))
    return path


def cpu_data(features: tuple[int, ...] = (XMM2,)) -> bytes:
    """struct cpuinfo_x86 of 6.1, as far as x86_vendor_id."""
    words = [1] + [0] * 23
    for feature in features:
        words[feature >> 5] |= 1 << (feature & 31)
    head = bytes((6, 0, 15, 11)) + bytes(20) + struct.pack("<Ii", 0x80000008, 10)
    return head + struct.pack("<24I", *words) + b"GenuineIntel".ljust(16, b"\0")


@dataclass
class Machine:
    """Physical memory from PHYSICAL on, after a boot on one CPU with XMM2; static key 3 is on."""

    slide: int = 0
    one_cpu: bool = True
    features: tuple[int, ...] = (XMM2,)
    bytes: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.bytes = bytearray(END - TEXT + 0x8000)
        body = text()
        for field_at in pointers():
            value = int.from_bytes(body[field_at - TEXT : field_at - TEXT + 4], "little")
            struct.pack_into("<I", body, field_at - TEXT, value + self.slide)
        self.put(TEXT, bytes(body))
        self.put(RODATA, BANNER)
        self.put(RODATA + 0x1000, struct.pack("<III4s20s", 4, 20, 3, b"GNU\0", bytes(range(20))))
        self.put(CPU_DATA, cpu_data(self.features))
        self.put(CALL_KEY, struct.pack("<II", function(0) + self.slide, STUB + self.slide))
        for n in range(FUNCTIONS):
            at = function(n)
            self.put(at, NOP5)
            if self.one_cpu:
                self.put(at + OFF_LOCK, b"\x3e")
            if XMM2 in self.features:
                self.put(at + OFF_ALTERNATIVE, MFENCE + b"\x89\xf6")
            elif n == PADDED:
                self.put(at + OFF_ALTERNATIVE, NOP5)
        self.switch(3, True)
        self.switch(LIKELY, True)

    def put(self, address: int, code: bytes) -> None:
        self.bytes[address - TEXT : address - TEXT + len(code)] = code

    def get(self, address: int, length: int) -> bytes:
        return bytes(self.bytes[address - TEXT : address - TEXT + length])

    def switch(self, number: int, on: bool) -> None:
        """Turn a static key, with its branch."""
        taken = on != (number == LIKELY)
        self.put(key(number), struct.pack("<i", on))
        site = function(number) + OFF_LABEL
        self.put(site, call(0xE9, site, function(number) + OFF_TARGET) if taken else NOP5)

    def text(self) -> bytes:
        return self.get(TEXT, 0x3000)
