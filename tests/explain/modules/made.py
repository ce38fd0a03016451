"""A made-up x86-64 kernel of 6.12 with loaded modules: its image, its types, the modules' files, its memory.

What the loader and the patcher leave in memory is laid down here by hand, from the kernel's sources and the manuals,
and never by the code under test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.elfwriter import R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, ElfWriter
from vmipatch.explain import engine
from vmipatch.explain.modules.btf import Types
from vmipatch.explain.modules.view import View
from vmipatch.explain.running import Running
from vmipatch.image import Image, open_image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import Boot
from vmipatch.patch.rules import choose
from vmipatch.patch.target import Native

R_X86_64_PC64 = 24
TEXT, DATA, BTF_AT, EXPORTS = 0xFFFFFFFF81000000, 0xFFFFFFFF82000000, 0xFFFFFFFF82100000, 0xFFFFFFFF82200000
FENTRY, PRINTK, THUNK = TEXT + 0x40, TEXT + 0x80, TEXT + 0xC0
HEAD = DATA + 0x100
AREA, SLAB = 0xFFFFFFFFC0000000, 0xFFFF888000100000
PITCH = 0x10000
"""Between the memory of two modules: text, data at +0x4000, read-only data at +0x8000."""
NOP5 = bytes.fromhex("0F1F440000")
RET5 = bytes.fromhex("C3CCCCCCCC")

STATE, LIST, NAME, MEM, SECT_ATTRS, PERCPU, TAINTS, SRCVERSION = 0, 8, 24, 0x50, 0x100, 0x108, 0x110, 0x118
MODULE_SIZE = 0x140
BUILD_ID = bytes(range(20))


def btf() -> bytes:
    """Types of the made-up kernel: struct module as its loader has it."""
    types = BtfWriter()
    integer = types.integer("unsigned int", 4)
    char = types.integer("char", 1)
    pointer = types.pointer(0)
    node = types.structure("list_head", 16, [("next", pointer, 0), ("prev", pointer, 8)])
    memory = types.structure("module_memory", 16, [("base", pointer, 0), ("size", integer, 8)])
    members = [
        ("state", integer, STATE), ("list", node, LIST), ("name", types.array(char, integer, 56), NAME),
        ("mem", types.array(memory, integer, 7), MEM), ("sect_attrs", pointer, SECT_ATTRS),
        ("percpu", pointer, PERCPU), ("taints", pointer, TAINTS), ("srcversion", pointer, SRCVERSION),
    ]  # fmt: skip
    types.structure("module", MODULE_SIZE, members)
    return types.build()


class BtfWriter:
    """Types in the order of their numbers (include/uapi/linux/btf.h)."""

    def __init__(self) -> None:
        self._types = bytearray()
        self._strings = bytearray(b"\0")
        self._count = 0

    def _name(self, name: str) -> int:
        if not name:
            return 0
        at = len(self._strings)
        self._strings += name.encode() + b"\0"
        return at

    def add(self, name: str, kind: int, size: int, extra: bytes = b"", elements: int = 0, flag: bool = False) -> int:
        """A type of any kind; its number."""
        self._types += struct.pack("<III", self._name(name), flag << 31 | kind << 24 | elements, size) + extra
        self._count += 1
        return self._count

    def integer(self, name: str, size: int, bits: int | None = None, offset: int = 0) -> int:
        """BTF_KIND_INT; ``bits`` at ``offset`` bits where it is narrower than its bytes."""
        return self.add(name, 1, size, struct.pack("<I", offset << 16 | (8 * size if bits is None else bits)))

    def pointer(self, to: int) -> int:
        """BTF_KIND_PTR."""
        return self.add("", 2, to)

    def array(self, element: int, index: int, count: int) -> int:
        """BTF_KIND_ARRAY."""
        return self.add("", 3, 0, struct.pack("<III", element, index, count))

    def structure(
        self, name: str, size: int, members: list[tuple[str, int, int]], *, union: bool = False, bits: bool = False
    ) -> int:
        """BTF_KIND_STRUCT or UNION: name, type and place of each member, in bytes; with ``bits`` as it is encoded."""
        rows = [(self._name(n), t, at if bits else 8 * at) for n, t, at in members]
        return self.add(name, 5 if union else 4, size, b"".join(struct.pack("<III", *r) for r in rows), len(rows), bits)

    def enum(self, name: str, values: dict[str, int]) -> int:
        """BTF_KIND_ENUM."""
        rows = b"".join(struct.pack("<Ii", self._name(n), v) for n, v in values.items())
        return self.add(name, 6, 4, rows, len(values))

    def build(self, layout: bytes | None = None) -> bytes:
        """The whole; with ``layout`` the header of 7.1 and what it says of kinds."""
        header = 24 if layout is None else 32
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, header, 0, len(self._types), len(self._types), len(self._strings))
        body = bytes(self._types) + bytes(self._strings)
        if layout is None:
            return head + body
        body += bytes(-len(body) % 4)
        return head + struct.pack("<II", len(body), len(layout)) + body + layout


def near(opcode: int, address: int, target: int) -> bytes:
    """A call or jump of five bytes."""
    return bytes((opcode,)) + struct.pack("<i", target - address - 5)


def kernel(folder: Path, types: bytes | None = None) -> Path:
    """The image: exports of three functions, the list of modules, types."""
    text = bytearray(b"\xcc" * 0x1000)
    names = b"__fentry__\0_printk\0__x86_return_thunk\0"
    rows = b""
    for i, (value, name) in enumerate(((FENTRY, 0), (PRINTK, 11), (THUNK, 19))):
        at = EXPORTS + 12 * i
        rows += struct.pack("<iii", value - at, EXPORTS + 0x100 + name - at - 4, 0)
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", bytes(text), address=TEXT, flags="ax", align=4096)
    elf.section(".rodata", b"Linux version 6.12.1-made (a@b) (gcc 12) #1 SMP\n\0", address=TEXT + 0x2000, flags="a")
    elf.section(".data", bytes(0x1000), address=DATA, flags="aw", align=4096)
    elf.section(".BTF", btf() if types is None else types, address=BTF_AT, flags="a", align=4)
    elf.section("__ksymtab", rows, address=EXPORTS, flags="a", align=4)
    elf.section("__ksymtab_strings", names, address=EXPORTS + 0x100, flags="a")
    elf.symbol("modules", HEAD, ".data", type="object").symbol("__fentry__", FENTRY, ".text")
    elf.symbol("_printk", PRINTK, ".text").symbol("__x86_return_thunk", THUNK, ".text")
    path = folder / "vmlinuz-6.12.1-made"
    path.write_bytes(elf.build())
    return path


KEY = 0x10
"""Of the module's static key, in its data."""


