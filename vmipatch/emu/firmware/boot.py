"""From a file to a machine that stands at its first instruction.

May import this package, the machine and ``vmipatch.errors``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmipatch.emu.firmware import bios, elf, linux, multiboot, option_rom, pvh, rawrom
from vmipatch.emu.firmware.bios_calls import Services
from vmipatch.emu.firmware.memory_map import ROM_AREA, ROM_AREA_END
from vmipatch.errors import EmulatorError, UsageError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

PROTOCOLS = ("auto", "linux", "pvh", "multiboot", "bios")


@dataclass(frozen=True)
class BootOptions:
    """How to boot.

    ``rom_base`` is the physical address of ``rom``, which is placed and
    initialised before the kernel; for a BIOS image the ROM sits on a PCI card
    instead (see ``BoardOptions.roms``), where the BIOS finds it.
    """

    append: str = ""
    initrd: bytes | None = None
    rom: bytes | None = None
    rom_base: int = ROM_AREA
    protocol: str = "auto"


def protocol_of(data: bytes) -> str:
    """What an image is: ``multiboot``, ``linux``, ``bios``; "" if nothing we know."""
    if data[:4] == b"\x7fELF":
        return "multiboot" if multiboot.find_header(data) is not None else "linux"
    if data[0x202:0x206] == b"HdrS":
        return "linux"
    if multiboot.find_header(data) is not None:
        return "multiboot"
    return "bios" if rawrom.looks_like_bios(data) else ""


def boot(machine: Machine, data: bytes, options: BootOptions, file: str = "image") -> Services | None:
    """Load an image and enter it; returns the host-side BIOS services, None for a BIOS of its own.

    Raises :class:`EmulatorError` or :class:`RomError` for what does not load,
    :class:`UsageError` for options that the protocol has no place for.
    """
    protocol = protocol_of(data) if options.protocol == "auto" else options.protocol
    if not protocol:
        raise EmulatorError(
            "not a kernel or a BIOS image: neither ELF, bzImage, Multiboot nor a ROM with a reset vector",
            file=file,
        )
    if protocol == "bios":
        if options.append or options.initrd is not None:
            raise UsageError("a BIOS image takes no command line and no initrd", file=file)
        rawrom.boot(machine, data, file)
        return None
    services = install_bios(machine)
    if options.rom is not None:
        option_rom.place(machine, options.rom, options.rom_base)
        run_option_roms(machine, services)
    if protocol == "multiboot":
        header = multiboot.find_header(data)
        if header is None:
            raise EmulatorError("no Multiboot header in the first 8192 bytes", file=file)
        multiboot.boot(machine, data, header, options.append, options.initrd, file)
    elif protocol == "pvh":
        pvh.boot(machine, elf.parse(data, file), options.append, options.initrd, file)
    elif data[:4] == b"\x7fELF":
        linux.boot_elf(machine, elf.parse(data, file), options.append, options.initrd, file)
    else:
        image = linux.parse_bzimage(data, file)
        linux.boot_bzimage(machine, image, options.append, options.initrd, file)
    return services


def install_bios(machine: Machine) -> Services:
    """The host-side BIOS with its services."""
    bios.install(machine)
    services = Services(machine)
    services.attach()
    return services


def run_option_roms(machine: Machine, services: Services) -> None:
    """Initialise every ROM of the area in turn, then write-protect them."""
    bdf = 3 << 3
    for rom in option_rom.scan(machine.memory.read(ROM_AREA, ROM_AREA_END - ROM_AREA)):
        option_rom.initialise(machine, services, rom, bdf)
        bdf += 1 << 3
    option_rom.seal(machine)
