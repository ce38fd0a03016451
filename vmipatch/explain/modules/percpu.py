"""Where a module's per-cpu data is, in a kernel whose BTF does not say: by the fields of its text that name it.

The kernel keeps the address in ``struct module`` (``percpu``), and every field that the
loader filled in has it too: what most fields say and what a word of the structure says is the same.
Imports image and its sisters.
"""

from __future__ import annotations

import struct
from collections import Counter

from vmipatch.explain.memory import PAGE
from vmipatch.explain.modules.files import ModuleFile
from vmipatch.explain.modules.view import View
from vmipatch.image.model import SHT_REL, SHT_RELA, Section
from vmipatch.image.symtab import Rows

_MOST_FIELDS = 4096


def base(file: ModuleFile, placed: tuple[Section, ...], rows: Rows, number: int, view: View, module: int) -> int | None:
    """What symbols of section ``number`` are relative to; None where no word of the structure at ``module`` agrees.

    ``placed`` are the sections at running addresses.
    """
    mask = view.mask
    votes: Counter[int] = Counter()
    by_index = {s.index: s for s in placed}
    shift, low = (8, 0xFF) if file.bits == 32 else (32, 0xFFFFFFFF)
    for table in file.sections:
        target = by_index.get(table.info)
        if table.type not in (SHT_REL, SHT_RELA) or target is None or not target.alloc or not target.exec:
            continue
        form = struct.Struct("<II" if table.type == SHT_REL else "<IIi" if file.bits == 32 else "<QQq")
        if file.bits == 64 and table.type == SHT_REL:
            continue
        data = file.bytes_of(table)
        for row in form.iter_unpack(data[: len(data) // form.size * form.size]):
            place, symbol, kind = row[0], row[1] >> shift, row[1] & low
            if symbol >= len(rows.rows) or rows.rows[symbol][3] != number or place + 4 > target.file_size:
                continue
            found = view.read(target.address + place, 4)
            if found is None:
                continue
            at = target.offset + place
            addend = row[2] if len(row) > 2 else int.from_bytes(file.data[at : at + 4], "little", signed=True)
            value = int.from_bytes(found, "little", signed=file.bits == 64) - addend - rows.rows[symbol][1]
            # R_386_PC32, R_386_PLT32, R_X86_64_PC32 and R_X86_64_PLT32 have the same numbers.
            if kind in (2, 4):
                value += target.address + place
            votes[value & mask] += 1
            if votes.total() >= _MOST_FIELDS:
                break
    room = PAGE - module % PAGE
    structure = view.read(module, PAGE) or view.read(module, room) or b""
    words = set(view.words(structure))
    return next((value for value, _ in votes.most_common(4) if value in words), None)
