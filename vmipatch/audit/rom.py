"""A ROM against one kernel: calls that it lacks, and answers that the kernel cannot take.

What any ROM must be like is the business of rombuild.check.  Imports patch, rombuild, annotate, image and facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmipatch import facts
from vmipatch.annotate import Scan, pvops
from vmipatch.annotate.site import Detailed, Vmi
from vmipatch.errors import PatchError, RomError, TableError, VmipatchError
from vmipatch.image import Image
from vmipatch.patch.planner import LAST_WITH_VMI, plan
from vmipatch.patch.rom import place
from vmipatch.patch.rules import Version
from vmipatch.patch.target import OnRom
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild import inspect
from vmipatch.rombuild.relocations import SCAN_START, Relocation, Relocations, RelocationType

NONE, CALL, JUMP, NOP = (
    RelocationType.NONE,
    RelocationType.CALL_REL,
    RelocationType.JUMP_REL,
    RelocationType.NOP,
)
STUB = 64
"""Instructions of a stub that are followed."""


class Wrong(NamedTuple):
    """One finding about a ROM, before it has a place."""

    id: str
    message: str
    severity: str | None = None
    details: dict[str, Detailed] = {}  # noqa: RUF012  (never changed)


@dataclass(frozen=True)
class Use:
    """One call as this kernel uses it: ``how`` of specs/guests (``rfc`` for the annotations of 13.0 and v2)."""

    call: str
    how: tuple[str, ...]
    sites: int


class Guest(NamedTuple):
    """Which interface a kernel speaks: ``vmi-3.0`` by mainline's code or by annotations, or ``vmi-13.0``; or none."""

    abi: str | None
    mainline: bool


def check(image: Image, scan: Scan, data: bytes, name: str, kernel: Version | None) -> Iterator[Wrong]:
    """Everything about the ROM ``data`` that this kernel cannot live with; ``name`` is for messages."""
    guest = _guest(image, scan, kernel)
    if guest.abi is None and not any(s.family == "afterburn" for s in scan.sites):
        yield Wrong("rom-api", f"this {image.bits}-bit kernel has no VMI back end: it never looks for a ROM")
        return
    try:
        found = inspect.images(data)
    except RomError as error:
        yield Wrong("rom-unreadable", error.message)
        return
    vmis = [i for i in found if i.vmi is not None]
    if not vmis:
        yield Wrong("rom-unreadable", "no image of this ROM has a VMI header")
        return
    chosen: inspect.Image | None = vmis[0]
    if guest.abi is not None:
        wanted = abis.load(guest.abi)
        chosen = next((i for i in vmis if _speaks(i, wanted)), None)
        if chosen is None:
            spoken = ", ".join(f"{i.vmi.major}.{i.vmi.minor}" for i in vmis if i.vmi)
            text = f"the kernel speaks VMI {wanted.major}.{wanted.minor}, the ROM {spoken}"
            yield Wrong("rom-api", text)
            return
        yield from _header(chosen, wanted, guest.mainline)
    assert chosen is not None
    assert chosen.vmi is not None
    try:
        generation = None if guest.abi is None else abis.load(guest.abi).generation
        answers = inspect.relocations(data, generation)
    except RomError as error:
        yield Wrong("rom-unreadable", error.message)
        return
    before = 0
    uses = _mainline(image, scan) if guest.mainline else _annotated(scan)
    for wrong in _calls(uses, answers, chosen.data, mainline=guest.mainline):
        before += wrong.id != "rom-call-missing"
        yield wrong
    if not before:
        yield from _refused(image, scan, answers, name, kernel)


def read(path: Path) -> bytes:
    """The bytes of a ROM file; :class:`RomError` for one that cannot be read or is no ROM by its size."""
    try:
        with path.open("rb") as file:
            data = file.read(inspect.MAX_FILE + 1)
    except OSError as error:
        raise RomError(f"cannot read: {error.strerror}", file=path) from error
    if len(data) > inspect.MAX_FILE:
        raise RomError(f"more than {inspect.MAX_FILE >> 20} MiB is no option ROM", file=path)
    return data


