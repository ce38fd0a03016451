"""From a file to an :class:`Image`: what container it is, decided by its content and never by its name.

Imports errors and its sisters in ``image/``.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from mmap import ACCESS_READ, mmap
from os import PathLike, fspath

from vmipatch.errors import ImageError
from vmipatch.image import bundled, bzimage, decompress, elf, kallsyms, kaslr, module, pe, raw, reconstruct, symtab
from vmipatch.image.image import Image
from vmipatch.image.model import AddressMap, Section, Segment, without_data

StrPath = str | PathLike[str]
# CONFIG_PHYSICAL_ALIGN of the kernels whose bzImage holds no ELF file (Linux before 2.6.26): they
# are linked at PAGE_OFFSET and a multiple of this.
_OLD_ALIGN = 0x100000


def open_image(path: StrPath, *, base: int | None = None, system_map: StrPath | None = None) -> Image:
    """Open a kernel image: an ELF file, a bzImage, a module, one of these compressed, or raw memory.

    With ``base`` the file is raw memory from that virtual address on, whatever
    it looks like.  ``system_map`` is a System.map of the same kernel, read when
    symbols are first asked for.  Raises :class:`ImageError` when the file
    cannot be read, is none of these, or is damaged, and :class:`UsageError`
    when raw memory does not fit at its base.  The file is mapped, not copied:
    it must not be cut short while the image is in use.
    """
    name = fspath(path)
    file = _map(name)
    if base is not None:
        bits, segment = raw.segment(base, len(file), file=name)
        # No kernel is larger: a dump of a whole memory is not searched for one.
        table = None
        if len(file) <= decompress.MAX_UNPACKED:
            table = kallsyms.find(file, bits, [(0, len(file))], lambda offset: base + offset)
        return Image(
            path=name, container="raw", bits=bits, data=file, file=file, segments=(segment,), system_map=system_map,
            sections=reconstruct.memory(file, segment, bits, table) if table is not None else (),
            reconstructed=table is not None,
        )  # fmt: skip
    if file[:4] == elf.MAGIC:
        return _elf(name, file, file, system_map)
    if bzimage.is_bzimage(file):
        return _bzimage(name, file, system_map)
    if pe.is_program(file):
        return _unified(name, file, system_map)
    format = decompress.sniff(file[:16])
    if format is not None:
        return _elf(name, file, decompress.unpack(file[:], format, file=name), system_map, format)
    raise ImageError(
        "not an ELF file, a bzImage, a unified kernel image or a compressed ELF file "
        "(raw memory needs its base address)",
        file=name, offset=0,
    )  # fmt: skip


def _map(path: str) -> mmap:
    try:
        # O_NONBLOCK: a pipe must be refused below, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file", file=path)
            if status.st_size == 0:
                raise ImageError("the file is empty", file=path, offset=0)
            return mmap(descriptor, 0, access=ACCESS_READ)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"cannot read the file: {reason}", file=path) from error


def _elf(
    name: str,
    file: mmap,
    data: bytes | mmap,
    system_map: StrPath | None,
    compression: str | None = None,
    payload: bzimage.Payload | None = None,
) -> Image:
    headers = elf.parse(data, name)
    if headers.type == elf.ET_DYN and payload is None:
        bundle = bundled.find(data, name, headers)
        if bundle is not None:
            segment, found = bundle
            return Image(
                path=name, container="raw", bits=headers.bits, data=data, file=file, sections=found,
                segments=(segment,), compression=compression, system_map=system_map, reconstructed=True,
            )  # fmt: skip
    sections = without_data(headers.sections, headers.segments)
    code = [s for s in sections if s.exec and s.alloc and s.size]
    if code and not any(s.file_size for s in code):
        raise ImageError(
            "a separate debug file: its sections have no bytes (give the image that it was made from)",
            file=name, section=code[0].name, offset=0,
        )  # fmt: skip
    container = "elf" if payload is None else payload.container
    linked = None
    if headers.type == elf.ET_REL and payload is None:
        container = "module"
        sections = module.place(headers, name)
        symbols = symtab.read(data, name, headers.bits, sections)
        linked = module.Linked(data, name, headers.bits, sections, symbols)
    elif headers.type not in (elf.ET_EXEC, elf.ET_DYN):
        raise ImageError(
            f"an ELF file that is neither a kernel nor a module (e_type {headers.type})", file=name, offset=16
        )
    reconstructed = not sections and bool(headers.segments)
    if reconstructed:
        sections = _made_up(data, headers.bits, headers.segments)
    image = Image(
        path=name, container=container, bits=headers.bits, data=data, file=file, sections=sections,
        segments=headers.segments, compression=compression, payload=payload, elf_size=headers.end,
        entry=headers.entry, linked=linked, system_map=system_map, reconstructed=reconstructed,
    )  # fmt: skip
    if payload is not None and headers.end < len(data) and image.relocations is None:
        raise ImageError(
            f"the {len(data) - headers.end} bytes behind the payload's ELF file are no relocation table",
            file=name, offset=payload.offset,
        )  # fmt: skip
    return image


def _made_up(data: bytes | mmap, bits: int, segments: tuple[Segment, ...]) -> tuple[Section, ...]:
    place = AddressMap((s.offset, s.address, s.file_size) for s in segments).find
    return reconstruct.sections(data, segments, kallsyms.find(data, bits, [(0, len(data))], place))


def _unified(name: str, file: mmap, system_map: StrPath | None) -> Image:
    begin, size = pe.kernel(file, name)
    kernel = file[begin : begin + size]
    if not bzimage.is_bzimage(kernel):
        raise ImageError("the section .linux holds no bzImage", file=name, section=".linux", offset=begin)
    try:
        payload, data = bzimage.unpack(kernel, name)
    except ImageError as error:
        error.offset = None if error.offset is None else error.offset + begin
        raise
    payload = replace(payload, offset=payload.offset + begin, begin=begin, end=begin + size, container="uki")
    return _payload(name, file, payload, data, system_map)


def _bzimage(name: str, file: mmap, system_map: StrPath | None) -> Image:
    payload, data = bzimage.unpack(file, name)
    return _payload(name, file, payload, data, system_map)


def _payload(name: str, file: mmap, payload: bzimage.Payload, data: bytes, system_map: StrPath | None) -> Image:
    if data[:4] == elf.MAGIC:
        return _elf(name, file, data, system_map, payload.compression, payload)
    # An old kernel's payload is its bare memory, whose address its own symbols know; of a relocatable one the
    # table of what moves follows.
    for bits in (32, 64):
        table = kallsyms.find(data, bits, [(0, len(data))], lambda _: None)
        if table is not None:
            base = table.addresses[0] - table.addresses[0] % _OLD_ALIGN
            size = kaslr.start(data, base) if bits == 32 else len(data)
            _, segment = raw.segment(base, size, file=name)
            sections = reconstruct.memory(data, segment, bits, table)
            return Image(
                path=name, container=payload.container, bits=bits, data=data, file=file, sections=sections,
                segments=(segment,), compression=payload.compression, payload=payload,
                elf_size=size if size < len(data) else 0, system_map=system_map, reconstructed=True,
            )  # fmt: skip
    raise ImageError(
        "the payload is no ELF file and has no symbols that tell its address (unpack it and give its base)",
        file=name, offset=payload.offset,
    )  # fmt: skip
