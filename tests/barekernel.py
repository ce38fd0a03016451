"""An i386 kernel of 2.6.21 to 2.6.38, as bare memory (as the bzImages up to 2.6.25 hold it) or as an ELF file.

Parts in the order of arch/i386/kernel/vmlinux.lds.S (2.6.21) and arch/x86/kernel/vmlinux_32.lds.S (2.6.24); symbols of
the code alone, as scripts/kallsyms.c leaves them without CONFIG_KALLSYMS_ALL; exports as include/linux/module.h makes
them; behind it the table of arch/i386/boot/compressed/relocs.c where the kernel is relocatable.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from tests.annotate.paravirt_words import Words
from tests.elfwriter import ElfWriter
from tests.image.bzimage_writer import bzimage, compress
from tests.image.kallsyms_writer import build

LOCK = bytes.fromhex("F00FB10B")
WRMSR = bytes.fromhex("0FAEF0")
SITES, LOCKS, ALTERNATIVES, EXCEPTIONS = 24, 30, 20, 60
# Numbers of include/asm-i386/paravirt.h of 2.6.21 (PARAVIRT_*), where a type is no place in a structure.
OLD_TYPES = {0: "irq_disable", 1: "irq_enable", 2: "restore_flags", 3: "save_flags"}
NOP = "native_nop"
_EXPORTED = ("printk", "schedule", "boot_cpu_data", "jiffies", "__alloc_pages", "kfree", "sprintf", "strlen", "memcpy")


@dataclass
class Bare:
    """The memory and what is known of it: sites by family as (address, length), the op of each paravirt site."""

    base: int
    memory: bytes = b""
    tail: bytes = b""
    sites: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    ops: list[str] = field(default_factory=list)
    fields: list[int] = field(default_factory=list)
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of each part."""
    symbols: range = range(0)
    """The virtual addresses of kallsyms."""

    def bzimage(self) -> bytes:
        """A bzImage of protocol 2.06, whose header does not say where its payload is."""
        return bzimage(compress(self.memory + self.tail, "gzip"), protocol=0x206, declared=False)

    def elf(self) -> bytes:
        """An ELF file without symbol table, as the bzImages from 2.6.26 on hold it."""
        elf = ElfWriter(bits=32)
        for name, (at, size) in self.parts.items():
            flags = "ax" if "text" in name or "replacement" in name else "aw" if "data" in name else "a"
            elf.section(name, self.memory[at : at + size], address=self.base + at, flags=flags, align=4)
        return elf.build()


