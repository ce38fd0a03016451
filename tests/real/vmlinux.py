"""A kernel's ELF as GNU readelf and the standard library see it: nothing here is the project's own parser.

Unpacks a bzImage by the boot protocol's payload fields (kernel documentation, arch/x86/boot), names sections
with `readelf`, and finds exported variables through `__ksymtab*`, so that an expected value in these tests
never comes from the code under test.
"""

from __future__ import annotations

import bz2
import functools
import lzma
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A section header: virtual address, file offset and size in bytes."""

    name: str
    address: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


class Vmlinux:
    """An unpacked kernel: sections, physical addresses, exported symbols."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.bits = 64 if self.data[4] == 2 else 32
        self.sections = {section.name: section for section in _readelf_sections(path)}

    def bytes_of(self, name: str) -> bytes:
        section = self.sections[name]
        return self.data[section.offset : section.offset + section.size]

    @property
    def text(self) -> Section:
        """[_text, _etext): in x86's linker script the output section .text begins and ends with the two."""
        return self.sections[".text"]

    @functools.cached_property
    def release(self) -> tuple[int, int]:
        """(6, 1) of "Linux version 6.1.0-50-686"; a release candidate of 7.3 says "7.3-amd64"."""
        match = re.search(rb"Linux version (\d+)\.(\d+)[.-]", self.data)
        assert match is not None, f"{self.path} has no banner"
        return int(match[1]), int(match[2])

    @functools.cached_property
    def loads(self) -> list[tuple[int, int, int, int]]:
        """(virtual, physical, size in memory, file offset) of every PT_LOAD."""
        out = subprocess.run(["readelf", "-lW", self.path], check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^\s+LOAD\s+(\w+) (\w+) (\w+) \w+ (\w+)", out, re.MULTILINE)
        return [(int(v, 16), int(p, 16), int(m, 16), int(o, 16)) for o, v, p, m in found]

    def physical(self, address: int) -> int:
        for virtual, physical, size, _offset in self.loads:
            # The per-CPU segment of x86-64 is linked at 0 and is not where the code runs from.
            if virtual and virtual <= address < virtual + size:
                return address - virtual + physical
        raise LookupError(f"{address:#x} lies in no loaded segment of {self.path}")

    def offset(self, address: int) -> int:
        for section in self.sections.values():
            if section.address and section.address <= address < section.end:
                return address - section.address + section.offset
        raise LookupError(f"{address:#x} lies in no section of {self.path}")

    @functools.cached_property
    def exports(self) -> dict[str, int]:
        """Exported symbols by name. Entries are 12 bytes (value, name, name space), each relative to its own

        field (include/linux/export.h with CONFIG_HAVE_ARCH_PREL32_RELOCATIONS, which x86 selects).
        """
        names = self.sections["__ksymtab_strings"]
        mask = (1 << self.bits) - 1
        out = {}
        for table in ("__ksymtab", "__ksymtab_gpl"):  # one table from 7.1 on
            if table not in self.sections:
                continue
            base = self.sections[table].address
            for index, (value, name, _space) in enumerate(struct.iter_unpack("<3i", self.bytes_of(table))):
                where = base + 12 * index
                value, name = (where + value) & mask, (where + 4 + name) & mask
                start = name - names.address + names.offset
                out[self.data[start : self.data.index(b"\0", start)].decode()] = value
        return out


def unpack(image: Path, target: Path) -> Vmlinux:
    """The vmlinux inside a bzImage, written to `target` unless it is already there; an ELF is one already."""
    if not target.exists():
        data = image.read_bytes()
        if data.startswith(b"\x7fELF"):
            return Vmlinux(image)
        sectors = data[0x1F1] or 4
        offset, length = struct.unpack_from("<II", data, 0x248)
        begin = (sectors + 1) * 512 + offset
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(_decompressed(data[begin : begin + length]))
        partial.rename(target)
    return Vmlinux(target)


def _decompressed(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)  # 31: a gzip header; what follows the stream is left
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    raise ValueError(f"a payload that begins {payload[:6].hex()} is in no format these tests know")


def _readelf_sections(path: Path) -> list[Section]:
    out = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^\s+\[\s*\d+\] (\S+)\s+\S+\s+(\w+) (\w+) (\w+) ", out, re.MULTILINE)
    return [Section(name, int(a, 16), int(o, 16), int(s, 16)) for name, a, o, s in found]
