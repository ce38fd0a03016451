"""What an audit gives: findings with stable identifiers, and the register of them all.

The finding is the scanner's own (:class:`vmipatch.annotate.site.Finding`), with the places filled in.
Imports annotate.site only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vmipatch.annotate.site import Detailed, Finding, TableInfo

__all__ = ["KINDS", "SEVERITIES", "Audit", "Detailed", "Finding", "FunctionCount", "Kind", "Swept", "reaches"]

SEVERITIES = ("note", "warning", "error")
"""Ascending."""


def reaches(severity: str, level: str) -> bool:
    """Whether a severity is at or above a level of :data:`SEVERITIES`."""
    return SEVERITIES.index(severity) >= SEVERITIES.index(level)


class Kind(NamedTuple):
    """One identifier: what it stands for, and what to do about it.

    ``severity`` is the usual one; a finding may carry another (a damaged table is an error only where the
    patcher would go by it).
    """

    id: str
    title: str
    severity: str
    description: str
    help: str


class Swept(NamedTuple):
    """One range of instructions that was looked at: virtual address, bytes, bytes that are none."""

    section: str
    address: int
    size: int
    undecoded: int


@dataclass(frozen=True, slots=True)
class FunctionCount:
    """How many findings of one identifier a function has; ``what`` counts them by instruction or slot.

    ``address`` is the virtual address of the first; ``symbol`` is None where none is known.
    """

    id: str
    symbol: str | None
    section: str
    address: int
    count: int
    what: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """All that an audit found; ``findings`` by severity (errors first), identifier and address.

    ``counts`` has every identifier that was looked for, 0 where it was not found; ``covered`` counts, of the
    sensitive instructions on disk, those inside a site: by identifier of the finding that they would have been.
    ``rom`` is the ROM's path, or None.  ``skipped`` says what could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    counts: Mapping[str, int]
    covered: Mapping[str, int]
    functions: tuple[FunctionCount, ...]
    tables: tuple[TableInfo, ...]
    swept: tuple[Swept, ...]
    sites: int
    rom: str | None = None
    skipped: tuple[str, ...] = ()

    def worst(self) -> str | None:
        """The highest severity found, or None."""
        found = {f.severity for f in self.findings}
        return next((s for s in reversed(SEVERITIES) if s in found), None)


_TABLE_HELP = (
    "Check which linker script and which kernel version made the image; --layout FAMILY=NAME overrides the "
    "evidence. A table that is wrong somewhere is not patched by."
)
_ENTRY_HELP = "The entry is damaged, or the table is of another image. The image is not patched by this table."
_ROM_HELP = "Correct the ROM's specification and build it again (vmipatch rom build), or use it with another kernel."


def _kinds(*kinds: Kind) -> Mapping[str, Kind]:
    return {kind.id: kind for kind in kinds}