def module_text() -> bytes:
    """A module's code on disk; what refers elsewhere is 0 in the file."""
    return b"".join((
        b"\xe8\0\0\0\0",              # 0: call __fentry__
        NOP5,                         # 5: a branch of a static key, to 32
        b"\xe8\0\0\0\0",              # 10: call _printk
        b"\x48\xc7\xc0\0\0\0\0",      # 15: mov rax, offset data
        b"\xe9\0\0\0\0",              # 22: a return
        b"\xcc" * 5,
        b"\xc3",                      # 32
    ))  # fmt: skip


def module_file(name: str, *, build_id: bytes = BUILD_ID, srcversion: str = "", percpu: bool = False) -> bytes:
    """The file of a module."""
    ko = ElfWriter(bits=64, kind="rel")
    ko.section(
        ".note.gnu.build-id", struct.pack("<III4s", 4, 20, 3, b"GNU\0") + build_id, flags="a", type="note", align=4
    )
    ko.section(".text", module_text(), flags="ax", align=16)
    ko.section(".init.text", b"\xc3" * 16, flags="ax", align=16)
    ko.section("__mcount_loc", bytes(8), flags="a", align=8)
    ko.section("__jump_table", bytes(16), flags="aw", align=8)
    ko.section(".return_sites", bytes(4), flags="a", align=4)
    ko.section(".data", bytes(0x40), flags="aw", align=32)
    ko.section(".exit.text", b"\xc3" * 8, flags="ax", align=16)
    source = f"srcversion={srcversion}\0" if srcversion else ""
    ko.section(".modinfo", f"name={name}\0depends=\0{source}vermagic=6.12.1-made SMP \0".encode(), flags="a")
    ko.section(".gnu.linkonce.this_module", bytes(MODULE_SIZE), flags="aw", align=64)
    ko.symbol("__fentry__").symbol("_printk").symbol("__x86_return_thunk").symbol("f", 0, ".text", size=33)
    ko.relocation(".text", 1, R_X86_64_PLT32, "__fentry__", -4)
    ko.relocation(".text", 11, R_X86_64_PLT32, "_printk", -4)
    ko.relocation(".text", 18, R_X86_64_32S, ".data", 8)
    ko.relocation(".text", 23, R_X86_64_PLT32, "__x86_return_thunk", -4)
    ko.relocation("__mcount_loc", 0, R_X86_64_64, ".text", 0)
    ko.relocation("__jump_table", 0, R_X86_64_PC32, ".text", 5)
    ko.relocation("__jump_table", 4, R_X86_64_PC32, ".text", 32)
    ko.relocation("__jump_table", 8, R_X86_64_PC64, ".data", KEY)
    ko.relocation(".return_sites", 0, R_X86_64_PC32, ".text", 22)
    return ko.build()


