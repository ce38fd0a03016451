"""What is validated: every patched site, and every call of the ROM by itself.

May import patch, annotate, rombuild and image.  A site's native bytes are those on disk for RFC and afterburn
sites; for mainline the kernel's own native inlining, or its native function reached through the unpatched slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vmipatch import facts
from vmipatch.annotate import Scan, Site
from vmipatch.annotate.site import Vmi
from vmipatch.annotate.vmi import calls_in
from vmipatch.errors import VmipatchError
from vmipatch.image import Image
from vmipatch.patch import Native, OnRom, Patch, from_spec, plan
from vmipatch.rombuild.abi import Abi, Call

SLOTTED = "parainstructions"
"""The family whose ops are slots of the kernel's paravirt objects."""
REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


@dataclass(frozen=True)
class Subject:
    """One thing to validate.

    ``address`` is the linear address of a site, or of a ROM's stub (``is_call``).  ``calls`` are the VMI calls that
    the patched bytes make, in order; ``op`` is what the kernel names it.  ``arguments`` says where a stack argument
    of the call comes from: a register's name, or a number that the translation pushes.
    """

    op: str
    calls: tuple[Call, ...]
    address: int
    length: int
    native: bytes
    patched: bytes
    symbol: str
    is_call: bool = False
    reference: int = 0
    """For a call: the linear address of the native code that it stands for."""
    arguments: tuple[str | int, ...] = ()
    generation: int = 3
    slots: tuple[str, ...] = ()
    """The paravirt slots that mean it: of a site the one that it goes through, of a call all that a kernel fills."""
    stubs: tuple[int, ...] = ()
    """Linear addresses of the ROM's stubs of ``calls``."""

    @property
    def call(self) -> Call:
        """The call that decides arguments and results (the first)."""
        return self.calls[0]

    @property
    def call_names(self) -> tuple[str, ...]:
        """The VMI calls by name."""
        return tuple(call.name for call in self.calls)

    @property
    def name(self) -> str:
        """For a person: where it is and what it does."""
        return f"call {self.op}" if self.is_call else f"{self.address:#x} {self.symbol}"

    @property
    def title(self) -> str:
        """For a person: :attr:`name` with all names that it has: VMI calls, slots, stubs."""
        return f"{self.name} ({names_of(self.call_names, self.slots, self.stubs)})"


def names_of(calls: Iterable[str], slots: Iterable[str], stubs: Iterable[int]) -> str:
    """One thing by all its names: ``EnableInterrupts, slot pv_irq_ops.irq_enable, stub 0xc00c0688``."""
    parts = [" and ".join(calls)]
    for word, many in (("slot", list(slots)), ("stub", [f"{stub:#x}" for stub in stubs])):
        if many:
            parts.append(f"{word}{'s' if len(many) > 1 else ''} {' and '.join(many)}")
    return ", ".join(parts)


def sites(image: Image, scan: Scan, target: OnRom, abi: Abi, stubs: Mapping[str, int]) -> list[Subject]:
    """The sites that the ROM's target rewrites; those that keep their bytes are not among them.

    ``stubs``: linear addresses of the ROM's stubs by call.
    """
    planned = plan(image, scan, target, skip_unknown=True)
    native = _native(image, scan)
    names: dict[str, list[str]] = facts.load("tables", "vmi")["paravirt_calls"]
    found = []
    for patch in planned.patches:
        site = patch.site
        if site is None or patch.new == patch.old:
            continue
        calls = _calls(site, abi, names)
        if calls:
            found.append(
                Subject(
                    op=site.op,
                    calls=calls,
                    address=site.address,
                    length=site.length,
                    native=native.get(site.address, patch.old),
                    patched=patch.new,
                    symbol=_symbol(image, site.address),
                    arguments=_arguments(image, site),
                    generation=abi.generation,
                    slots=(site.op,) if site.family == SLOTTED else (),
                    stubs=tuple(stubs[call.name] for call in calls if call.name in stubs),
                )
            )
    return found


def _native(image: Image, scan: Scan) -> Mapping[int, bytes]:
    """What the kernel itself puts at its paravirt sites on the bare machine."""
    if not any(s.family == SLOTTED for s in scan.sites):
        return {}
    try:
        planned = plan(image, scan, Native(from_spec("pentium3", image.version)), skip_unknown=True)
    except VmipatchError:
        return {}  # the slot's function is the reference then
    return {p.address: p.new for p in planned.patches if p.cause.family == SLOTTED}


def _calls(site: Site, abi: Abi, names: Mapping[str, list[str]]) -> tuple[Call, ...]:
    if isinstance(site.detail, Vmi):
        name = abi.numbers.get(site.detail.call)
        return (abi.calls[name],) if name else ()
    if site.family == SLOTTED:
        return tuple(abi.calls[n] for n in names.get(site.op.rpartition(".")[2], []) if n in abi.calls)
    return (abi.calls[site.op],) if site.op in abi.calls else ()


def _arguments(image: Image, site: Site) -> tuple[str | int, ...]:
    """What the translation pushes in front of its call, the last push first."""
    if not isinstance(site.detail, Vmi):
        return ()
    body = image.read(site.detail.translation, site.detail.translation_length)
    end = (calls_in(body) or [0])[0]
    pushed: list[str | int] = []
    at = 0
    while at < end:
        opcode = body[at]
        if opcode == 0x68:
            pushed.append(int.from_bytes(body[at + 1 : at + 5], "little"))
            at += 5
        elif opcode == 0x6A:
            pushed.append(int.from_bytes(body[at + 1 : at + 2], "little", signed=True) & 0xFFFFFFFF)
            at += 2
        else:
            pushed.append(REGISTERS[opcode & 7])
            at += 1
    return tuple(reversed(pushed))


def _symbol(image: Image, address: int) -> str:
    found = image.symbols.at(address)
    return f"{found[0]}+{found[1]:#x}" if found else "?"


def calls(
    abi: Abi, stubs: Mapping[str, int], references: Mapping[str, int], slots: Mapping[str, tuple[str, ...]]
) -> list[Subject]:
    """Every call that the ROM answers, as subjects; the maps give linear addresses, and slots, by name."""
    return [
        Subject(
            op=name,
            calls=(abi.calls[name],),
            address=stubs[name],
            length=0,
            native=b"",
            patched=b"",
            symbol="ROM",
            is_call=True,
            reference=references[name],
            generation=abi.generation,
            slots=slots.get(name, ()),
            stubs=(stubs[name],),
        )
        for name in stubs
        if name in references
    ]


def filled_slots(scan: Scan) -> dict[str, tuple[str, ...]]:
    """The members of the paravirt objects that mainline Linux fills with each call, for an image that has such."""
    if not any(site.family == SLOTTED for site in scan.sites):
        return {}
    ways: dict[str, dict[str, list[str]]] = facts.load("guests", "mainline")
    found: dict[str, list[str]] = {}
    for way in ("site", "fill", "wrap", "function"):
        for call, members in ways[way].items():
            found.setdefault(call, []).extend(m for m in members if m not in found.get(call, []))
    return {call: tuple(members) for call, members in found.items()}


def changed(patches: Iterable[Patch]) -> int:
    """How many patches change a byte."""
    return sum(p.old != p.new for p in patches)