KINDS: Mapping[str, Kind] = _kinds(
    # Instructions
    Kind(
        "sensitive-unannotated",
        "Sensitive instruction without an annotation that does not trap",
        "warning",
        "An instruction that reads or changes privileged state, behaves differently outside ring 0 and does not "
        "trap there (Popek and Goldberg's condition fails; Robin and Irvine 2000). No annotation covers it.",
        "A kernel that runs deprivileged gets a wrong result here without anyone noticing. Annotate it, replace it "
        "by a paravirtual call, or see that it is never reached deprivileged.",
    ),
    Kind(
        "privileged-unannotated",
        "Privileged instruction without an annotation",
        "note",
        "An instruction that faults outside ring 0. No annotation covers it.",
        "A hypervisor can emulate it at the price of a trap; annotate it where that is too slow.",
    ),
    Kind(
        "pv-slot-unannotated",
        "Call or jump through a paravirt slot without an annotation",
        "warning",
        "An indirect call or jump through a function pointer of the paravirt objects that no entry of "
        ".parainstructions or .altinstructions covers.",
        "It stays indirect for ever: slower, a target for speculation, and not rewritten for a ROM. Use the PVOP "
        "macros, or accept it where the call runs once.",
    ),
    Kind(
        "branch-into-site",
        "Branch into the inside of a site",
        "error",
        "A branch from outside a site goes to a byte inside it that is not its first. After the site is rewritten, "
        "that byte need not begin an instruction.",
        "Do not patch this site; move the label to the start of the site or out of it.",
    ),
    # Sites and tables
    Kind(
        "site-overlap",
        "Sites that overlap in part",
        "error",
        "Two sites share some bytes, and neither holds the other: no order of patching makes sense of both.",
        "One of the two entries is wrong. The image is not patched.",
    ),
    Kind(
        "site-shared",
        "Bytes that several annotations may rewrite",
        "note",
        "One site holds another, or two entries of different tables name the same bytes. The kernel's order of "
        "passes, and within a table the order of entries, decides which is seen in the end.",
        "Nothing to do where the kernel means it (alternatives of paravirt calls); the message says which wins.",
    ),
    Kind(
        "extable-inside-site",
        "Exception-table entry inside a site",
        "warning",
        "An entry of the exception table names a byte inside a site that is not its first. After the site is "
        "rewritten, a fault there is no longer found, or another instruction's fault is.",
        "See that every replacement keeps the instruction at this offset, or never faults.",
    ),
    Kind(
        "extable-at-site",
        "Exception-table entry at the start of a site",
        "note",
        "An entry of the exception table names the first instruction of a site.",
        "Right as long as in every replacement the first instruction is the one that may fault.",
    ),
    Kind(
        "table-misaligned",
        "Table that begins off its alignment",
        "warning",
        "A table of annotations begins at an address that is no multiple of its fields' natural alignment.",
        "The kernel reads it all the same on x86, but tools that step by aligned words see other entries.",
    ),
    Kind(
        "table-tail",
        "Table whose last entry is short",
        "note",
        "The size of a table is no multiple of its entry's; what is missing is padding at the end of the last entry.",
        "Usual for .altinstructions up to 2.6.35, whose entries end in a pad byte; nothing to do.",
    ),
    Kind(
        "table-size",
        "Table of an odd size",
        "error",
        "The size of a table is no whole number of entries of any layout that is known for it.",
        _TABLE_HELP,
    ),
    Kind(
        "table-layout",
        "Table that fits no layout",
        "error",
        "Under every layout that is known for this table, more than half of the entries make no sense.",
        _TABLE_HELP,
    ),
    Kind(
        "table-entries",
        "More entries that make no sense",
        "error",
        "So many entries of one table are wrong that the rest is counted only.",
        _TABLE_HELP,
    ),
    Kind(
        "entry-outside-image",
        "Entry that names an address outside the image",
        "error",
        "An entry names an address that the image has no bytes for.",
        _ENTRY_HELP,
    ),
    Kind(
        "entry-length",
        "Entry with an impossible length",
        "error",
        "An entry gives its site a length that the kernel's patcher refuses.",
        _ENTRY_HELP,
    ),
    Kind(
        "entry-feature",
        "Entry with an impossible feature",
        "error",
        "An entry asks for a CPU feature that no kernel of this layout has.",
        _ENTRY_HELP,
    ),
    Kind(
        "site-not-executable",
        "Site outside executable sections",
        "error",
        "An entry names bytes in a section that is not executable.",
        _ENTRY_HELP,
    ),
    Kind(
        "site-not-instructions",
        "Site that is no whole number of instructions",
        "error",
        "The bytes that an entry names do not decode to whole instructions.",
        _ENTRY_HELP,
    ),
    Kind(
        "replacement-too-long",
        "Replacement longer than its site",
        "error",
        "The replacement that an entry names does not fit into its site.",
        _ENTRY_HELP,
    ),
    Kind(
        "lock-no-prefix",
        "Lock entry without a LOCK prefix",
        "error",
        "An entry of .smp_locks names a byte that is no LOCK prefix.",
        _ENTRY_HELP,
    ),
    Kind(
        "op-unknown",
        "Paravirt sites that do what nobody knows",
        "warning",
        "Entries of .parainstructions call through a slot that no layout of paravirt_ops knows, or whose function "
        "contradicts the layout.",
        "The image is not patched while such sites are in it; vmipatch patch --skip-unknown leaves them as they are. "
        "A layout of the kernel's own headers (specs/pvops) names them.",
    ),
    Kind(
        "user-mode-linux",
        "User-mode Linux",
        "error",
        "The image is a kernel that runs as a process: it carries alternatives and never applies them.",
        "Patch a kernel that is made for hardware.",
    ),
    Kind(
        "xen-hypervisor",
        "The Xen hypervisor",
        "error",
        "The image is the hypervisor itself, whose tables are not those of Linux.",
        "Give the kernel of a guest.",
    ),
    Kind(
        "table-missing",
        "Table that must be there and is not found",
        "warning",
        "The kernel has the code that reads a table, and neither headers, symbols nor content tell where it is.",
        "Give the image with its section headers: without the table, changes of its sites cannot be told from damage.",
    ),
    Kind(
        "bug-no-trap",
        "Bug entry without a trap",
        "warning",
        "An entry of __bug_table names an instruction that does not trap.",
        _ENTRY_HELP,
    ),
    Kind(
        "bug-no-file",
        "Bug entry without a file",
        "warning",
        "An entry of __bug_table names a source file whose name is no text.",
        _ENTRY_HELP,
    ),
    Kind(
        "vmi-mixed-versions",
        "VMI annotations of two ABIs in one table",
        "error",
        "A table holds entries of API 13.0 and of API 3.0, whose calls have different numbers.",
        "Link objects of one interface only: no ROM can serve both.",
    ),
    Kind(
        "vmi-translation",
        "VMI translation that breaks the grammar",
        "error",
        "A translation holds something else than pushes, one call, stack adjustments and nops.",
        _ENTRY_HELP,
    ),
    Kind(
        "vmi-call-offset",
        "VMI entry whose call offset names no call",
        "error",
        "The call offset of an entry does not name a call instruction of its translation.",
        _ENTRY_HELP,
    ),
    Kind(
        "vmi-call-number",
        "VMI entry whose number is not its translation's",
        "error",
        "The number of an entry and the one that its translation calls differ.",
        _ENTRY_HELP,
    ),
    Kind(
        "retpoline-no-branch",
        "Retpoline entry without a branch",
        "warning",
        "An entry of .retpoline_sites names bytes that are no call of, or jump to, a thunk.",
        _ENTRY_HELP,
    ),
    Kind(
        "return-no-jump",
        "Return entry without a jump",
        "warning",
        "An entry of .return_sites names bytes that are no jump to the return thunk.",
        _ENTRY_HELP,
    ),
    Kind(
        "call-no-branch",
        "Call entry without a call",
        "warning",
        "An entry of .call_sites names bytes that are no direct call or jump.",
        _ENTRY_HELP,
    ),
    Kind(
        "cfi-no-hash",
        "CFI entry without a hash",
        "warning",
        "An entry of .cfi_sites names bytes that are no preamble with a function's type hash.",
        _ENTRY_HELP,
    ),
    Kind(
        "endbr-none",
        "ENDBR entry without an ENDBR",
        "warning",
        "An entry of .ibt_endbr_seal names bytes that are neither an ENDBR instruction nor a sealed one.",
        _ENTRY_HELP,
    ),
    Kind(
        "runtime-const-none",
        "Runtime-constant entry without an immediate",
        "warning",
        "An entry of a runtime-constant table names bytes that are no immediate of the expected kind.",
        _ENTRY_HELP,
    ),
    # ROMs
    Kind(
        "rom-unreadable",
        "ROM whose answers cannot be read",
        "error",
        "The file is no VMI ROM, or one that only its own code can answer for.",
        "Give a ROM built by vmipatch; vmipatch rom check says what is wrong with any other.",
    ),
    Kind(
        "rom-api",
        "ROM of another API",
        "error",
        "The ROM speaks another interface, or an older minor version of it, than the kernel's sites: the kernel "
        "would pass it over.",
        _ROM_HELP,
    ),
    Kind(
        "rom-license",
        "ROM with a licence that the kernel refuses",
        "error",
        "Mainline Linux takes a ROM only if its licence string is exactly one of those that it knows.",
        _ROM_HELP,
    ),
    Kind(
        "rom-pci",
        "ROM without a PCI block",
        "error",
        "The kernel refuses a ROM whose header names no PCIR block.",
        _ROM_HELP,
    ),
    Kind(
        "rom-call-required",
        "ROM lacks a call that the kernel cannot do without",
        "error",
        "The ROM answers NONE, or has no slot, for a call without which the kernel does not survive.",
        _ROM_HELP,
    ),
    Kind(
        "rom-call-missing",
        "ROM lacks a call that the kernel uses",
        "warning",
        "The ROM answers NONE for a call of this kernel: the native code stays, which is right only in ring 0.",
        _ROM_HELP,
    ),
    Kind(
        "rom-relocation",
        "Relocation that the kernel cannot take",
        "error",
        "The ROM answers a relocation type with which the kernel stops (BUG), faults, or ignores the call.",
        _ROM_HELP,
    ),
    Kind(
        "rom-return-address",
        "Stub that leaves a return address on the frame",
        "error",
        "The stub of a call that never returns is reached by a call, and does not discard the return address: it "
        "would take that for the interrupted instruction.",
        "Answer JUMP_REL, or let the stub drop four bytes before it returns.",
    ),
    Kind(
        "rom-timer",
        "Timer calls that the kernel would call through NULL",
        "error",
        "The ROM offers a cycle frequency, which turns the kernel's VMI timer on, without all the calls that the "
        "timer then makes.",
        "Answer NONE for GetCycleFrequency, or CALL_REL for all of the timer calls.",
    ),
    Kind(
        "rom-site-refused",
        "Site that cannot be patched for the ROM",
        "error",
        "The planner refuses to rewrite this site for the ROM.",
        _ROM_HELP,
    ),
)
