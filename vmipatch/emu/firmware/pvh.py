"""The PVH boot protocol: an ELF with Xen's PHYS32_ENTRY note.

May import this package's lower modules and the machine.  Facts: Xen
``docs/misc/pvh.pandoc`` and ``public/arch-x86/hvm/start_info.h`` (version 1,
with the memory map).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmipatch.emu.firmware import acpi
from vmipatch.emu.firmware.elf import Executable
from vmipatch.emu.firmware.entry import enter_protected
from vmipatch.emu.firmware.linux import DEFAULT_INITRD_MAX, load_segments
from vmipatch.emu.firmware.memory_map import (
    BIOS,
    COMMAND_LINE,
    COMMAND_LINE_MAX,
    MODULES,
    START_INFO,
    e820,
    place_high,
)
from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

PHYS32_ENTRY = 18
MAGIC = 0x336E_C578
MEMORY_MAP = MODULES + 0x100
RSDP = BIOS + acpi.TABLES


def entry_point(elf: Executable) -> int | None:
    """The physical entry that the note names; None without one."""
    for name, kind, data in elf.notes:
        if name == "Xen" and kind == PHYS32_ENTRY and len(data) >= 4:
            return int.from_bytes(data[:4], "little")
    return None


def boot(machine: Machine, elf: Executable, append: str, initrd: bytes | None, file: str) -> None:
    """Load the segments, build hvm_start_info, enter with its address in EBX."""
    entry = entry_point(elf)
    if entry is None:
        raise EmulatorError("no PVH entry: the ELF has no Xen note PHYS32_ENTRY", file=file)
    end = load_segments(machine, elf, file)
    memory, ram = machine.memory, machine.options.ram_bytes
    line = append.encode("utf-8")
    if len(line) >= COMMAND_LINE_MAX:
        raise EmulatorError(f"the command line has {len(line)} bytes; {COMMAND_LINE_MAX - 1} fit")
    memory.write(COMMAND_LINE, line + b"\0")
    modules = 0
    if initrd is not None:
        place = place_high(len(initrd), ram, end, DEFAULT_INITRD_MAX, "the initrd", file)
        memory.write(place, initrd)
        memory.write(MODULES, struct.pack("<QQQQ", place, len(initrd), 0, 0))
        modules = 1
    entries = e820(ram)
    for index, (start, length, kind) in enumerate(entries):
        memory.write(MEMORY_MAP + 24 * index, struct.pack("<QQII", start, length, kind, 0))
    info = struct.pack("<IIIIQQQQII", MAGIC, 1, 0, modules, MODULES, COMMAND_LINE, RSDP, MEMORY_MAP, len(entries), 0)
    memory.write(START_INFO, info)
    enter_protected(machine, entry, ebx=START_INFO)
