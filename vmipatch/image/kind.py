"""What an image is, by what it holds: Linux on hardware, User-mode Linux, the Xen hypervisor.

A program of Linux's own sources that runs as a process (arch/um) has the sections of its linker script (``.uml.*``)
and its banner.  Xen has no Linux banner, and the format of the line that it starts with (drivers/char/console.c of
4.17); a Linux kernel that runs on Xen has another one.  Imports image.search.
"""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap

from vmipatch.image.model import Section
from vmipatch.image.search import find_all

LINUX, USER_MODE, XEN, MODULE, UNKNOWN = "linux", "user-mode-linux", "xen", "module", "unknown"

_UML_SECTION = ".uml."
_UML_TEXT = b"User Mode Linux v%s"
_XEN_TEXTS = (b"Xen version %d.%d%s (", b"(XEN) \0")
_MOST_SEARCHED = 1 << 26


def kind(data: bytes | mmap, sections: Sequence[Section], banner: str | None) -> str:
    """One of the names above; ``banner`` is the image's Linux banner, if it has one."""
    if banner is not None:
        names = [s.name for s in sections]
        mine = any(name.startswith(_UML_SECTION) for name in names) if names else _has(data, _UML_TEXT)
        return USER_MODE if mine else LINUX
    return XEN if all(_has(data, text) for text in _XEN_TEXTS) else UNKNOWN


def _has(data: bytes | mmap, text: bytes) -> bool:
    return any(True for _ in find_all(data, text, 0, _MOST_SEARCHED, limit=1))
