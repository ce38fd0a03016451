"""The families of sites: one row each, all that the rest of the package knows of a family by its name.

A new family is one module of this package that reads it, one file of ``specs/tables/`` and one row here;
where the kernel writes its sites, one pass of ``patch/passes/`` or one module of ``explain/late/`` besides.
Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Written(Enum):
    """Who writes over the sites of a family, and when."""

    FOR_ROM = "before boot"
    """Whoever patches the kernel for a VMI ROM; on bare hardware they stay as they are on disk."""
    AT_BOOT = "boot"
    """The kernel, in one pass of its boot."""
    AT_RUN_TIME = "run time"
    """The kernel, whenever it likes."""
    NEVER = "never"
    """Nobody: the table names no site to patch, and its entries are counted."""


class Sealing(Enum):
    """How the boot is kept from patching by a table once more (``patch --seal``)."""

    NONE = "not"
    ENTRIES = "entries"
    """Each entry is made harmless where it stands."""
    BOUNDS = "bounds"
    """The code that walks the table is told that it ends where it begins."""
    REFUSED = "refused"
    """What a boot writes by the table is left to chance: no file can have it beforehand."""


@dataclass(frozen=True, slots=True)
class Family:
    """One format of annotation tables.

    ``name`` is the contract's word for it; ``module`` the module of ``annotate`` that reads it (empty where entries
    are only counted); ``listed`` says whether a scan that was asked for no family gives its sites, which for others
    are a hundred thousand in a kernel; ``help`` is one line for a person about bytes that it changed; ``colour`` is
    for light and dark pages.
    """

    name: str
    module: str
    written: Written
    help: str
    colour: tuple[str, str]
    listed: bool = False
    sealing: Sealing = Sealing.NONE


_GREY = ("#7a7a7a", "#9a9a9a")

_ROWS = (
    Family("vmi", "vmi", Written.FOR_ROM, "Calls of the VMI ROM.", ("#b3541e", "#dd8452"), listed=True),
    Family("afterburn", "afterburn", Written.FOR_ROM, "Sensitive instructions that call the ROM.",
           ("#9c6b30", "#c99a5b"), listed=True),
    Family("parainstructions", "parainstructions", Written.AT_BOOT,
           "Paravirtual calls made direct, or native instructions put in their place.",
           ("#dc8a1a", "#e9a648"), listed=True, sealing=Sealing.ENTRIES),
    Family("altinstructions", "alternatives", Written.AT_BOOT, "Instructions chosen for this CPU at boot.",
           ("#6a5bd6", "#8f82f0"), listed=True, sealing=Sealing.ENTRIES),
    Family("smp_locks", "locks", Written.AT_BOOT, "LOCK prefixes that one CPU does not need.",
           ("#1f9488", "#35b3a5"), listed=True, sealing=Sealing.ENTRIES),
    Family("retpoline_sites", "retpolines", Written.AT_BOOT, "Indirect branches as this CPU's mitigations want them.",
           ("#a8459a", "#cf7cc3"), sealing=Sealing.BOUNDS),
    Family("return_sites", "returns", Written.AT_BOOT, "Returns as this CPU's mitigations want them.",
           ("#b39a78", "#8f7b5f"), sealing=Sealing.BOUNDS),
    Family("call_sites", "callsites", Written.AT_BOOT, "Calls that keep the return stack's depth.",
           ("#4f7f9c", "#7fb0cc"), sealing=Sealing.BOUNDS),
    Family("cfi_sites", "cfi", Written.AT_BOOT, "Checks of indirect calls, as this boot seeds and forms them.",
           ("#b0473f", "#dd7a70"), sealing=Sealing.REFUSED),
    Family("endbr_seal", "endbr", Written.AT_BOOT, "ENDBR that no indirect branch needs.",
           ("#8a8a1f", "#b5b54a"), sealing=Sealing.BOUNDS),
    Family("mcount", "mcount", Written.AT_RUN_TIME,
           "The call of __fentry__ that a function begins with became a nop at boot.", ("#93a7bb", "#627b94")),
    Family("jump_labels", "jumplabels", Written.AT_RUN_TIME, "Branches that static keys decide.",
           ("#4c9a2a", "#79c257")),
    Family("static_calls", "staticcalls", Written.AT_RUN_TIME, "Direct calls of what a static call names now.",
           ("#1c73c7", "#56a3ee")),
    Family("runtime_consts", "runtimeconsts", Written.AT_RUN_TIME,
           "Values that the kernel put into its code while it started.", ("#c25b86", "#e089ae")),
    Family("ex_table", "", Written.NEVER, "Instructions that may fault.", _GREY),
    Family("bug_table", "", Written.NEVER, "Instructions of BUG and WARN.", _GREY),
    Family("orc", "", Written.NEVER, "Places that the unwinder knows.", _GREY),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ROWS}
"""Every family by its name, in the order in which scans give them."""


def names(*written: Written) -> tuple[str, ...]:
    """The names of the families that are written at one of these times, in the order of :data:`FAMILIES`."""
    return tuple(f.name for f in _ROWS if f.written in written)


PATCHED = names(Written.FOR_ROM, Written.AT_BOOT)
"""What stands in an image's place of before its boot: what ``patch`` may write."""
AT_BOOT = names(Written.AT_BOOT)
AT_RUN_TIME = names(Written.AT_RUN_TIME)
