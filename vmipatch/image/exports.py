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
    for table in sections:
        if table.file_size and _TABLE.fullmatch(table.name):
            found.update(_table(fetch(table), table.address, bits, names, strings.address))
    return found


def _table(blob: bytes, address: int, bits: int, names: bytes, names_address: int) -> dict[str, int]:
    long = bits // 8
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
            stop = names.find(b"\0", start, start + _MAX_NAME) if start >= 0 else -1
            if not 0 <= start < stop:
                break
            # At a start, the byte in front is the end of another string.
            starts += start == 0 or not names[start - 1]
            found[printable(names[start:stop])] = value & ((1 << bits) - 1)
        else:
            if starts > best_starts and starts * 2 > len(found):
                best, best_starts = found, starts
    return best
