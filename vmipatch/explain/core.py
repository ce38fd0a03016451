"""ELF core files: where each segment's bytes belong, and what the notes say.

QEMU's ``dump-guest-memory``, kdump's vmcore and /proc/kcore.  Formats: System V
gABI chapter 5; the QEMU note is ``QEMUCPUState`` of QEMU's
target/i386/arch_dump.c; VMCOREINFO is text (kernel documentation,
admin-guide/kdump/vmcoreinfo).  Imports errors only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from vmipatch.errors import ImageError

MAGIC = b"\x7fELF"
ET_CORE = 4
_PT_LOAD, _PT_NOTE = 1, 4
_PN_XNUM = 0xFFFF
_HEADER = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_SEGMENT = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}
_MOST_NOTES = 1 << 24
# No machine's memory is cut into more pieces; a hostile header may claim them.
_MOST_SEGMENTS = 100_000
# QEMUCPUState: version, size, 16 general registers, rip, rflags, ten segments of 24 bytes, cr[5].
_QEMU_CR = 8 + 16 * 8 + 2 * 8 + 10 * 24


class Load(NamedTuple):
    """One PT_LOAD: ``size`` bytes at file ``offset``; ``virtual`` and ``physical`` are None where it does not say."""

    virtual: int | None
    physical: int | None
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Core:
    """A core file's segments, and ``missing`` bytes of them past the end of the file.

    CR3 of each CPU where QEMU noted it; VMCOREINFO as names and values.
    """

    loads: tuple[Load, ...]
    missing: int
    cr3: tuple[int, ...]
    info: dict[str, str]


def parse(file: BinaryIO, size: int, path: str) -> Core:
    """Read the headers and notes of a core file of ``size`` bytes.

    Raises :class:`ImageError` for an ELF file that is no core, for another
    machine, and for headers that reach past the end of the file.
    """
    head = file.read(64)
    bits = {1: 32, 2: 64}.get(head[4]) if len(head) > 20 else None
    if bits is None or head[5] != 1 or len(head) < 16 + _HEADER[bits].size:
        raise ImageError("not a little-endian ELF core file", file=path, offset=0)
    kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, *_ = _HEADER[bits].unpack_from(head, 16)
    if kind != ET_CORE:
        raise ImageError(f"an ELF file that is no core (e_type {kind}): this is no memory dump", file=path, offset=16)
    if machine not in (3, 6, 62):
        raise ImageError(f"a core of another machine (e_machine {machine})", file=path, offset=18)
    form = _SEGMENT[bits]
    if phentsize != form.size:
        raise ImageError(f"program headers of {phentsize} bytes, not {form.size}", file=path, offset=phoff)
    if phnum == _PN_XNUM and shoff:
        # More segments than the header can count: sh_info of the first section header counts them.
        file.seek(shoff + (28 if bits == 32 else 44))
        phnum = int.from_bytes(file.read(4), "little")
    if phnum > _MOST_SEGMENTS or phoff + phnum * form.size > size:
        raise ImageError(f"{phnum} program headers reach past the end of the file", file=path, offset=phoff)
    file.seek(phoff)
    loads, notes, missing = [], b"", 0
    for row in form.iter_unpack(file.read(phnum * form.size)):
        if bits == 32:
            kind, offset, virtual, physical, length, *_ = row
        else:
            kind, _, offset, virtual, physical, length, *_ = row
        if kind == _PT_NOTE:
            if offset + length > size:
                raise ImageError("its notes lie past the end of the file: cut short", file=path, offset=offset)
            file.seek(offset)
            notes += file.read(min(length, _MOST_NOTES))
        elif kind == _PT_LOAD and length:
            # What is cut off is missed when the text is read: /proc/kcore claims more than it has.
            missing += max(0, offset + length - max(size, offset))
            loads.append((virtual, physical, offset, max(0, min(length, size - offset))))
    cr3, info = read_notes(notes)
    zeros = sum(physical == 0 and virtual != 0 for virtual, physical, _, _ in loads)
    return Core(tuple(_load(row, bits, zeros) for row in loads), missing, cr3, info)


def _load(row: tuple[int, int, int, int], bits: int, zeros: int) -> Load:
    """One segment; ``zeros`` is how many of them say that they lie at physical address 0."""
    virtual, physical, offset, size = row
    # Without paging QEMU knows no virtual addresses and writes 0 or the physical one; kcore writes -1 where a
    # segment has no one physical address, and older ones write 0 in all of them.
    unknown_virtual = virtual in (0, physical)
    unknown_physical = physical == (1 << bits) - 1 or (physical == 0 and virtual != 0 and zeros > 1)
    return Load(None if unknown_virtual else virtual, None if unknown_physical else physical, offset, size)


def read_notes(data: bytes) -> tuple[tuple[int, ...], dict[str, str]]:
    """CR3 of each CPU, from QEMU's notes, and VMCOREINFO."""
    cr3: list[int] = []
    info: dict[str, str] = {}
    at = 0
    while at + 12 <= len(data):
        name_size, size, _ = struct.unpack_from("<III", data, at)
        start = at + 12 + (name_size + 3 & ~3)
        name = data[at + 12 : at + 12 + name_size].rstrip(b"\0")
        body = data[start : start + size]
        if name == b"QEMU" and len(body) >= _QEMU_CR + 40:
            cr3.append(int.from_bytes(body[_QEMU_CR + 24 : _QEMU_CR + 32], "little"))
        elif name == b"VMCOREINFO":
            info |= vmcoreinfo(body)
        at = start + (size + 3 & ~3)
    return tuple(cr3), info


def vmcoreinfo(body: bytes) -> dict[str, str]:
    """VMCOREINFO's lines as names and values."""
    rows = (line.partition("=") for line in body.decode("ascii", "replace").splitlines())
    return {key: value for key, equals, value in rows if equals}
