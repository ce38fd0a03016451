"""A small paged guest kernel in the emulator, laid out by the test: tables, stacks, a ROM, and calls into it.

Physical memory is seen at ``BASE`` more.  Selectors are Linux's: kernel 0x60 and 0x68, user 0x73 and 0x7b,
TSS 0x80, LDT 0x88.
"""

from __future__ import annotations

import struct
from functools import cache

from vmipatch.emu.firmware import option_rom
from vmipatch.emu.hypervisors import create
from vmipatch.emu.hypervisors.base import Base
from vmipatch.emu.machine.board import MEBIBYTE, BoardOptions
from vmipatch.emu.machine.machine import Machine, Outcome
from vmipatch.isa.assemble import assemble
from vmipatch.rombuild.build import Rom, build

BASE = 0xC0000000
ROM = 0xC0000
GDT, IDT, TSS, LDT = 0x1000, 0x2000, 0x3000, 0x4000
PDPT, DIRECTORY, TABLES = 0x7000, 0x8000, 0x10000  # PAE: four directories from DIRECTORY on
CODE, HANDLERS, DATA, STACK_TOP, USER_CODE, USER_STACK = 0x40000, 0x48000, 0x50000, 0x5F000, 0x60000, 0x61000
USER_AT, USER_STACK_AT = 0x08048000, 0x08050000  # linear
KERNEL_CS, KERNEL_DS, USER_CS, USER_DS, TASK, LOCAL = 0x60, 0x68, 0x73, 0x7B, 0x80, 0x88
MAPPED = 0x400000  # bytes of low memory in the direct map
DEPRIVILEGED = ("vmware", "kvm", "l4ka", "xen", "lguest")


@cache
def rom(hypervisor: str, abi: str) -> Rom:
    """A built ROM, made once."""
    return build(hypervisor, abi)


def code(text: str) -> bytes:
    """Assembled bytes; ``jmp .`` is a stop that the test sees."""
    return assemble(text.replace("jmp .", ".byte 0xeb, 0xfe")).code


def segment(access: int, *, base: int = 0, limit: int = 0xFFFFF, flags: int = 0xC) -> bytes:
    """A descriptor; ``flags`` is the nibble of G, D and AVL."""
    middle = limit >> 16 | flags << 4
    return struct.pack("<HHBBBB", limit & 0xFFFF, base & 0xFFFF, base >> 16 & 0xFF, access, middle, base >> 24)


def gate(address: int, kind: int = 0x8E, selector: int = KERNEL_CS) -> bytes:
    """An interrupt gate (0x8E), trap gate (0x8F) or one for users (0xEE, 0xEF)."""
    return struct.pack("<HHBBH", address & 0xFFFF, selector, 0, kind, address >> 16)