def _guest(image: Image, scan: Scan, kernel: Version | None) -> Guest:
    versions = {s.detail.version for s in scan.sites if isinstance(s.detail, Vmi)}
    if versions:
        return Guest("vmi-3.0" if "v2" in versions else "vmi-13.0", False)
    release = kernel or image.version
    able = image.bits == 32 and (release is None or release[:3] <= LAST_WITH_VMI)
    if able and any(s.family == "parainstructions" for s in scan.sites):
        return Guest("vmi-3.0", True)
    return Guest(None, False)


def _speaks(image: inspect.Image, wanted: abis.Abi) -> bool:
    """The kernel's own test: the major version equal, the minor not lower."""
    assert image.vmi is not None
    return image.vmi.major == wanted.major and image.vmi.minor >= wanted.minor


def _header(image: inspect.Image, wanted: abis.Abi, mainline: bool) -> Iterator[Wrong]:
    """What the kernel looks at before it takes a ROM."""
    assert image.vmi is not None
    licenses = wanted.guest.get("license", ()) if mainline else ()
    if licenses and image.vmi.license not in licenses:
        said = "none" if image.vmi.license is None else repr(image.vmi.license)
        yield Wrong("rom-license", f"its licence is {said}; the kernel takes {' or '.join(map(repr, licenses))}")
    if wanted.guest.get("pci_required") and not image.pci_pointer:
        yield Wrong("rom-pci", "the header names no PCIR block")


def _mainline(image: Image, scan: Scan) -> list[Use]:
    """The calls that a mainline kernel asks for, by the paravirt members that it has."""
    spec = facts.load("guests", "mainline")
    sites = Counter(s.op.rpartition(".")[2] for s in scan.sites if s.family == "parainstructions")
    members = {slot.name.rpartition(".")[2] for slot in pvops.resolve(image).slots()} | set(sites)
    uses: dict[str, tuple[tuple[str, ...], int]] = {}
    for how in ("site", "fill", "wrap", "function", "timer"):
        for call, slots in spec[how].items():
            if (slots and not members & set(slots)) or spec["unless"].get(call) in members:
                continue
            before, count = uses.get(call, ((), 0))
            count = count or sum(sites[s] for s in slots)
            uses[call] = ((*before, how), count)
    return [Use(call, how, count) for call, (how, count) in uses.items()]


def _annotated(scan: Scan) -> list[Use]:
    """The calls of ``.vmi.annotation``, by name; NONE is an answer only to those of API 3.0."""
    found: Counter[tuple[str, str]] = Counter()
    for site in scan.sites:
        if isinstance(site.detail, Vmi):
            found[site.op, "v2" if site.detail.version == "v2" else "rfc"] += 1
    return [Use(call, (how,), count) for (call, how), count in sorted(found.items())]


def _calls(uses: list[Use], answers: Relocations, data: bytes, *, mainline: bool) -> Iterator[Wrong]:
    abi = abis.load(answers.abi)
    timer = next((rule for rule in abi.together if rule["when"] in abi.calls), None)
    on = timer is not None and _answer(abi, answers, timer["when"]).type is not NONE
    for use in uses:
        call = abi.calls.get(use.call)
        answer = _answer(abi, answers, use.call)
        details: dict[str, Detailed] = {"call": use.call, "relocation": answer.type.name, "sites": use.sites}
        if call is not None:
            details["number"] = call.number
        at = f"; {use.sites} site{'' if use.sites == 1 else 's'}" if use.sites else ""
        if use.how == ("timer",):
            if on and answer.type is not CALL and timer is not None and use.call in timer["then"]:
                text = f"{timer['when']} is answered, but {use.call} with {answer.type.name}"
                yield Wrong("rom-timer", f"{text}: the kernel calls NULL", None, details)
            continue
        if answer.type is NONE:
            needed = use.how == ("rfc",) or (mainline and use.call in abi.needs)
            text = f"{use.call}: the ROM answers NONE" + ("" if needed else ", native code stays") + at
            yield Wrong("rom-call-required" if needed else "rom-call-missing", text, None, details)
            continue
        returns = call is None or not call.jump
        for id, text, severity in _types(use, answer.type, returns):
            yield Wrong(id, f"{use.call}: {text}{at}", severity, details)
        if not returns and answer.type is CALL and use.how != ("rfc",) and _keeps_return_address(data, answer.offset):
            text = f"{use.call} is CALL_REL, and its stub at {answer.offset:#x} ends in IRET with the return address"
            yield Wrong("rom-return-address", f"{text} still on the stack{at}", None, details)


