"""A unified kernel image: an EFI program with a kernel in its section ``.linux``.

Read are the two offsets and the section table of the PE format (Microsoft, "PE Format"; the sections' names:
UAPI group's "Unified Kernel Image" specification).  Imports errors.
"""

from __future__ import annotations

import struct
from mmap import mmap

from vmipatch.errors import ImageError

_MZ, _PE = b"MZ", b"PE\0\0"
_LFANEW, _ZBOOT, _ZBOOT_AT = 0x3C, b"zimg", 4
_COFF = struct.Struct("<HHIIIHH")  # Machine, NumberOfSections, ..., SizeOfOptionalHeader, Characteristics
# Name, VirtualSize, VirtualAddress, SizeOfRawData, PointerToRawData, and 16 bytes that do not matter here.
_SECTION = struct.Struct("<8sIIII16x")
_KERNEL = b".linux"
_XEN = b"(XEN) \0"


def is_program(data: bytes | mmap) -> bool:
    """Whether a file begins as an EFI program does."""
    return data[:2] == _MZ


def kernel(data: bytes | mmap, path: str) -> tuple[int, int]:
    """Offset and size in bytes of the kernel in an EFI program.

    Raises :class:`ImageError` for one that has none, and for headers that lie.
    """
    if data[_ZBOOT_AT : _ZBOOT_AT + 4] == _ZBOOT:
        raise ImageError("an EFI zboot image, which no x86 kernel comes in", file=path, offset=_ZBOOT_AT)
    at = int.from_bytes(data[_LFANEW : _LFANEW + 4], "little")
    if data[at : at + 4] != _PE or at + 4 + _COFF.size > len(data):
        raise ImageError("an EFI program cut short, or a DOS one", file=path, offset=_LFANEW)
    _, count, _, _, _, optional, _ = _COFF.unpack_from(data, at + 4)
    table = at + 4 + _COFF.size + optional
    if table + count * _SECTION.size > len(data):
        raise ImageError(f"{count} section headers reach past the end of the file", file=path, offset=table)
    for row in range(table, table + count * _SECTION.size, _SECTION.size):
        name, memory, _, size, offset = _SECTION.unpack_from(data, row)
        if name.rstrip(b"\0") == _KERNEL:
            # The file's size is rounded up to its alignment.
            size = min(size, memory) if memory else size
            if not size or offset + size > len(data):
                raise ImageError(
                    f"{size} bytes at offset {offset:#x} are none, or reach past the end of the file",
                    file=path, section=".linux", offset=row,
                )  # fmt: skip
            return offset, size
    if data[:].find(_XEN) >= 0:
        raise ImageError("the Xen hypervisor as an EFI program, no Linux kernel", file=path, offset=0)
    raise ImageError("an EFI program without a Linux kernel in it (it has no section .linux)", file=path, offset=table)
