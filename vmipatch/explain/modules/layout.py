"""Where the loader puts the sections of a module, repeated from its file: ``layout_sections`` of kernel/module/main.c.

The order of the groups and the names that are treated apart are data (specs/modules/loader.toml).  Imports image and
facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from vmipatch import facts
from vmipatch.explain.memory import PAGE
from vmipatch.image.model import SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, Section

_AFTER_INIT = 1 << 21
"""SHF_RO_AFTER_INIT (include/linux/elf.h)."""
_GROUPS = (
    (SHF_EXECINSTR | SHF_ALLOC, 0),
    (SHF_ALLOC, SHF_WRITE),
    (_AFTER_INIT | SHF_ALLOC, 0),
    (SHF_WRITE | SHF_ALLOC, 0),
)
"""Flags that a group wants and flags that it does not want, in order."""


class Layout(NamedTuple):
    """``places`` has for each section's number the kind of its memory and its offset there; ``sizes`` the bytes of each
    kind before they are rounded up to pages.  ``text`` is how many bytes of the kind ``core`` are instructions."""

    places: dict[int, tuple[str, int]]
    sizes: dict[str, int]
    text: int


def loaded(sections: Sequence[Section]) -> list[Section]:
    """The sections of a file with the flags that the loader gives them: what it does not load has no SHF_ALLOC."""
    spec = facts.load("modules", "loader")
    apart = {*spec["not_loaded"], spec["percpu"]}
    return [replace(s, flags=s.flags & ~SHF_ALLOC) if s.name in apart else s for s in sections]


def layout(sections: Sequence[Section], *, separate: bool, before: bool = False) -> Layout:
    """Lay out sections as :func:`loaded` gives them.

    ``separate`` is how kernels do it from 6.4 on, each kind in memory of its own; older ones have ``core`` and
    ``init``, groups on pages of their own.  ``before`` leaves out what is read-only after init only in newer kernels.
    """
    spec = facts.load("modules", "loader")
    after = set(spec["ro_after_init"][: spec["ro_after_init_before"]] if before else spec["ro_after_init"])
    places: dict[int, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    text = 0
    flagged = [(s, s.flags | _AFTER_INIT if s.name in after else s.flags) for s in sections]
    for initial in (False, True):
        kinds = spec["initial" if initial else "core"]
        for number, (wanted, unwanted) in enumerate(_GROUPS):
            kind = kinds[number] if separate else "init" if initial else "core"
            for section, flags in flagged:
                if flags & wanted != wanted or flags & unwanted or section.index in places or not kind:
                    continue
                if section.name.startswith(spec["init"]) != initial:
                    continue
                align = section.align or 1
                offset = -(-sizes.get(kind, 0) // align) * align
                places[section.index] = kind, offset
                sizes[kind] = offset + section.size
            if not separate and kind in sizes:
                sizes[kind] = pages(sizes[kind])
                if not number and not initial:
                    text = sizes[kind]
    return Layout(places, sizes, text)


def pages(size: int) -> int:
    """Rounded up to whole pages."""
    return -(-size // PAGE) * PAGE