@dataclass
class Machine:
    """The memory of the running kernel, by virtual address; modules are added one by one."""

    regions: dict[int, bytearray] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    _heap: int = SLAB

    def __post_init__(self) -> None:
        self.regions = {
            TEXT: bytearray(b"\xcc" * 0x1000), DATA: bytearray(0x1000), SLAB: bytearray(0x40000),
            AREA: bytearray(0x80000),
        }  # fmt: skip
        self.link()

    def put(self, address: int, data: bytes) -> None:
        start = next(s for s, r in self.regions.items() if s <= address < s + len(r))
        self.regions[start][address - start : address - start + len(data)] = data

    def get(self, address: int, length: int) -> bytes | None:
        start = next((s for s, r in self.regions.items() if s <= address and address + length <= s + len(r)), None)
        return None if start is None else bytes(self.regions[start][address - start : address - start + length])

    def base(self, name: str) -> int:
        """Where a module's memory begins."""
        return AREA + self.names.index(name) * PITCH

    def structure(self, name: str) -> int:
        """The address of a module's struct module."""
        return self.base(name) + 0x4040

    def take(self, data: bytes) -> int:
        """Some allocated memory."""
        at = self._heap
        self._heap += -(-len(data) // 64) * 64
        self.put(at, data)
        return at

    def load(self, name: str, *, key: int = 0, build_id: bytes = BUILD_ID, sections: bool = True) -> None:
        """What the loader leaves of ``module_file``."""
        self.names.append(name)
        text, data, rodata = self.base(name), self.base(name) + 0x4000, self.base(name) + 0x8000
        # By kind, in the order of the file: text and exit text, then read-only data, then data and struct module.
        body = bytearray(module_text())
        body[0:5] = NOP5
        if key:
            body[5:10] = near(0xE9, text + 5, text + 32)
        body[10:15] = near(0xE8, text + 10, PRINTK)
        body[18:22] = struct.pack("<I", data + 8 & 0xFFFFFFFF)
        body[22:27] = RET5
        self.put(text, bytes(0x1000))
        self.put(text, bytes(body))
        self.put(text + 0x30, b"\xc3" * 8)
        self.put(data + KEY, struct.pack("<i", key))
        notes = struct.pack("<III4s", 4, 20, 3, b"GNU\0") + build_id
        self.put(rodata, notes)
        placed = [
            (".note.gnu.build-id", rodata),
            (".text", text),
            (".init.text", text + 0xC000),
            ("__mcount_loc", rodata + 0x28),
            ("__jump_table", data + 0x2000),
            (".return_sites", rodata + 0x30),
            (".data", data),
            (".exit.text", text + 0x30),
            (".gnu.linkonce.this_module", data + 0x40),
        ]
        at = self.structure(name)
        self.put(at, bytes(MODULE_SIZE))
        self.put(at + NAME, name.encode() + b"\0")
        for kind, (base, size) in {
            0: (text, 0x1000),
            1: (data, 0x1000),
            2: (rodata, 0x1000),
            3: (data + 0x2000, 0x1000),
        }.items():
            self.put(at + MEM + 16 * kind, struct.pack("<QI", base, size))
        if sections:
            self.put(at + SECT_ATTRS, struct.pack("<Q", self._sections(placed)))
        self.link()

    def _sections(self, placed: list[tuple[str, int]]) -> int:
        """struct module_sect_attrs of 6.12: a group of five words, their number, attributes of 72 bytes each."""
        stride = 72
        body = bytearray(48 + stride * len(placed))
        place = self.take(bytes(body))
        pointers = b""
        for i, (name, address) in enumerate(placed):
            at = 48 + stride * i
            struct.pack_into("<Q", body, at, self.take(name.encode() + b"\0"))
            struct.pack_into("<Q", body, at + stride - 8, address)
            pointers += struct.pack("<Q", place + at)
        struct.pack_into("<Q", body, 0, self.take(b"sections\0"))
        struct.pack_into("<Q", body, 32, self.take(pointers + bytes(8)))
        self.put(place, bytes(body))
        return place

    def link(self) -> None:
        """The list, the newest module first."""
        ring = [HEAD, *(self.structure(n) + LIST for n in reversed(self.names))]
        for i, at in enumerate(ring):
            self.put(at, struct.pack("<QQ", ring[(i + 1) % len(ring)], ring[i - 1]))

    def view(self, image: Image) -> View:
        """This memory as the code under test reads it."""
        return View(MadeRunning(image, self))

    def engine_kernel(self, image: Image) -> engine.Kernel:
        """The kernel with a CPU that has no feature at all."""
        rules, _ = choose((6, 12, 1), (), "")
        cpu = Cpu("made", "GenuineIntel", 6, 1, 1, (0,) * rules.feature_words()[1])
        boot = Boot(image, rules, rules.nop_table(cpu, 64), Native(cpu, 2), None)
        running = MadeRunning(image, self)
        return engine.Kernel(image, running, boot, running)


class Nothing:
    """A dump in which nothing is found: no probe, no record of ftrace."""

    physical: tuple[()] = ()
    virtual: tuple[()] = ()

    def find(self, *_: object, **__: object) -> tuple[()]:
        return ()

    def find_words(self, values: set[int], *_: object) -> dict[int, list[int]]:
        return {value: [] for value in values}

    def at(self, *_: object) -> bytes:
        return b""

    def addresses_of(self, *_: object) -> None:
        return None


class MadeRunning(Running):
    """Reads a :class:`Machine`."""

    def __init__(self, image: Image, machine: Machine) -> None:
        super().__init__(image, Nothing(), 0, None, "made")  # type: ignore[arg-type]
        self._machine = machine

    def read(self, address: int, length: int) -> bytes | None:
        return self._machine.get(address, length)

    def read_running(self, address: int, length: int) -> bytes | None:
        return self._machine.get(address, length)

    @property
    def tables(self) -> None:  # type: ignore[override]
        return None


def opened(folder: Path, types: bytes | None = None) -> tuple[Image, Types]:
    """The made-up kernel's image and its types."""
    image = open_image(kernel(folder, types))
    return image, Types(image)
