"""A small made-up vmlinux with all three table families, for `./dev try` where no package archive answers.

Imports the ELF writer of the tests. As a command: `python -m tests.real.synthetic FILE`.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

# tests/ is no package: pytest finds elfwriter by the same path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from elfwriter import ElfWriter

TEXT = 0xC1000000
RODATA = TEXT + 0x10000
DATA = TEXT + 0x20000
TABLES = TEXT + 0x30000
REPLACEMENTS = TEXT + 0x40000
BANNER = b"Linux version 6.1.0-0-686 (vmipatch@example) (gcc 12) #1 SMP synthesised example\n\0"
FUNCTIONS = 40
MEMBERS = ("io_delay", "flush_tlb_local", "flush_tlb_global", "flush_tlb_one_user")
"""What the first slots of pv_ops hold (asm/paravirt_types.h of 6.1), without `native_`."""
SLOT = 3
XMM = 0 * 32 + 25


def build() -> bytes:
    """Forty functions, each with a paravirt call, an alternative and a lock prefix, and the native functions."""
    text = bytearray(b"\xc3" * len(MEMBERS) + b"\x0f\x0b\xc3").ljust(16, b"\xcc")
    paravirt, alternatives, locks, replacements = b"", b"", b"", b""
    for _ in range(FUNCTIONS):
        start = TEXT + len(text)
        call = b"\xff\x15" + struct.pack("<I", DATA + 4 * SLOT)
        barrier = b"\xf0\x83\x04\x24\x00"  # lock add dword ptr [esp], 0
        lock = b"\xf0\xff\x00"  # lock inc dword ptr [eax]
        body = b"\x55" + call + barrier + lock + b"\x5d\xc3"
        paravirt += struct.pack("<IBBxx", start + 1, SLOT, len(call))
        where, new = TABLES + 0x1000 + len(alternatives), REPLACEMENTS + len(replacements)
        site = start + 1 + len(call)
        alternatives += struct.pack("<iiHBB", site - where, new - where - 4, XMM, len(barrier), 3)
        replacements += b"\x0f\xae\xf8"  # sfence
        where = TABLES + 0x2000 + len(locks)
        locks += struct.pack("<i", start + 1 + len(call) + len(barrier) - where)
        text += body.ljust(32, b"\x90")
    names = b"pv_ops\0"
    strings, exports = TABLES + 0x4000, TABLES + 0x3000
    export = struct.pack("<iii", DATA - exports, strings - exports - 4, strings + 6 - exports - 8)
    elf = ElfWriter(bits=32, entry=TEXT)
    elf.section(".text", bytes(text), address=TEXT, flags="ax", align=4096)
    elf.section(".rodata", BANNER, address=RODATA, flags="a", align=4096)
    elf.section(
        ".data",
        struct.pack("<16I", *[TEXT + i for i in range(len(MEMBERS))], *[0] * 12),
        address=DATA,
        flags="aw",
        align=4096,
    )
    elf.section(".parainstructions", paravirt, address=TABLES, flags="a", align=4096)
    elf.section(".altinstructions", alternatives, address=TABLES + 0x1000, flags="a", align=4096)
    elf.section(".smp_locks", locks, address=TABLES + 0x2000, flags="a", align=4096)
    elf.section("__ksymtab", export, address=exports, flags="a", align=4096)
    elf.section("__ksymtab_strings", names, address=strings, flags="a", align=4096)
    elf.section(".altinstr_replacement", replacements, address=REPLACEMENTS, flags="ax", align=4096)
    for i, name in enumerate(MEMBERS):
        elf.symbol(f"native_{name}", TEXT + i, ".text", size=1)
    elf.symbol("paravirt_BUG", TEXT + len(MEMBERS), ".text", size=2)
    elf.symbol("_paravirt_nop", TEXT + len(MEMBERS) + 2, ".text", size=1)
    return elf.build()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(build())
