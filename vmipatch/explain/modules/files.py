"""The files of a kernel's modules: which there are below a folder, and which of them is the one that was loaded.

A folder is ``lib/modules/VERSION`` as a distribution has it, files compressed or
not.  Only names are read to begin with; a file is unpacked when a loaded
module asks for it.  Imports image, errors and facts.
"""

from __future__ import annotations

import os
import struct
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from vmipatch.errors import ImageError, UsageError
from vmipatch.image import decompress, elf
from vmipatch.image.model import Section

_ENDINGS = (".ko", ".ko.xz", ".ko.zst", ".ko.gz", ".ko.bz2", ".ko.lzma", ".ko.lz4")
_MOST_FILES = 200_000
_NT_GNU_BUILD_ID = 3


class ModuleFile(NamedTuple):
    """A module's file, unpacked: ``sections`` as it has them, without addresses."""

    path: str
    data: bytes
    bits: int
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((s for s in self.sections if s.name == name), None)

    def bytes_of(self, section: Section) -> bytes:
        """What the file has of a section."""
        return self.data[section.offset : section.offset + section.file_size]


class Files:
    """The modules below a folder, by name; raises :class:`UsageError` where there is no such folder.

    It is looked through when it is first asked for one: a kernel that has loaded none needs none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UsageError("no folder of modules", file=folder)

    @cached_property
    def _paths(self) -> dict[str, list[tuple[str, str]]]:
        """Folder and file of each, by name."""
        found: dict[str, list[tuple[str, str]]] = {}
        count = 0
        for place, folders, files in os.walk(self.folder):
            # The source and build trees that hang there hold no modules that this kernel loads.
            folders[:] = sorted(f for f in folders if f not in ("build", "source"))
            count += len(files)
            if count > _MOST_FILES:
                raise UsageError(
                    f"more than {_MOST_FILES} files: not a folder of one kernel's modules", file=self.folder
                )
            for file in files:
                name = name_of(file)
                if name is not None:
                    found.setdefault(name, []).append((place, file))
        return found

    def __len__(self) -> int:
        return len(self._paths)

    def names(self) -> list[str]:
        """The names of all modules, as the kernel writes them."""
        return sorted(self._paths)

    def candidates(self, name: str) -> list[Path]:
        """The files of a module's name; those that replace others (``updates``) first, as depmod has them."""
        found = [Path(place, file) for place, file in self._paths.get(name.replace("-", "_"), ())]
        return sorted(found, key=lambda p: ("updates" not in p.parts, str(p)))


def open_module(path: Path) -> ModuleFile:
    """A module's file; raises :class:`ImageError` for one that cannot be read, is damaged or is no module."""
    name = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read the file: {error.strerror}", file=path) from error
    format = decompress.sniff(data[:16])
    if format is not None:
        data = decompress.unpack(data, format, file=name)
    headers = elf.parse(data, name)
    if headers.type != elf.ET_REL:
        raise ImageError(f"not a kernel module (e_type {headers.type})", file=path, offset=16)
    return ModuleFile(name, data, headers.bits, headers.sections)


def name_of(file: str) -> str | None:
    """The module's name as its kernel writes it, by its file's; None for another file."""
    for ending in _ENDINGS:
        if file.endswith(ending):
            return file.removesuffix(ending).replace("-", "_")
    return None


def beside(image: str) -> Path | None:
    """The folder of modules that lies beside an image, where its package puts both; None where there is none.

    ``/boot/vmlinuz-V`` has ``/lib/modules/V`` or ``/usr/lib/modules/V``; some put the image into that folder.
    """
    path = Path(image).absolute()
    if path.parent.parent.name == "modules" and path.parent.parent.parent.name == "lib":
        return path.parent
    for prefix in ("vmlinuz-", "vmlinux-", "vmlinux.", "bzImage-"):
        if path.name.startswith(prefix):
            version = path.name.removeprefix(prefix)
            for lib in ("lib", "usr/lib"):
                folder = path.parent.parent / lib / "modules" / version
                if folder.is_dir():
                    return folder
    return None


def build_id(notes: bytes) -> bytes | None:
    """The GNU build ID in a section of notes; None where it has none."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        body = at + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0" and body + size <= len(notes):
            return notes[body : body + size]
        at = body + (size + 3 & ~3)
    return None


def modinfo(file: ModuleFile, key: str) -> str | None:
    """What a module's ``.modinfo`` says of a key: the first value."""
    section = file.section(".modinfo")
    wanted = key.encode() + b"="
    for row in file.bytes_of(section).split(b"\0") if section is not None else ():
        if row.startswith(wanted):
            return row[len(wanted) :].decode("utf-8", "backslashreplace")
    return None
