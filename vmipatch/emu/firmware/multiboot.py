"""Multiboot 1.

May import this package's lower modules and the machine.  Facts: Multiboot
specification 0.6.96: header within the first 8192 bytes (section 3.1), machine
state (3.2), information structure (3.3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmipatch.emu.firmware import elf as elf_format
from vmipatch.emu.firmware.entry import enter_protected
from vmipatch.emu.firmware.linux import DEFAULT_INITRD_MAX, load_segments
from vmipatch.emu.firmware.memory_map import (
    COMMAND_LINE,
    COMMAND_LINE_MAX,
    MODULES,
    START_INFO,
    check_place,
    e820,
    place_high,
)
from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

MAGIC, LOADER_MAGIC = 0x1BAD_B002, 0x2BAD_B002
SEARCH = 8192
ALIGN_MODULES, MEMORY_INFO, VIDEO_MODE, ADDRESSES = 1, 2, 4, 1 << 16
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES, INFO_MAP, INFO_LOADER = 1, 4, 8, 0x40, 0x200
NAME = MODULES + 0x20
MEMORY_MAP = MODULES + 0x100


@dataclass(frozen=True)
class Header:
    """The header and the file offset at which it stands."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int]  # header, load, load end, bss end, entry: physical


def find_header(data: bytes) -> Header | None:
    """The header, or None if this is no Multiboot image."""
    for offset in range(0, min(len(data), SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic == MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            room = data[offset + 12 : offset + 32].ljust(20, b"\0")
            addresses = struct.unpack("<5I", room)
            return Header(
                offset,
                flags,
                (addresses[0], addresses[1], addresses[2], addresses[3], addresses[4]),
            )
    return None


def boot(machine: Machine, data: bytes, header: Header, append: str, initrd: bytes | None, file: str) -> None:
    """Load the image, build the information structure, enter with it in EBX."""
    if header.flags & 0xFFFC & ~0x0007 & 0xFFFF:
        raise EmulatorError(
            f"the Multiboot header asks for something unknown (flags {header.flags:#x})",
            file=file,
            offset=header.offset,
        )
    if header.flags & ADDRESSES:
        end, entry = _load_flat(machine, data, header, file)
    else:
        executable = elf_format.parse(data, file)
        end, entry = load_segments(machine, executable, file), executable.physical_entry()
    memory, ram = machine.memory, machine.options.ram_bytes
    line = f"{file} {append}".strip().encode("utf-8")
    if len(line) >= COMMAND_LINE_MAX:
        raise EmulatorError(f"the command line has {len(line)} bytes; {COMMAND_LINE_MAX - 1} fit")
    memory.write(COMMAND_LINE, line + b"\0")
    memory.write(NAME, b"vmipatch\0")
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MAP | INFO_LOADER
    modules = 0
    if initrd is not None:
        place = place_high(len(initrd), ram, end, DEFAULT_INITRD_MAX, "the module", file)
        memory.write(place, initrd)
        memory.write(MODULES, struct.pack("<IIII", place, place + len(initrd), COMMAND_LINE, 0))
        flags |= INFO_MODULES
        modules = 1
    entries = e820(ram)
    table = b"".join(struct.pack("<IQQI", 20, *entry) for entry in entries)
    memory.write(MEMORY_MAP, table)
    info = bytearray(120)
    struct.pack_into("<III", info, 0, flags, 639, max(0, (ram >> 10) - 1024))
    struct.pack_into("<III", info, 16, COMMAND_LINE, modules, MODULES)
    struct.pack_into("<II", info, 44, len(table), MEMORY_MAP)
    struct.pack_into("<I", info, 64, NAME)
    memory.write(START_INFO, bytes(info))
    enter_protected(machine, entry, eax=LOADER_MAGIC, ebx=START_INFO)


def _load_flat(machine: Machine, data: bytes, header: Header, file: str) -> tuple[int, int]:
    """The header's own addresses (the "a.out kludge")."""
    header_at, load, load_end, bss_end, entry = header.addresses
    start = header.offset - (header_at - load)
    length = (load_end - load) if load_end else len(data) - start
    if start < 0 or length <= 0 or start + length > len(data):
        raise EmulatorError("the Multiboot load addresses do not fit the file", file=file, offset=header.offset)
    end = max(load + length, bss_end)
    check_place(load, end - load, machine.options.ram_bytes, "the image", file)
    machine.memory.write(load, data[start : start + length])
    return end, entry
