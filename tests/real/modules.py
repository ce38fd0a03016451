"""A kernel's modules as its package has them: found by name, unpacked, in the order in which they can be loaded.

What a module needs stands in its own `.modinfo` (packages ship no modules.dep); it is read with pyelftools, and
nothing of the package under test. A module that is built into the kernel has no file and is left out.
"""

from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Iterable
from pathlib import Path

import zstandard
from elftools.elf.elffile import ELFFile


class Modules:
    """The files below `lib/modules/VERSION`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {_name(path.name): path for path in sorted(folder.rglob("*.ko*"))}
        built_in = folder / "modules.builtin"
        lines = built_in.read_text().split() if built_in.exists() else ()
        self._built_in = {_name(line.rpartition("/")[2]) for line in lines}

    def unpacked(self, name: str) -> bytes:
        """The ELF file of a module. Raises KeyError for a name that is no module's."""
        path = self._files[_name(name)]
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
        return data

    def with_dependencies(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """Names and ELF files of the modules and of all that they need, each behind what it needs."""
        done: dict[str, bytes] = {}

        def add(name: str) -> None:
            if name in done or name in self._built_in:
                return
            data = self.unpacked(name)
            for needed in depends(data):
                add(needed)
            done[name] = data

        for name in names:
            add(_name(name))
        return list(done.items())


def depends(module: bytes) -> list[str]:
    """The names behind `depends=` in a module's `.modinfo`."""
    section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    assert section is not None, "a module without .modinfo"
    for field in section.data().split(b"\0"):
        if field.startswith(b"depends="):
            return [_name(name) for name in field[8:].decode().split(",") if name]
    return []


def _name(file: str) -> str:
    return file.partition(".ko")[0].replace("-", "_")
