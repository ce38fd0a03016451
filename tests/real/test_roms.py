"""Our ROMs in a real BIOS, and other people's ROMs in our inspector.

SeaBIOS (in QEMU) far-calls the 16-bit entry of each ROM; what it left in the guest's memory is then found by the
scan that Linux and every other VMI guest does. The ROMs of Debian's ipxe-qemu and seabios packages go through
`rom inspect`: every image is found and nothing false is said.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import Cli
from .packages import RegistryAway, fetch
from .qemu import Guest, Machine

ROMS = [
    *[(hv, abi) for hv in ("native", "vmware", "xen", "kvm", "lguest", "l4ka") for abi in ("vmi-3.0", "vmi-13.0")],
    ("native", "vmi-6.1"),
    ("l4ka", "vmi-6.1"),
    ("l4ka", "vmi-13.3"),
    ("l4ka", "vmi-13.0-l4ka"),
]
VERSION = {"vmi-3.0": (3, 0), "vmi-13.0": (13, 0), "vmi-13.3": (13, 3), "vmi-13.0-l4ka": (13, 0), "vmi-6.1": (6, 1)}
IMAGE_TYPES = {0: "x86 PC-AT", 3: "EFI"}


@dataclass(frozen=True)
class RomMachine(Machine):
    """A machine without a disk: SeaBIOS, one option ROM, a serial console and a debug console."""

    rom: Path = Path()
    debug: Path = Path()

    def command(self, qmp: Path) -> list[str]:
        return [
            *("qemu-system-i386", "-accel", "tcg", "-m", "64", "-option-rom", str(self.rom), "-serial", "stdio"),
            *("-display", "none", "-vga", "none", "-net", "none", "-no-reboot", "-monitor", "none"),
            *("-chardev", f"file,id=debug,path={self.debug}", "-device", "isa-debugcon,iobase=0x402,chardev=debug"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
        ]


def boot(rom: Path, folder: Path) -> Guest:
    return Guest(RomMachine(Path(), Path(), 32, "", rom=rom, debug=folder / "debug"), folder)


def scan(memory: bytes) -> Iterator[int]:
    """The offsets at which a guest finds a VMI ROM: C0000 to DFFFF in steps of 2 KiB (Linux 2.6.32, vmi_32.c)."""
    for at in range(0, 0x20000, 2048):
        if memory[at : at + 2] == b"\x55\xaa" and memory[at + 8 : at + 12] == struct.pack("<I", 0x696D5663):
            yield at


@pytest.mark.parametrize(("hypervisor", "abi"), ROMS)
def test_seabios_runs_the_entry(hypervisor: str, abi: str, cli: Cli, tmp_path: Path) -> None:
    if shutil.which("qemu-system-i386") is None:
        pytest.skip("qemu-system-i386 is not installed")
    rom = tmp_path / "rom"
    done = cli.run("rom", "build", hypervisor, "--abi", abi, "-o", rom)
    assert done.returncode == 0, done.stderr
    banner = f"{hypervisor} {abi} 1.0\n"
    guest = boot(rom, tmp_path)
    try:
        guest.wait_for(banner.strip(), timeout=60)
        # SeaBIOS goes on behind the ROM: the entry came back.
        for _ in range(120):
            text = (tmp_path / "debug").read_text("latin-1").replace("\r\n", "\n")
            if "No bootable device" in text or "Booting from" in text:
                break
            time.sleep(0.25)
        assert banner in text
        assert "No bootable device" in text or "Booting from" in text, "SeaBIOS did not come back from the entry"
        memory = guest.physical(0xC0000, 0x20000)
    finally:
        guest.close()
    data = rom.read_bytes()
    (found,) = scan(memory)
    assert memory[found : found + len(data)] == data, "the BIOS left the image as it was"
    minor, major = memory[found + 0x0C : found + 0x0E]
    assert (major, minor) == VERSION[abi]
    if major == 3:
        license_at = struct.unpack_from("<H", memory, found + 0x16)[0]
        assert memory[found + license_at :].startswith(b"GPL\0")


INSTALLED = {"ipxe-qemu": "/usr/lib/ipxe/qemu", "seabios": "/usr/share/seabios"}


def roms_of(package: str) -> list[Path]:
    """The files of a Debian package, or of the same package as it is installed here."""
    try:
        tree = fetch(package, "i386")  # of all architectures, so in every list
    except RegistryAway as away:
        tree = Path(INSTALLED[package])
        if not tree.is_dir():
            pytest.skip(f"package {package}: {away}")
    return sorted(p for p in tree.rglob("*") if p.is_file() and p.suffix in (".rom", ".bin") and not p.is_symlink())


def chain(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """(offset, bytes, vendor, device, code type) of every image, read here by the PCI firmware specification."""
    out = []
    at = 0
    while data[at : at + 2] == b"\x55\xaa":
        pointer = struct.unpack_from("<H", data, at + 0x18)[0]
        block = data[at + pointer : at + pointer + 0x18]
        if block[:4] != b"PCIR":
            out.append((at, 512 * data[at + 2], 0, 0, 0))
            break
        vendor, device = struct.unpack_from("<HH", block, 4)
        units = struct.unpack_from("<H", block, 0x10)[0]
        out.append((at, 512 * units, vendor, device, block[0x14]))
        if block[0x15] & 0x80:
            break
        at += 512 * units
    return out


@pytest.mark.parametrize(("package", "least"), [("ipxe-qemu", 15), ("seabios", 8)])
def test_roms_of_debian(package: str, least: int, cli: Cli) -> None:
    files = [p for p in roms_of(package) if p.read_bytes()[:2] == b"\x55\xaa"]
    assert len(files) >= least
    for path in files:
        data = path.read_bytes()
        done = cli.run("rom", "inspect", "--json", path)
        assert done.returncode == 0, f"{path.name}: {done.stdout[-2000:]}{done.stderr}"
        record = json.loads(done.stdout)
        assert record["findings"] == [], path.name
        assert [
            (i["offset"], i["size"], i["pci"]["vendor"] if i["pci"] else 0, i["pci"]["device"] if i["pci"] else 0)
            for i in record["images"]
        ] == [image[:4] for image in chain(data)], path.name
        assert [i["kind"] for i in record["images"]] == [IMAGE_TYPES[image[4]] for image in chain(data)]
        assert sum(i["size"] for i in record["images"]) == len(data)
        assert cli.run("rom", "check", path).stdout == ""


def test_what_is_no_option_rom_is_said_to_be_none(cli: Cli) -> None:
    others = [p for p in roms_of("seabios") if p.read_bytes()[:2] != b"\x55\xaa"]
    assert others
    for path in others:
        done = cli.run("rom", "inspect", path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "not an option ROM" in done.stderr
