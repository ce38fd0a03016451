"""The Linux/x86 32-bit boot protocol, for bzImage and for a vmlinux entered directly.

May import this package's lower modules and the machine.  Facts: Linux
``Documentation/arch/x86/boot.rst`` and ``zero-page.rst`` (field offsets,
protocol 2.00 to 2.15).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmipatch.emu.firmware.elf import Executable
from vmipatch.emu.firmware.entry import enter_protected
from vmipatch.emu.firmware.memory_map import (
    BOOT_PARAMS,
    COMMAND_LINE,
    COMMAND_LINE_MAX,
    HIGH_MEMORY,
    check_place,
    e820,
    place_high,
)
from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

SETUP_HEADER = 0x1F1
LOADED_HIGH, KEEP_SEGMENTS, CAN_USE_HEAP = 0x01, 0x40, 0x80
DEFAULT_INITRD_MAX = 0x37FF_FFFF
UNDEFINED_LOADER = 0xFF
E820_MAX = 128


@dataclass(frozen=True)
class BzImage:
    """The parts of a bzImage: setup header bytes, the protected-mode kernel, and what was said of it."""

    header: bytes
    kernel: bytes
    version: int
    load_address: int
    init_size: int
    initrd_max: int
    command_line_max: int


def parse_bzimage(data: bytes, file: str) -> BzImage:
    """Read a bzImage; raises :class:`EmulatorError` for what cannot be booted in 32 bits."""
    if len(data) < 0x268 or data[0x1FE:0x200] != b"\x55\xaa" or data[0x202:0x206] != b"HdrS":
        raise EmulatorError("not a Linux boot image", file=file)
    (version,) = struct.unpack_from("<H", data, 0x206)
    loadflags = data[0x211]
    if version < 0x200 or not loadflags & LOADED_HIGH:
        raise EmulatorError("a zImage of before 1996 cannot be entered in 32-bit mode", file=file)
    setup_sectors = data[SETUP_HEADER] or 4
    start = 512 * (setup_sectors + 1)
    if start >= len(data):
        raise EmulatorError("the image ends within its setup code", file=file, offset=start)
    end = min(0x202 + data[0x201], start)
    (code32,) = struct.unpack_from("<I", data, 0x214)
    command_max = struct.unpack_from("<I", data, 0x238)[0] if version >= 0x206 else 255
    init_size = struct.unpack_from("<I", data, 0x260)[0] if version >= 0x20A else 0
    initrd_max = struct.unpack_from("<I", data, 0x22C)[0] if version >= 0x203 else DEFAULT_INITRD_MAX
    return BzImage(
        header=data[SETUP_HEADER:end],
        kernel=bytes(data[start:]),
        version=version,
        load_address=code32 or HIGH_MEMORY,
        init_size=init_size,
        initrd_max=initrd_max or DEFAULT_INITRD_MAX,
        command_line_max=min(command_max, COMMAND_LINE_MAX - 1),
    )


def boot_bzimage(machine: Machine, image: BzImage, append: str, initrd: bytes | None, file: str) -> None:
    """Load the protected-mode kernel, which unpacks itself, and enter it."""
    ram = machine.options.ram_bytes
    load = image.load_address
    check_place(load, max(len(image.kernel), image.init_size), ram, "the kernel", file)
    machine.memory.write(load, image.kernel)
    params = bytearray(4096)
    params[SETUP_HEADER : SETUP_HEADER + len(image.header)] = image.header
    above = load + max(len(image.kernel), image.init_size)
    if image.version >= 0x20A:
        # It runs from its preferred address, or from where it lies if that is higher.
        (preferred,) = struct.unpack_from("<Q", params, 0x258)
        check_place(preferred, image.init_size, ram, "the unpacked kernel", file)
        above = max(above, preferred + image.init_size)
    _finish(machine, params, append, initrd, above, image.initrd_max, image.command_line_max, file)
    enter_protected(machine, load, esi=BOOT_PARAMS)


def boot_elf(machine: Machine, elf: Executable, append: str, initrd: bytes | None, file: str) -> None:
    """Load a vmlinux at its physical addresses and enter it as its unpacker would."""
    end = load_segments(machine, elf, file)
    params = bytearray(4096)
    struct.pack_into("<H", params, 0x1FE, 0xAA55)
    params[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", params, 0x206, 0x020C)
    params[0x211] = LOADED_HIGH
    struct.pack_into("<I", params, 0x214, elf.physical_entry())
    _finish(machine, params, append, initrd, end, DEFAULT_INITRD_MAX, COMMAND_LINE_MAX - 1, file)
    enter_protected(machine, elf.physical_entry(), esi=BOOT_PARAMS)


def load_segments(machine: Machine, elf: Executable, file: str) -> int:
    """Copy every segment to its physical address; returns the end of the highest."""
    end = 0
    for segment in elf.segments:
        check_place(segment.physical, segment.memory_size, machine.options.ram_bytes, "the image", file)
        machine.memory.write(segment.physical, segment.data)
        end = max(end, segment.physical + segment.memory_size)
    return end


def _finish(
    machine: Machine,
    params: bytearray,
    append: str,
    initrd: bytes | None,
    above: int,
    initrd_max: int,
    command_line_max: int,
    file: str,
) -> None:
    """What a loader fills in: command line, initrd, screen, memory map."""
    memory, ram = machine.memory, machine.options.ram_bytes
    line = append.encode("utf-8")
    if len(line) > command_line_max:
        raise EmulatorError(f"the command line has {len(line)} bytes; the kernel takes {command_line_max}")
    memory.write(COMMAND_LINE, line + b"\0")
    params[0x210] = UNDEFINED_LOADER
    params[0x211] = params[0x211] & ~KEEP_SEGMENTS | LOADED_HIGH
    struct.pack_into("<I", params, 0x228, COMMAND_LINE)
    if initrd is not None:
        place = place_high(len(initrd), ram, above, initrd_max, "the initrd", file)
        memory.write(place, initrd)
        struct.pack_into("<II", params, 0x218, place, len(initrd))
    _screen(params)
    struct.pack_into("<H", params, 0x002, min((ram >> 10) - 1024, 0xFFFF) if ram > HIGH_MEMORY else 0)
    struct.pack_into("<I", params, 0x1E0, max(0, (ram >> 10) - 1024))
    entries = e820(ram)[:E820_MAX]
    params[0x1E8] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", params, 0x2D0 + 20 * index, *entry)
    memory.write(BOOT_PARAMS, bytes(params))


def _screen(params: bytearray) -> None:
    """screen_info: VGA text, 80 by 25, cursor at the top."""
    params[0x06], params[0x07] = 3, 80
    struct.pack_into("<H", params, 0x0A, 0)
    params[0x0E], params[0x0F] = 25, 1
    struct.pack_into("<H", params, 0x10, 16)
