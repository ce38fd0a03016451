"""The example guest in the emulator: its files, its expected console, and machines that run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import vmipatch
from vmipatch.emu.firmware import boot as firmware
from vmipatch.emu.firmware.boot import BootOptions
from vmipatch.emu.hypervisors import create
from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine
from vmipatch.patch.target import OnRom, rom_at
from vmipatch.rombuild.build import build

FOLDER = Path(__file__).parents[2] / "examples" / "vmi-guest"
ABI = {"rfc-v1": "vmi-13.0", "v2": "vmi-3.0", "mainline": "vmi-3.0", "mainline-pae": "vmi-3.0"}
FORMS = tuple(ABI)
HYPERVISORS = ("native", "vmware", "xen", "kvm", "lguest", "l4ka")
LIMIT = 40_000_000
ROM_PLACE = 0xC0000
PAGE_OFFSET = 0xC0000000
DONE = "vmi-guest: done"
BACKEND = "vmi-guest: backend "
# Lines of calls that only the RFC's interface has.
ONLY_RFC = ("page table entry calls: ok", "long entry calls: ok")


def elf(form: str) -> Path:
    """The committed file of a form."""
    return FOLDER / f"vmi-guest-{form}.elf"


def expected(form: str) -> list[str]:
    """The console of a form, without the line about the back end: tests/real compares it with QEMU's."""
    lines = (FOLDER / "console.txt").read_text().splitlines()
    return [line for line in lines if form == "rfc-v1" or line not in ONLY_RFC]


@cache
def rom(hypervisor: str, abi: str) -> bytes:
    return build(hypervisor, abi).data


def patched(form: str, hypervisor: str, folder: Path) -> Path:
    """The form patched on disk for the ROM of a hypervisor."""
    file, output = folder / f"{hypervisor}.rom", folder / f"{form}-{hypervisor}.elf"
    file.write_bytes(rom(hypervisor, ABI[form]))
    image = vmipatch.open_image(elf(form))
    found = vmipatch.scan(image)
    vmipatch.apply(image, vmipatch.plan(image, found, OnRom(rom_at(image, found, file, ROM_PLACE))), output)
    return output


@dataclass
class Boot:
    """One guest in one machine; ``hypervisor`` None is the bare machine without a ROM."""

    image: Path
    hypervisor: str | None = None
    rom: bytes | None = None
    append: str = ""
    memory: int = 64  # MiB
    machine: Machine = field(init=False)
    _start: int = field(init=False)  # of the guest's own text: a ROM says its name at BIOS time

    def __post_init__(self) -> None:
        self.machine = Machine(BoardOptions(ram_bytes=self.memory << 20, roms=(self.rom,) if self.rom else ()))
        if self.hypervisor is not None:
            create(self.hypervisor).attach(self.machine)
        options = BootOptions(append=self.append, rom=self.rom, rom_base=ROM_PLACE)
        firmware.boot(self.machine, self.image.read_bytes(), options, self.image.name)
        self._start = len(self.machine.board.consoles.serial)

    def run(self, until: str | None = None) -> str:
        """Run to an end (or to a text); the reason."""
        return self.machine.run(LIMIT, until).reason

    @property
    def console(self) -> list[str]:
        text = bytes(self.machine.board.consoles.serial[self._start :]).decode("ascii")
        return text.replace("\r\n", "\n").splitlines()

    @property
    def lines(self) -> list[str]:
        """The console without the line about the back end."""
        return [line for line in self.console if not line.startswith(BACKEND)]

    @property
    def backend(self) -> str:
        (line,) = (line for line in self.console if line.startswith(BACKEND))
        return line.removeprefix(BACKEND)


def on_rom(form: str, hypervisor: str, image: Path | None = None, append: str = "") -> Boot:
    """A form on the ROM of a hypervisor, which stands by."""
    return Boot(image or elf(form), hypervisor, rom(hypervisor, ABI[form]), append)
