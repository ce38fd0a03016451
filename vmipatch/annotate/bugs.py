"""What makes an entry of ``__bug_table`` one: its instruction traps, its file is a path.

The table's sections say nothing of the entry's size, which hangs on the kernel's version, its configuration and
the architecture; a wrong size shows in the second entry at the latest.  Imports image, facts and errors.
"""

from __future__ import annotations

import re

from vmipatch import facts
from vmipatch.annotate.tables import Check, Code, Layout, Reason
from vmipatch.image import Image

FAMILY = "bug_table"

_PATH = re.compile(rb"[ -~]*\.[ -~]*\0")
_MOST_PATH = 4096


def checker(image: Image) -> Check:
    """The check of one entry, which says why it cannot be one."""
    spec = facts.load("tables", FAMILY)
    traps = tuple(bytes.fromhex(code) for code in spec["traps"])
    longest = max(map(len, traps))
    code = Code(image)

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        entry = dict(zip(layout.fields, values, strict=True))
        address = entry["instr"]
        reason = code.executable(address, 1)
        if reason is not None:
            return reason
        at = image.offset_of(address)
        found = bytes(image.data[at : at + longest])
        if not found.startswith(traps) and not ("format" in entry and entry["flags"] & spec["args"]):
            return Reason("bug-no-trap", f"names {address:#x}, which holds {found.hex(' ')} and traps nothing")
        if entry.get("format"):
            image.offset_of(entry["format"])
        if "file" in entry:
            at = image.offset_of(entry["file"])
            if not _PATH.match(bytes(image.data[at : at + _MOST_PATH])):
                return Reason("bug-no-file", f"its file name at {entry['file']:#x} is none")
        return None

    return check
