"""Where an image's symbols come from: what reads each origin when it is first asked for.

Imports errors and its sisters in ``image/``; knows the parts of an image, not
the image.
"""

from __future__ import annotations

from mmap import mmap
from os import PathLike

from vmipatch.errors import ImageError
from vmipatch.image import exports, kallsyms, symtab, systemmap
from vmipatch.image.kallsyms import Kallsyms
from vmipatch.image.model import Section, SectionMap
from vmipatch.image.symbols import Loader, Table


def loaders(
    *,
    path: str,
    bits: int,
    data: bytes | mmap,
    memory: bytes | bytearray | mmap,
    sections: tuple[Section, ...],
    section_map: SectionMap,
    windows: list[tuple[int, int]],
    module: bool,
    system_map: str | PathLike[str] | None,
) -> dict[str, Loader]:
    """The reader of each origin that an image of these parts can have, by the origin's name.

    ``memory`` is ``data`` with a module's relocations applied; ``windows`` are
    the ranges of offsets in which kallsyms is looked for.
    """

    def read_symtab() -> Table:
        rows = symtab.read(data, path, bits, sections)
        return Table(symtab.placed(rows, sections, relocatable=module))

    def read_exports() -> Table:
        found = exports.read(sections, bits, lambda s: bytes(memory[s.offset : s.offset + s.file_size]))
        return Table((address, 0, kind(address), name) for name, address in found.items())

    def kind(address: int) -> str:
        section = section_map.at(address)
        return symtab.kind(section).upper() if section else "A"

    def read_kallsyms() -> Kallsyms | None:
        return kallsyms.find(data, bits, windows)

    def read_system_map() -> Table:
        assert system_map is not None
        table = Table(systemmap.read(system_map))
        exported = read_exports().by_name
        shared = [name for name in exported if name in table.by_name]
        wrong = [name for name in shared if table.by_name[name] != exported[name]]
        if len(wrong) * 2 > len(shared):
            name = min(wrong, key=exported.__getitem__)
            raise ImageError(
                f"this System.map is of another kernel than {path}: {name} is at "
                f"{table.by_name[name]:#x} in the one, at {exported[name]:#x} in the other",
                file=system_map,
            )
        return table

    found: dict[str, Loader] = {"symtab": read_symtab, "exports": read_exports}
    # A module has no kallsyms of its own.
    if not module:
        found["kallsyms"] = read_kallsyms
    if system_map is not None:
        found["System.map"] = read_system_map
    return found