def _types(use: Use, type: RelocationType, returns: bool) -> Iterator[tuple[str, str, str | None]]:
    """What is wrong with an answer that is not NONE."""
    if type is NOP and not returns:
        yield "rom-relocation", "NOP: the site becomes padding and the kernel runs on behind it", None
    elif type is JUMP and returns:
        if use.how == ("rfc",):
            yield "rom-relocation", "JUMP_REL: every slot is called", None
        elif set(use.how) & {"wrap", "function"}:
            yield "rom-relocation", "JUMP_REL: the kernel stops (BUG)", None
        elif set(use.how) & {"site", "v2"}:
            yield "rom-relocation", "JUMP_REL: the stub returns to the caller's caller", None
        else:
            yield "rom-relocation", "JUMP_REL: the kernel warns, and the op stays native", "warning"


def _answer(abi: abis.Abi, answers: Relocations, call: str) -> Relocation:
    found = abi.calls.get(call)
    return Relocation(NONE, 0) if found is None else answers.of(found.number)


def _keeps_return_address(data: bytes, offset: int) -> bool:
    """Whether a stub surely returns by IRET with as much on the stack as it got.

    Straight-line code is followed, and jumps that have one target; of anything else that changes the stack
    pointer nothing is said.
    """
    dropped = 0
    for _ in range(STUB):
        found = inspect.decode_one(data, offset)
        if found is None:
            return False
        size, mnemonic, operands = found
        if mnemonic == "iretd":
            return dropped == 0
        move = _stack(mnemonic, operands)
        if move is None:
            return False
        dropped += move
        offset += size
        if mnemonic == "jmp":
            target = inspect.branch_target(mnemonic, operands)
            if target is None or not 0 <= target < len(data):
                return False
            offset = target
    return False


_PLAIN: tuple[tuple[str, Callable[[str], int | None]], ...] = (
    ("add esp, ", lambda text: int(text, 0)),
    ("sub esp, ", lambda text: -int(text, 0)),
    ("lea esp, [esp + ", lambda text: int(text.rstrip("]"), 0)),
    ("lea esp, [esp - ", lambda text: -int(text.rstrip("]"), 0)),
)


def _stack(mnemonic: str, operands: str) -> int | None:
    """Bytes by which an instruction raises ESP; None where that is not plain."""
    text = f"{mnemonic} {operands}"
    for start, amount in _PLAIN:
        if text.startswith(start):
            try:
                return amount(text.removeprefix(start))
            except ValueError:
                return None
    if mnemonic in ("pushfd", "push"):
        return -4
    if mnemonic in ("popfd", "pop"):
        return 4 if operands != "esp" else None
    if mnemonic == "pushad":
        return -32
    if mnemonic == "popad":
        return 32
    if mnemonic == "jmp":
        return 0
    first = operands.partition(",")[0]
    if mnemonic[0] == "j" or mnemonic in (*inspect.ENDS, "call", "loop", "int", "leave", "enter", "(xen)"):
        return None
    return None if first == "esp" or first == "sp" or mnemonic.startswith(("push", "pop", "xchg")) else 0


def _refused(image: Image, scan: Scan, answers: Relocations, name: str, kernel: Version | None) -> Iterator[Wrong]:
    """The planner's word, where nothing else was wrong."""
    try:
        target = OnRom(place(image, name, answers, SCAN_START))
        plan(image, scan, target, kernel=kernel, skip_unknown=True)
    except TableError:
        return  # among the findings of the scan already
    except PatchError as error:
        yield Wrong("rom-site-refused", error.message, None, {"address": error.address})
    except VmipatchError as error:
        yield Wrong("rom-site-refused", error.message)
