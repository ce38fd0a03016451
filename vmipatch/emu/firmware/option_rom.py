"""Option ROMs: finding them at 0xC0000-0xDFFFF, putting one there, running its init.

May import this package's lower modules and the machine.  Facts: IBM AT BIOS and
Phoenix BIOS practice: signature 55 AA, length in 512-byte units at offset 2,
entry at offset 3 by a far call, byte sum 0, scan in steps of 2 KiB; PCI Firmware
Specification 3.0, section 5.2 (AX at entry: bus, device, function; the image
may shrink).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmipatch.emu.firmware.bios import RETURN_STUB, SEGMENT
from vmipatch.emu.firmware.bios_calls import Services
from vmipatch.emu.firmware.entry import enter_real
from vmipatch.emu.firmware.memory_map import ROM_AREA, ROM_AREA_END, STACK_TOP
from vmipatch.errors import EmulatorError, RomError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

STEP = 2048
INIT_LIMIT = 100_000_000  # instructions; an init that takes longer has run wild
READ, READ_WRITE = 1, 3


@dataclass(frozen=True)
class Found:
    """A ROM in the option ROM area: physical address and length in bytes."""

    physical: int
    length: int


def scan(memory: bytes, base: int = ROM_AREA) -> list[Found]:
    """Every ROM in ``memory``, which is what lies from physical ``base`` on."""
    found = []
    at = 0
    while at + 3 <= len(memory):
        if memory[at : at + 2] == b"\x55\xaa" and memory[at + 2]:
            length = memory[at + 2] * 512
            image = memory[at : at + length]
            if len(image) == length and sum(image) & 0xFF == 0:
                found.append(Found(base + at, length))
                at += -(-length // STEP) * STEP
                continue
        at += STEP
    return found


def place(machine: Machine, rom: bytes, base: int, file: str | None = None) -> None:
    """Copy a ROM into shadow memory at physical ``base``; it stays writable until :func:`seal`.

    Raises :class:`RomError` for bytes that are no option ROM and
    :class:`EmulatorError` for a place where none can be.
    """
    if rom[:2] != b"\x55\xaa" or len(rom) < 8:
        raise RomError("no option ROM: it does not begin with 55 AA", file=file, offset=0)
    length = rom[2] * 512
    if not 0 < length <= len(rom):
        raise RomError(f"the ROM says that it is {length} bytes long, but the file has {len(rom)}", file=file, offset=2)
    if sum(rom[:length]) & 0xFF:
        raise RomError("the ROM's bytes do not add up to 0: a BIOS would not run it", file=file)
    if base % STEP or base < ROM_AREA or base + len(rom) > ROM_AREA_END:
        raise EmulatorError(
            f"a ROM of {len(rom)} bytes cannot lie at {base:#x}: "
            f"multiples of {STEP} from {ROM_AREA:#x}, and below {ROM_AREA_END:#x}",
            file=file,
        )
    for other in scan(machine.memory.read(ROM_AREA, ROM_AREA_END - ROM_AREA)):
        if other.physical < base + len(rom) and base < other.physical + other.length:
            raise EmulatorError(f"there is a ROM at {other.physical:#x} already", file=file)
    machine.board.host_bridge.set_attributes(base, base + len(rom), READ_WRITE)
    machine.memory.write(base, rom)


def seal(machine: Machine) -> None:
    """Make the shadowed ROMs read-only, as a BIOS does before it boots."""
    bridge = machine.board.host_bridge
    for start in range(ROM_AREA, ROM_AREA_END, 0x4000):
        if bridge.attributes(start) == READ_WRITE:
            bridge.set_attributes(start, start + 0x4000, READ)


def initialise(machine: Machine, services: Services, rom: Found, bdf: int, limit: int = INIT_LIMIT) -> None:
    """Far-call the ROM's entry in real mode with the PCI location in AX.

    Raises :class:`RomError` if it does not come back within ``limit`` instructions.
    """
    segment = rom.physical >> 4
    enter_real(machine, segment, 3, eax=bdf, ebx=0xFFFF, edx=0xFFFF, esp=STACK_TOP - 4)
    machine.memory.write(STACK_TOP - 4, struct.pack("<HH", RETURN_STUB, SEGMENT))
    services.returned = False
    outcome = machine.run(limit=machine.cpu.instructions + limit)
    if not services.returned:
        raise RomError(
            f"the ROM's init at {segment:04X}:0003 did not return ({outcome.reason} after "
            f"{outcome.instructions} instructions)"
        )
