"""Small kernels of known content: sites, replacements and tables of any layout, made with struct alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.elfwriter import ElfWriter

TEXT, REPLACEMENTS, DATA, TABLES = 0xC1000000, 0xC1080000, 0xC1100000, 0xC1200000
HIGH = 0xFFFFFFFF_00000000  # added for 64-bit kernels: addresses of the last 2 GiB

ALTERNATIVE = {
    "abs32-u8": "<IIBBBx", "abs32-u16": "<IIHBB", "abs64-u8": "<QQBBB5x", "abs64-u16": "<QQHBB4x",
    "rel12": "<iiHBB", "rel13": "<iiHBBB", "rel14": "<iiHHBB",
}  # fmt: skip

_TLB_OPS = (
    "flush_tlb_user",
    "flush_tlb_kernel",
    "flush_tlb_one_user",
    "flush_tlb_multi",
    "tlb_remove_table",
    "exit_mmap",
)
PV_OPS = {
    (4, 20): ("patch", "sched_clock", "steal_clock", "io_delay", *_TLB_OPS),
    (5, 13): ("io_delay", *_TLB_OPS),
}
"""How pv_ops of 32-bit kernels begins, by the release that it begins with: struct paravirt_patch_template of
asm/paravirt_types.h in 4.20, 5.10, 5.13 and 6.1 (what is flush_tlb_multi here has other names before 5.13)."""
_BEHIND = 12
"""Empty words behind those members, where the others are."""
TLB = {"flush_tlb_user": "flush_tlb_local", "flush_tlb_kernel": "flush_tlb_global",
       "flush_tlb_one_user": "flush_tlb_one_user", "io_delay": "io_delay"}  # fmt: skip
"""Members of pv_ops, and the functions that they hold on bare hardware, without `native_`."""


def wrapped(value: int) -> int:
    """As a signed 32-bit number."""
    return ((value + 2**31) & 0xFFFFFFFF) - 2**31


@dataclass
class KernelMaker:
    """One kernel in the making; every method gives the virtual address of what it added."""

    bits: int = 32
    release: str = "6.1.0"
    text: bytearray = field(default_factory=bytearray)
    replacements: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)
    rodata: bytes = b""  # behind the banner
    symbols: list[tuple[str, int, str]] = field(default_factory=list)
    tables: list[tuple[str, bytes, int]] = field(default_factory=list)

    @property
    def high(self) -> int:
        return HIGH if self.bits == 64 else 0

    def code(self, code: bytes, name: str | None = None) -> int:
        address = TEXT + self.high + len(self.text)
        self.text += code
        if name is not None:
            self.symbols.append((name, address, ".text"))
        return address

    def replacement(self, code: bytes) -> int:
        address = REPLACEMENTS + self.high + len(self.replacements)
        self.replacements += code
        return address

    def word(self, value: int, name: str | None = None) -> int:
        address = DATA + self.high + len(self.data)
        self.data += value.to_bytes(self.bits // 8, "little")
        if name is not None:
            self.symbols.append((name, address, ".data"))
        return address

    def table(self, name: str, data: bytes) -> int:
        address = TABLES + self.high + 0x10000 * len(self.tables)
        self.tables.append((name, data, address))
        return address

    def next_table(self) -> int:
        """Where the next table will be, for fields that count from themselves."""
        return TABLES + self.high + 0x10000 * len(self.tables)

    def alternatives(self, layout: str, rows: list[tuple[int, int, int, int, int, dict[str, int]]]) -> int:
        """Rows: site, replacement, feature, site length, replacement length, and ``pad`` or ``flags``."""
        at, out = self.next_table(), b""
        for site, replacement, feature, length, size, more in rows:
            here = at + len(out)
            where = (site, replacement)
            if layout.startswith("rel"):
                where = (wrapped(site - here), wrapped(replacement - here - 4))
            if layout == "rel13":
                out += struct.pack(ALTERNATIVE[layout], *where, feature, length, size, more.get("pad", 0))
            elif layout == "rel14":
                out += struct.pack(ALTERNATIVE[layout], *where, feature, more.get("flags", 0), length, size)
            else:
                out += struct.pack(ALTERNATIVE[layout], *where, feature, length, size)
        return self.table(".altinstructions", out)

    def locks(self, layout: str, sites: list[int]) -> int:
        at = self.next_table()
        if layout == "rel32":
            rows = [struct.pack("<i", wrapped(site - at - 4 * i) if site else 0) for i, site in enumerate(sites)]
        else:
            rows = [struct.pack("<I" if layout == "abs32" else "<Q", site) for site in sites]
        return self.table(".smp_locks", b"".join(rows))

    def paravirt(self, rows: list[tuple[int, int, int, int]]) -> int:
        """Rows: site, type, length, clobbers."""
        form = "<IBBH" if self.bits == 32 else "<QBBH4x"
        return self.table(".parainstructions", b"".join(struct.pack(form, *row) for row in rows))

    def pv_ops(self, **held: int) -> dict[str, int]:
        """The object that 4.20 and later have, in the layout without PARAVIRT_XXL: the slots' addresses by member.

        Members of ``held`` hold these; functions that flush TLBs are in theirs, which proves the layout.
        """
        fields = PV_OPS[max(since for since in PV_OPS if since <= tuple(map(int, self.release.split(".")))[:2])]
        own = {
            name: self.code(b"\xc3", f"native_{function}")
            for name, function in TLB.items()
            if name in fields and name not in held
        }
        places = [self.word({**own, **held}.get(name, 0)) for name in fields]
        for _ in range(_BEHIND):
            self.word(0)
        self.symbols.append(("pv_ops", places[0], ".data"))
        return dict(zip(fields, places, strict=True))

    def build(self) -> bytes:
        elf = ElfWriter(bits=self.bits)
        high = self.high
        banner = f"Linux version {self.release} (root@build) (gcc version 9) #1 SMP 2020\n\0".encode()
        elf.section(".text", bytes(self.text) or b"\x90", address=TEXT + high, flags="ax")
        if self.replacements:
            elf.section(".altinstr_replacement", bytes(self.replacements), address=REPLACEMENTS + high, flags="ax")
        elf.section(".rodata", banner + self.rodata, address=DATA + high - 0x1000, flags="a")
        elf.section(".data", bytes(self.data) or bytes(16), address=DATA + high, flags="aw")
        for name, data, address in self.tables:
            elf.section(name, data, address=address, flags="aw")
        elf.symbol("_text", TEXT + high, ".text")
        elf.symbol("_etext", TEXT + high + len(self.text), ".text")
        for name, address, section in self.symbols:
            elf.symbol(name, address, section, type="func" if section == ".text" else "object")
        return elf.build()
