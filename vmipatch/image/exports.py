"""The symbols that a kernel or a module exports: the ``__ksymtab*`` tables and their names.

Which layout a table has is seen from its names, all of which must lie in the
strings, most of them at the start of one (the linker lets a name that ends
another share its bytes).  include/linux/export.h, export-internal.h and
asm-generic/export.h of the kernels named:

- absolute, to 5.3: value, name, one long each (and 64-bit kernels to 4.18);
- relative, from 4.19 where the architecture has HAVE_ARCH_PREL32_RELOCATIONS:
  32-bit distances of value and name from their own fields;
- from 5.4 each form has a third field, the name of the symbol's namespace.

Imports image.text, and image.model for types only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmipatch.image.text import printable

if TYPE_CHECKING:
    from vmipatch.image.model import Section

# __ksymtab, __ksymtab_gpl and, in older kernels, _unused, _unused_gpl, _gpl_future; in the objects
# that a module is linked from, one section for each symbol: ___ksymtab+name, ___ksymtab_gpl+name.
_TABLE = re.compile(r"_?__ksymtab(_(gpl|unused|unused_gpl|gpl_future))?(\+.*)?")
_STRINGS = "__ksymtab_strings"
_MAX_NAME = 512


def read(sections: tuple[Section, ...], bits: int, fetch: Callable[[Section], bytes]) -> dict[str, int]:
    """Name to virtual address; ``fetch`` gives a section's bytes.  Empty where no layout fits."""
    found: dict[str, int] = {}
    strings = next((s for s in sections if s.name == _STRINGS), None)
    if strings is None:
        return found
    names = fetch(strings)
    whole = _whole(names)
    for table in sections:
        if table.file_size and _TABLE.fullmatch(table.name):
            found.update(_table(fetch(table), table.address, bits, names, whole, strings.address))
    return found


def _whole(names: bytes) -> dict[int, str]:
    """The strings by their offsets, those that are longer than any name left out."""
    at, result = 0, {}
    for raw in names.split(b"\0")[:-1]:
        if 0 < len(raw) <= _MAX_NAME:
            result[at] = printable(raw)
        at += len(raw) + 1
    return result


def _table(
    blob: bytes, address: int, bits: int, names: bytes, whole: dict[int, str], names_address: int
) -> dict[str, int]:
    long, mask = bits // 8, (1 << bits) - 1
    layouts = [(relative, fields) for relative in (True, False) for fields in (2, 3)]
    best: dict[str, int] = {}
    best_starts = 0
    for relative, fields in layouts:
        width = 4 if relative else long
        if len(blob) % (width * fields):
            continue
        code = "i" if relative else "I" if bits == 32 else "Q"
        found = {}
        starts = 0
        at = address
        for row in struct.iter_unpack(f"<{fields}{code}", blob):
            value, name = row[:2]
            if relative:
                value += at
                name += at + width
            at += width * fields
            start = name - names_address
            text = whole.get(start)
            if text is not None:
                starts += 1
                found[text] = value & mask
                continue
            stop = names.find(b"\0", start, start + _MAX_NAME) if start >= 0 else -1
            if not 0 <= start < stop:
                break
            # The end of another string, or a start that is followed by none.
            starts += start == 0 or not names[start - 1]
            found[printable(names[start:stop])] = value & mask
        else:
            if starts > best_starts and starts * 2 > len(found):
                best, best_starts = found, starts
    return best
