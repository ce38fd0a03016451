"""A raw BIOS image at the reset vector.

May import the machine.  Facts: Intel SDM volume 3, "First Instruction Executed"
(FFFFFFF0h); 82371SB: the last 128 KiB of the BIOS ROM are also seen at
E0000-FFFFF, where the host bridge's PAM registers may put DRAM over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmipatch.errors import EmulatorError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

SIZES = tuple(1 << shift for shift in range(16, 25))  # 64 KiB to 16 MiB


def looks_like_bios(data: bytes) -> bool:
    """Whether this could be a BIOS: a power of two from 64 KiB, with a jump at the reset vector."""
    return len(data) in SIZES and data[-16] in (0xE9, 0xEA, 0xEB, 0x90, 0xFA, 0x0F)


def boot(machine: Machine, data: bytes, file: str) -> None:
    """Map the image below 4 GiB and below 1 MiB; the processor stands at its reset vector."""
    if len(data) not in SIZES:
        raise EmulatorError(
            f"a BIOS image is a power of two from 64 KiB to 16 MiB; this has {len(data)} bytes", file=file
        )
    memory = machine.memory
    backing = memory.allocate(len(data))
    memory.write_backing(backing, data)
    memory.map(0x1_0000_0000 - len(data), len(data), backing, writable=False)
    low = min(len(data), 0x20000)
    machine.board.host_bridge.place_rom(0x100000 - low, low, backing + len(data) - low)
    machine.cpu.reset()
