"""A kernel inside a shared library: libkrunfw, which virtual machine monitors load, has one as its data.

The library's symbol ``KERNEL_BUNDLE`` names the bytes: the kernel's segments one behind the other as they lie in
memory, without an ELF header (seen in libkrunfw 5.6.1).  At which virtual address they belong the kernel's own
symbols say.  Imports errors and its sisters in ``image/``.
"""

from __future__ import annotations

import struct
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image import kallsyms, raw, reconstruct
from vmipatch.image.elf import Elf
from vmipatch.image.model import Section, Segment
from vmipatch.image.pageoffset import START_KERNEL_MAP

_SYMBOL = b"KERNEL_BUNDLE"
_SHT_DYNSYM = 11
# st_name, st_info, st_other, st_shndx, st_value, st_size (System V gABI, 64 bits).
_ENTRY = struct.Struct("<IBBHQQ")
_MAX_SYMBOLS = 1 << 16
# A kernel is linked at a multiple of CONFIG_PHYSICAL_ALIGN, of 2 MiB at least on x86-64.
_ALIGN = 1 << 21


def find(data: bytes | mmap, path: str, headers: Elf) -> tuple[Segment, tuple[Section, ...]] | None:
    """Where the kernel lies and its made-up sections; None for a file that carries none.

    Raises :class:`ImageError` for a bundle whose kernel does not tell its address.
    """
    place = _symbol(data, headers) if headers.bits == 64 else None
    if place is None:
        return None
    start, size = place
    # Symbols that count from their own place (7.0 on) tell no address.
    table = kallsyms.find(data, 64, [(start, start + size)], lambda _: None)
    if table is None:
        raise ImageError("the kernel in this library has no symbols that tell its address", file=path, offset=start)
    base = next(a for a in table.addresses if a >= START_KERNEL_MAP)
    base -= base % _ALIGN
    _, segment = raw.segment(base, size, file=path)
    segment = Segment(base, segment.physical, start, size, size, segment.flags)
    return segment, reconstruct.sections(data, (segment,), table)


def _symbol(data: bytes | mmap, headers: Elf) -> tuple[int, int] | None:
    """Offset and size in bytes of what the symbol names."""
    table = next((s for s in headers.sections if s.type == _SHT_DYNSYM), None)
    if table is None or table.size // _ENTRY.size > _MAX_SYMBOLS:
        return None
    names = next((s for s in headers.sections if s.index == table.link), None)
    if names is None or not names.file_size:
        return None
    strings = data[names.offset : names.offset + names.size]
    blob = data[table.offset : table.offset + table.size - table.size % _ENTRY.size]
    for name, _, _, index, value, size in _ENTRY.iter_unpack(blob):
        if strings[name : name + len(_SYMBOL) + 1] == _SYMBOL + b"\0":
            holder = next((s for s in headers.sections if s.index == index), None)
            if holder is None or not (holder.address <= value and value + size <= holder.address + holder.file_size):
                return None
            return holder.offset + value - holder.address, size
    return None