def bare(
    release: str,
    words: Words | None,
    *,
    base: int = 0xC0100000,
    relocatable: bool = True,
    exports: bool = True,
    smp: bool = True,
    seed: int = 0,
) -> Bare:
    """A kernel of a release whose paravirt objects are laid out as ``words`` say (None: 2.6.21, without slots)."""
    dice = random.Random(seed)
    made = Bare(base)
    out = bytearray()
    pointers: list[tuple[int, int]] = []

    def part(name: str, data: bytes, align: int = 4) -> int:
        out.extend(bytes(-len(out) % align))
        made.parts[name] = len(out), len(data)
        out.extend(data)
        return base + len(out) - len(data)

    # Places first: the data stands behind the code that names it.
    members = dict(words.numbers) if words else {}
    objects = words.sizes if words else {"paravirt_ops": 40}
    version = tuple(map(int, release.split(".")))
    functions = [NOP, *dict.fromkeys(f"native_{m}" for m in members.values())]
    text, data_at, init, size = base + 0x400, base + 0x20000, base + 0x30000, 0x8000
    symbols = [(text, "T", "_stext"), (base + size, "A", "_etext"), (init, "T", "_sinittext")]
    symbols += [(init + 0x2000, "A", "_einittext")]
    code = bytearray(b"\x90" * (size - 0x400))
    late = bytearray(b"\x90" * 0x2000)
    at = {}
    for number, name in enumerate(functions):
        at[name] = text + 0x6000 + 16 * number
        code[0x6000 + 16 * number] = 0xC3
        symbols.append((at[name], "t", name))
    for number, name in enumerate(("apply_paravirt", "apply_alternatives", "alternatives_smp_module_add")):
        if smp or "smp" not in name:
            symbols.append((text + 0x5000 + 0x80 * number, "T", name))
    symbols += [(text + 16 * n, "t", f"filler_{n}") for n in range(0x100, 0x400)]
    symbols += [(init + 16 * n, "t", f"setup_{n}") for n in range(1, 0x100)]
    place = {name: data_at + sum(list(objects.values())[:n]) * 4 + 0x40 * n for n, name in enumerate(objects)}
    order = [(name, i) for name, length in objects.items() for i in range(length)]

    def site(number: int, body: bytes) -> int:
        """Every third stands in code that goes after boot."""
        where, start = (late, init) if number % 3 == 2 else (code, text)
        offset = 0x40 + 24 * len(made.sites.get(family, ())) + 0x800 * families.index(family)
        where[offset : offset + len(body)] = body
        made.sites.setdefault(family, []).append((start + offset, len(body)))
        return start + offset

    families = ("parainstructions", "smp_locks", "altinstructions")
    family = "parainstructions"
    paravirt = b""
    kinds = [n for n, m in members.items() if m not in ("name",)] if words else list(OLD_TYPES)
    for number in range(SITES):
        kind = kinds[number % len(kinds)]
        name, member = order[kind] if words else ("paravirt_ops", 20 + kind)
        slot = place[name] + 4 * member
        saved = number % 2
        body = b"\x51\x52" * saved + b"\xff\x15" + struct.pack("<I", slot) + b"\x5a\x59" * saved
        address = site(number, body)
        pointers.append((address + 2 + 2 * saved, slot))
        paravirt += struct.pack("<IBBH", address, kind, len(body), 0x0F)
        made.ops.append(f"{name}.{members[kind]}" if words else OLD_TYPES[kind])
    family = "smp_locks"
    locks = [site(number, LOCK) for number in range(LOCKS)] if smp else []
    made.sites["smp_locks"] = [(address, 1) for address in locks]
    family = "altinstructions"
    alternatives = [site(number, b"\x89\xc0\x89\xc9\x90\x90") for number in range(ALTERNATIVES)]

    part(".text.head", dice.randbytes(0x400))
    part(".text", bytes(code))
    ex = b"".join(struct.pack("<II", text + 0x4000 + 8 * n, text + 0x4800 + 8 * n) for n in range(EXCEPTIONS))
    part("__ex_table", ex, 16)
    rows = sorted(symbols, key=lambda row: row[0])
    banner = f"Linux version {release} (builder@example) (gcc version 4.1.2) #1 Sun Feb 4 2007\n\0".encode()
    table = build(rows, bits=32, addresses="absolute", era="2.6")
    start = part(".rodata", banner.ljust(0x100, b"\0") + table, 0x1000) + 0x100
    made.symbols = range(start, start + len(table))
    if exports:
        names = [*_EXPORTED, *objects]
        values = {**{n: text + 0x7000 + 16 * i for i, n in enumerate(_EXPORTED)}, **place}
        first = base + len(out) + -len(out) % 4
        strings = first + 8 * len(names)
        starts, blob = [], b""
        for name in names:
            starts.append(strings + len(blob))
            # gcc aligns what is 32 bytes and longer; between any two there may be zeros.
            blob += name.encode() + bytes(1 + len(name) % 3)
        part("__ksymtab", b"".join(struct.pack("<II", values[n], s) for n, s in zip(names, starts, strict=True)))
        for n, name in enumerate(names):
            pointers += [(first + 8 * n, values[name]), (first + 8 * n + 4, starts[n])]
        part("__ksymtab_strings", blob, 1)
    assert len(out) <= data_at - base
    data = bytearray()
    for name, length in objects.items():
        numbers = [n for n, (owner, _) in enumerate(order) if owner == name]
        for i, number in zip(range(length), numbers, strict=True):
            function = at.get(f"native_{members[number]}", 0) if number in members else at[NOP]
            if name == "paravirt_ops" and words and i < 3:
                function = 0
            elif name == "paravirt_ops" and words and i == 3:
                function = base + made.parts[".rodata"][0]
            if function:
                pointers.append((data_at + len(data), function))
            data += struct.pack("<I", function)
        data += dice.randbytes(0x40)
    part(".data", bytes(data).ljust(0x8000, b"\0"), 0x20000)
    if smp:
        # 2.6.21 to 2.6.25 do not fill the table's last page: what follows is aligned to one.
        start = base + len(out) + -len(out) % 0x1000
        relative = version >= (2, 6, 34)
        rows_of = [struct.pack("<i", lock - start - 4 * n) for n, lock in enumerate(locks)]
        if not relative:
            rows_of = [struct.pack("<I", lock) for lock in locks]
        part(".smp_locks", b"".join(rows_of), 0x1000)
        if not relative:
            pointers += [(start + 4 * n, lock) for n, lock in enumerate(locks)]
    part(".init.text", bytes(late), 0x10000)
    # A table of functions, which looks like tables of sites: 0xC10303xx is a site of 3 bytes with 3 to replace them.
    calls = b"".join(struct.pack("<I", init + 16 * n) for n in range(1, 0x100))
    part(".init.data", dice.randbytes(0x400) + calls)
    start = base + len(out)
    # The last entry lacks its padding, as in real kernels: ".altinstructions" of 12n - 1 bytes.
    missing = version < (2, 6, 36)
    replacements = start + 12 * ALTERNATIVES - missing
    form = "<IIHBB" if version >= (2, 6, 36) else "<IIBBBx"
    rows_of = [struct.pack(form, address, replacements + 3 * n, 26, 6, 3) for n, address in enumerate(alternatives)]
    part(".altinstructions", b"".join(rows_of)[: 12 * ALTERNATIVES - missing])
    for n, address in enumerate(alternatives):
        pointers += [(start + 12 * n, address), (start + 12 * n + 4, replacements + 3 * n)]
    part(".altinstr_replacement", WRMSR * ALTERNATIVES, 1)
    start = part(".parainstructions", paravirt)
    pointers += [(start + 8 * n, address) for n, (address, _) in enumerate(made.sites["parainstructions"])]
    part(".exit.text", b"\x90" * 0x100)
    part(".data.percpu", bytes(0x800), 0x1000)
    for address, value in pointers:
        struct.pack_into("<I", out, address - base, value)
    made.memory = bytes(out)
    made.fields = sorted(address for address, _ in pointers)
    if relocatable:
        made.tail = struct.pack(f"<{len(made.fields) + 1}I", 0, *made.fields)
    return made
