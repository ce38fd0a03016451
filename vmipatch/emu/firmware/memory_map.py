"""Where the host-side firmware puts things in guest memory, and the e820 map it tells.

May import ``vmipatch.errors``.  All addresses are physical.
"""

from __future__ import annotations

from vmipatch.errors import EmulatorError

BASE_MEMORY_END = 0x9FC00  # 639 KiB; the extended BIOS data area is the last KiB below 640
EBDA = BASE_MEMORY_END
VIDEO = 0xA0000
ROM_AREA, ROM_AREA_END = 0xC0000, 0xE0000
BIOS = 0xF0000
HIGH_MEMORY = 0x100000

STACK_TOP = 0x7C00  # real-mode stack of option ROMs, and the early stack of entered kernels
# Everything of ours lies from here on: up to 2.6.19 Linux's unpacker takes all from 0x2000 to where the boot
# parameters are for itself (arch/i386/boot/compressed/misc.c, setup_output_buffer_if_we_run_high).
LOW_END = 0x90000
BOOT_PARAMS = LOW_END
COMMAND_LINE = 0x91000
COMMAND_LINE_MAX = 0x800
MODULES = 0x92000
START_INFO = 0x93000
GDT = 0x94000

USABLE, RESERVED = 1, 2


def e820(ram_bytes: int) -> list[tuple[int, int, int]]:
    """(start, length, type) entries."""
    entries = [
        (0, BASE_MEMORY_END, USABLE),
        (BASE_MEMORY_END, VIDEO - BASE_MEMORY_END, RESERVED),
        (BIOS, HIGH_MEMORY - BIOS, RESERVED),
    ]
    if ram_bytes > HIGH_MEMORY:
        entries.append((HIGH_MEMORY, ram_bytes - HIGH_MEMORY, USABLE))
    entries.append((0xFFFC0000, 0x40000, RESERVED))
    return entries


def check_place(start: int, length: int, ram_bytes: int, what: str, file: str | None = None) -> None:
    """Raises :class:`EmulatorError` unless the range is RAM that nothing of ours uses."""
    end = start + length
    in_low = start >= 0x1000 and end <= LOW_END
    in_high = start >= HIGH_MEMORY and end <= ram_bytes
    if not in_low and not in_high:
        raise EmulatorError(
            f"{what} does not fit in memory: it needs {start:#x} to {end:#x}, "
            f"and the machine has {ram_bytes >> 20} MiB",
            file=file,
        )


def place_high(length: int, ram_bytes: int, above: int, highest: int, what: str, file: str | None) -> int:
    """A page-aligned place for ``length`` bytes as high as allowed, above ``above``.

    ``highest``: the last byte's highest physical address.
    """
    top = min(ram_bytes, highest + 1)
    start = (top - length) & ~0xFFF
    if start < max(above, HIGH_MEMORY):
        raise EmulatorError(
            f"{what} of {length} bytes does not fit between the kernel's end ({above:#x}) and {top:#x}; "
            "give the machine more memory",
            file=file,
        )
    return start
