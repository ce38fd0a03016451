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
from vmipatch.image.symtab import SymbolTable


def loaders(
    *,
    path: str,
    bits: int,
    data: bytes | mmap,
    memory: bytes | bytearray | mmap,
    sections: tuple[Section, ...],
    section_map: SectionMap,
    windows: list[tuple[int, int]],
    place: kallsyms.Place,
    module: bool,
    system_map: str | PathLike[str] | None,
) -> dict[str, Loader]:
    """The reader of each origin that an image of these parts can have, by the origin's name.

    ``memory`` is ``data`` with a module's relocations applied; ``windows`` are
    the ranges of offsets in which kallsyms is looked for; ``place`` gives the
    virtual address of an offset.
    """

    def read_symtab() -> SymbolTable:
        return SymbolTable(symtab.read(data, path, bits, sections), sections, relocatable=module)

    def exported() -> dict[str, int]:
        return exports.read(sections, bits, lambda s: bytes(memory[s.offset : s.offset + s.file_size]))

    def read_exports() -> Table:
        return Table(((address, 0, "", name) for name, address in exported().items()), kind)

    def kind(address: int) -> str:
        section = section_map.at(address)
        return symtab.kind(section).upper() if section else "A"

    def read_kallsyms() -> Kallsyms | None:
        return kallsyms.find(data, bits, windows, place)

    def read_system_map() -> Table:
        assert system_map is not None
        table = Table(systemmap.read(system_map))
        pairs = {name: (table.lookup(name), address) for name, address in exported().items()}
        shared = {name: pair for name, pair in pairs.items() if pair[0] is not None}
        wrong = {name: pair for name, pair in shared.items() if pair[0] != pair[1]}
        if len(wrong) * 2 > len(shared):
            name, (there, here) = min(wrong.items(), key=lambda item: item[1][1])
            raise ImageError(
                f"this System.map is of another kernel than {path}: {name} is at {there:#x} in the one, "
                f"at {here:#x} in the other",
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