class PagedGuest:
    """The machine, at CPL 0 with paging on, the ROM shadowed and read-only."""

    def __init__(self, hypervisor: str, abi: str = "vmi-3.0", *, pae: bool = False, attach: bool = True) -> None:
        self.machine = Machine(BoardOptions(ram_bytes=16 * MEBIBYTE, vga=False))
        self.cpu, self.memory, self.pae = self.machine.cpu, self.machine.memory, pae
        self.rom = rom(hypervisor, abi)
        self.personality: Base = create(hypervisor)
        if attach:
            self.personality.attach(self.machine)
        option_rom.place(self.machine, self.rom.data, ROM)
        option_rom.seal(self.machine)
        self._tables()
        self._pages()
        self._enter()

    def _tables(self) -> None:
        gdt = bytearray(0x100)
        for selector, access in ((0x60, 0x9B), (0x68, 0x93), (0x70, 0xFB), (0x78, 0xF3)):
            gdt[selector : selector + 8] = segment(access)
        gdt[TASK : TASK + 8] = segment(0x89, base=BASE + TSS, limit=0x67, flags=0)
        gdt[LOCAL : LOCAL + 8] = segment(0x82, base=BASE + LDT, limit=0x1F, flags=0)
        self.memory.write(GDT, bytes(gdt))
        self.memory.write(LDT, bytes(8) + segment(0xF3) + segment(0x93) + bytes(8))
        self.memory.write(IDT, b"".join(gate(BASE + HANDLERS + 16 * n) for n in range(256)))
        self.memory.write(IDT + 8 * 0x80, gate(BASE + HANDLERS + 16 * 0x80, 0xEF))
        # Each handler: its number in EDI's place on the stack, then a stop that the test sees.
        for n in range(256):
            self.memory.write(HANDLERS + 16 * n, b"\x68" + struct.pack("<I", n) + b"\xf4\xeb\xfd")
        tss = bytearray(0x68)
        struct.pack_into("<II", tss, 4, BASE + STACK_TOP, KERNEL_DS)
        struct.pack_into("<H", tss, 102, 0x68)
        self.memory.write(TSS, bytes(tss))

    def _pages(self) -> None:
        size = 8 if self.pae else 4
        each = 4096 // size

        def entry(value: int) -> bytes:
            return value.to_bytes(size, "little")

        count = MAPPED // 4096 // each
        for n in range(count):
            table = b"".join(entry((n * each + i) << 12 | 3) for i in range(each))
            self.memory.write(TABLES + n * 4096, table)
        user = TABLES + count * 4096
        table = bytearray(4096)
        for linear, physical in ((USER_AT, USER_CODE), (USER_STACK_AT - 4096, USER_STACK)):
            index = (linear >> 12) % each
            table[index * size : index * size + size] = entry(physical | 7)
        self.memory.write(user, bytes(table))
        self.user_table = user
        per = each * 4096
        kernel = BASE // per
        directory = DIRECTORY + (kernel // each) * 4096
        for n in range(count):
            self.memory.write(directory + (kernel + n) % each * size, entry(TABLES + n * 4096 | 3))
        low = DIRECTORY + (USER_AT // per // each) * 4096
        self.memory.write(low + USER_AT // per % each * size, entry(user | 7))
        self.cr3 = DIRECTORY
        if self.pae:
            self.memory.write(PDPT, struct.pack("<4Q", *(DIRECTORY + n * 4096 | 1 for n in range(4))))
            self.cr3 = PDPT

    def _enter(self) -> None:
        cpu = self.cpu
        for name, value in (("gdtr_base", BASE + GDT), ("gdtr_limit", 0xFF), ("idtr_base", BASE + IDT)):
            cpu.set(name, value)
        cpu.set("idtr_limit", 0x7FF)
        cpu.set("cr3", self.cr3)
        cpu.set("cr4", 0x30 if self.pae else 0x10)
        if self.pae:
            cpu.pdpte = [*(DIRECTORY + n * 4096 | 1 for n in range(4)), 0, 0, 0, 0]
        cpu.set("cr0", 0x80010011)
        cpu.set("cs", KERNEL_CS)
        for name in ("ss", "ds", "es"):
            cpu.set(name, KERNEL_DS)
        for name in ("fs", "gs"):
            cpu.set(name, 0)
        cpu.set_segment("tr", TASK, BASE + TSS, 0x67, 0x8B)
        cpu.set_segment("ldtr", LOCAL, BASE + LDT, 0x1F, 0x82)
        cpu.set("eflags", 2)
        cpu.set("esp", BASE + STACK_TOP)
        cpu.set("eip", BASE + CODE)

    # --- running ------------------------------------------------------------------------

    def run(self, text: str | bytes, limit: int = 100_000, at: int = CODE, **registers: int) -> Outcome:
        """Run assembly from CODE on up to the end of the text, a stop of the machine, or the limit."""
        raw = text if isinstance(text, bytes) else code(text)
        self.memory.write(at, raw + b"\x90")
        for name, value in registers.items():
            self.cpu.set(name, value)
        self.cpu.set("eip", BASE + at)
        end = BASE + at + len(raw)
        self.cpu.add_breakpoint(end)
        outcome = self.machine.run(limit=self.cpu.instructions + limit)
        self.cpu.remove_breakpoint(end)
        return outcome

    def stub(self, name: str) -> int:
        """The linear address of a call's stub."""
        return BASE + ROM + next(s.offset for s in self.rom.symbols if s.name == name)

    def call(self, name: str, *stack: int, **registers: int) -> Outcome:
        """Call a stub with registers and stack arguments (the first is the one at [esp + 4]).

        A call that the ROM answers with NOP is none.
        """
        if not any(s.name == name for s in self.rom.symbols):
            return self.run("nop", **registers)
        text = "".join(f"push {word}; " for word in reversed(stack))
        raw = code(text + "mov ebp, ebp") if stack else b""
        at = BASE + CODE + len(raw)
        raw += b"\xe8" + struct.pack("<i", self.stub(name) - at - 5)
        if stack:
            raw += code(f"lea esp, [esp + {4 * len(stack)}]")
        return self.run(raw, **registers)

    def init(self) -> int:
        """VMI_Init; its result."""
        at = self.rom_entry("init")
        raw = b"\xe8" + struct.pack("<i", at - (BASE + CODE) - 5)
        outcome = self.run(raw)
        assert outcome.reason == "breakpoint", (outcome, self.personality.violation)
        return self.cpu.get("eax")

    def rom_entry(self, which: str) -> int:
        """The linear address of VMI_Init (``init``) or GetRelocationInfo."""
        from vmipatch.rombuild import abi as abis

        dispatch = abis.load(self.rom.abi).dispatch
        offset = (
            dispatch.get("init", 4 * dispatch.get("slot_size", 0)) if which == "init" else dispatch["get_relocation"]
        )
        return BASE + ROM + int(offset)

    def word(self, physical: int) -> int:
        """A word of physical memory."""
        return int.from_bytes(self.memory.read(physical, 4), "little")
