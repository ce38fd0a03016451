"""Processor states in which firmware hands over: flat protected mode and real mode.

May import ``memory_map`` and the machine.  Facts: Linux
``Documentation/arch/x86/boot.rst`` (32-bit boot protocol: selectors 0x10 and
0x18, flat, interrupts off, paging off); Multiboot specification 0.6.96, section
3.2; the same state serves PVH.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmipatch.emu.firmware.memory_map import GDT, STACK_TOP

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

CODE, DATA = 0x10, 0x18
FLAT_CODE, FLAT_DATA = 0xCF9B, 0xCF93  # descriptor bits 40-55 less the limit: 4 GiB, 32-bit, ring 0
REAL_CODE, REAL_DATA = 0x009B, 0x0093


def _descriptor(attributes: int) -> bytes:
    return struct.pack("<HHBBBB", 0xFFFF, 0, 0, attributes & 0xFF, attributes >> 8 & 0xF0 | 0x0F, 0)


def enter_protected(machine: Machine, eip: int, **registers: int) -> None:
    """Flat 32-bit protected mode at physical ``eip``; other registers are zero."""
    cpu = machine.cpu
    table = bytes(16) + _descriptor(FLAT_CODE) + _descriptor(FLAT_DATA)
    machine.memory.write(GDT, table)
    cpu.set("cr0", 0x11)
    cpu.set("gdtr_base", GDT)
    cpu.set("gdtr_limit", len(table) - 1)
    cpu.set("idtr_base", 0)
    cpu.set("idtr_limit", 0)
    cpu.set_segment("cs", CODE, 0, 0xFFFFFFFF, FLAT_CODE)
    for name in ("ds", "es", "fs", "gs", "ss"):
        cpu.set_segment(name, DATA, 0, 0xFFFFFFFF, FLAT_DATA)
    for name in ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp"):
        cpu.set(name, registers.get(name, 0))
    cpu.set("esp", registers.get("esp", STACK_TOP))
    cpu.set("eflags", 2)
    cpu.set("eip", eip)


def enter_real(machine: Machine, segment: int, offset: int, **registers: int) -> None:
    """Real mode at ``segment:offset``, interrupts on, stack below 0x7C00."""
    cpu = machine.cpu
    cpu.set("cr0", 0x10)
    cpu.set("idtr_base", 0)
    cpu.set("idtr_limit", 0x3FF)
    cpu.set_segment("cs", segment, segment << 4, 0xFFFF, REAL_CODE)
    for name in ("ds", "es", "fs", "gs", "ss"):
        cpu.set_segment(name, 0, 0, 0xFFFF, REAL_DATA)
    for name in ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp"):
        cpu.set(name, registers.get(name, 0))
    cpu.set("esp", registers.get("esp", STACK_TOP))
    cpu.set("eflags", 0x202)
    cpu.set("eip", offset)
