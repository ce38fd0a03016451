"""ELF headers: what an ELF file says about itself, every number checked against the file's size.

Read with ``struct`` and not with an ELF library because a scan of a whole
kernel may take half a second and the library alone takes a tenth to import;
the libraries (and readelf) are what the tests compare this reader with.
Field layouts: System V gABI chapters 4 and 5.  Imports errors and image.model.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image.model import PT_LOAD, SHT_NOBITS, Section, Segment
from vmipatch.image.text import printable

MAGIC = b"\x7fELF"
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
EM_386, EM_486, EM_X86_64 = 3, 6, 62
SHN_XINDEX = 0xFFFF

# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum,
# e_shentsize, e_shnum, e_shstrndx; after the 16 bytes of e_ident.
_HEADER = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
# sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize.
_SECTION = {32: struct.Struct("<10I"), 64: struct.Struct("<IIQQQQIIQQ")}
# 32: p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align;
# 64: p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
_SEGMENT = {32: struct.Struct("<8I"), 64: struct.Struct("<IIQQQQQQ")}

# A kernel has some sixty sections, a module built with a section per function some thousands.
MAX_SECTIONS = 100_000


@dataclass(frozen=True, slots=True)
class Elf:
    """The headers of one ELF file; ``end`` is the offset just after its last byte that a header names."""

    bits: int
    type: int
    machine: int
    entry: int
    sections: tuple[Section, ...]
    segments: tuple[Segment, ...]
    end: int


def parse(data: bytes | mmap, path: str) -> Elf:
    """Read the headers of an x86 or x86-64 ELF file.

    ``path`` is for errors only.  Raises :class:`ImageError`, with the offset of
    the header that is wrong, for another machine, another byte order and for
    every header or section that reaches past the end of the file.
    """
    ident = data[:16]
    if len(ident) < 16 or ident[:4] != MAGIC:
        raise ImageError("not an ELF file, or cut short in its first 16 bytes", file=path, offset=0)
    bits = {1: 32, 2: 64}.get(ident[4])
    if bits is None or ident[5] != 1:
        raise ImageError("not a little-endian ELF file of 32 or 64 bits", file=path, offset=4)
    header = _HEADER[bits]
    if len(data) < 16 + header.size:
        raise ImageError("cut short in the ELF header", file=path, offset=len(data))
    (kind, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx) = header.unpack_from(
        data, 16
    )
    if machine not in ((EM_386, EM_486) if bits == 32 else (EM_X86_64,)):
        raise ImageError(f"an ELF file for another machine (e_machine {machine})", file=path, offset=18)
    sections, sections_end = _sections(data, path, bits, shoff, shentsize, shnum, shstrndx)
    segments, segments_end = _segments(data, path, bits, phoff, phentsize, phnum)
    end = max(16 + header.size, sections_end, segments_end)
    return Elf(bits, kind, machine, entry, sections, segments, end)


def _sections(
    data: bytes | mmap, path: str, bits: int, shoff: int, shentsize: int, shnum: int, shstrndx: int
) -> tuple[tuple[Section, ...], int]:
    if shoff == 0:
        return (), 0
    form = _SECTION[bits]
    if shentsize != form.size:
        raise ImageError(f"section headers of {shentsize} bytes, not {form.size}", file=path, offset=shoff)
    if shoff + form.size > len(data):
        raise ImageError("the section headers lie past the end of the file", file=path, offset=shoff)
    first = form.unpack_from(data, shoff)
    # gABI: too many sections for the header's fields are counted in the first section header.
    shnum = shnum or first[5]
    if shstrndx == SHN_XINDEX:
        shstrndx = first[6]
    if shnum > MAX_SECTIONS:
        raise ImageError(f"{shnum} sections are more than any kernel has", file=path, offset=shoff)
    if shoff + shnum * form.size > len(data):
        raise ImageError(f"{shnum} section headers reach past the end of the file", file=path, offset=shoff)
    raw = list(form.iter_unpack(data[shoff : shoff + shnum * form.size]))
    names = b""
    if shstrndx:
        if shstrndx >= shnum or raw[shstrndx][1] == SHT_NOBITS:
            raise ImageError(f"section {shstrndx} cannot hold the section names", file=path, offset=shoff)
        where, size = raw[shstrndx][4:6]
        if where + size > len(data):
            raise ImageError("the section names lie past the end of the file", file=path, offset=where)
        names = data[where : where + size]
    found = []
    end = shoff + shnum * form.size
    for i, (name, kind, flags, address, offset, size, link, info, align, entsize) in enumerate(raw):
        text = _name(names, name)
        if kind not in (SHT_NOBITS, 0):
            if offset + size > len(data):
                raise ImageError(
                    f"{size} bytes at offset {offset:#x} reach past the end of the file ({len(data):#x})",
                    file=path, section=text, offset=shoff + i * form.size,
                )  # fmt: skip
            end = max(end, offset + size)
        found.append(Section(text, address, offset, size, flags, kind, link, info, align, entsize, i))
    # gABI: number 0 is no section.
    return tuple(found[1:]), end


def _name(names: bytes, at: int) -> str:
    stop = names.find(b"\0", at, at + 1000)
    return printable(names[at : stop if stop >= 0 else at + 1000])


def _segments(
    data: bytes | mmap, path: str, bits: int, phoff: int, phentsize: int, phnum: int
) -> tuple[tuple[Segment, ...], int]:
    if phoff == 0 or phnum == 0:
        return (), 0
    form = _SEGMENT[bits]
    if phentsize != form.size:
        raise ImageError(f"program headers of {phentsize} bytes, not {form.size}", file=path, offset=phoff)
    end = phoff + phnum * form.size
    if end > len(data):
        raise ImageError(f"{phnum} program headers reach past the end of the file", file=path, offset=phoff)
    found = []
    for i, row in enumerate(form.iter_unpack(data[phoff:end])):
        if bits == 32:
            kind, offset, virtual, physical, file_size, memory_size, flags, _ = row
        else:
            kind, flags, offset, virtual, physical, file_size, memory_size, _ = row
        if kind != PT_LOAD:
            continue
        where = phoff + i * form.size
        if offset + file_size > len(data):
            raise ImageError(
                f"a segment of {file_size} bytes at offset {offset:#x} reaches past the end of the file",
                file=path, offset=where,
            )  # fmt: skip
        if file_size > memory_size:
            raise ImageError("a segment has more bytes in the file than in memory", file=path, offset=where)
        end = max(end, offset + file_size)
        found.append(Segment(virtual, physical, offset, file_size, memory_size, flags))
    return tuple(found), end
