"""The whole of it: an image, a ROM, a hypervisor, and the verdict.

May import the other parts of this package, patch, image and annotate.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmipatch.annotate import Scan, scan
from vmipatch.annotate.parainstructions import UNKNOWN
from vmipatch.errors import ImageError, RomError, UsageError
from vmipatch.image import Image, open_image
from vmipatch.patch import OnRom, apply, plan
from vmipatch.patch.target import rom_at
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild import inspect
from vmipatch.rombuild.hypervisor import names
from vmipatch.validate import boots, console, subject
from vmipatch.validate.boots import Boot
from vmipatch.validate.sites import Progress, SiteRun, validate_sites
from vmipatch.validate.stand import Setup, Stand, places, prepare, read_file
from vmipatch.validate.subject import Subject

GUEST_END = "vmi-guest: done"
MOMENTS = 5
STATES = 8
ANNOTATED = ("vmi", "parainstructions", "afterburn")
CALLABLE = (1, 2)
PATIENCE = 10, 500_000_000
"""A boot on a ROM may take so many times the native one's instructions, and so many more."""


@dataclass(frozen=True)
class Request:
    """What to validate and how. ``until`` None: the guest's own end mark, or a power-off."""

    image: Path
    rom: Path
    hypervisor: str | None = None
    rom_base: int = 0xC0000
    initrd: Path | None = None
    append: str = ""
    memory_mib: int = 64
    until: str | None = None
    limit: int = 2_000_000_000
    states: int = STATES
    first: int = 0
    moments: int = MOMENTS


@dataclass
class Validation:
    """The verdict: ``pass``, ``fail`` or ``not shown``, and all that it rests on."""

    request: Request
    hypervisor: str
    abi: str
    until: str | None
    patched_sites: int
    sites: SiteRun | None = None
    boots: list[Boot] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    no_site: bool = False
    """No site could be tried, of an image that has some: calls alone show nothing of it."""

    @property
    def verdict(self) -> str:
        """``fail`` if anything failed, else ``not shown`` if anything was not, else ``pass``."""
        found = {v.verdict for v in self.sites.verdicts} if self.sites is not None else set()
        # A site that no state reaches is reported, but is no failure of the whole: others show its call.
        found.discard("not shown")
        found |= {b.verdict for b in self.boots}
        if self.sites is not None and (self.no_site or not self.sites.states):
            found.add("not shown")
        return "fail" if "fail" in found else "not shown" if "not shown" in found or not found else "pass"


@dataclass
class Prepared:
    """Everything opened and checked, before anything runs."""

    request: Request
    image: Image
    scan: Scan
    target: OnRom
    setup: Setup
    abi: abis.Abi
    stubs: dict[str, int]
    subjects: list[Subject]

    def patient(self, natively: int) -> Setup:
        """The setup of a boot on the ROM, given up after many times the instructions that it takes natively."""
        return replace(self.setup, limit=min(self.setup.limit, PATIENCE[0] * natively + PATIENCE[1]))


def open_all(request: Request) -> Prepared:
    """Open image and ROM and see that they fit; raises :class:`VmipatchError` with one clear line."""
    image = open_image(request.image)
    found = scan(image)
    if not any(site.family in ANNOTATED for site in found.sites):
        raise ImageError("nothing to validate: no annotated call sites (see vmipatch scan)", file=request.image)
    data = read_file(request.rom)
    target = OnRom(rom_at(image, found, request.rom, request.rom_base))
    answers = target.rom.relocations
    abi = abis.load(answers.abi)
    images = [i for i in inspect.images(data) if i.vmi is not None and i.vmi.abi == abi.name]
    vmi = images[0].vmi if images else None
    if vmi is None or vmi.block is None:
        raise RomError("no VMI ROM of ours: it does not say which hypervisor it is for", file=request.rom)
    hypervisor = request.hypervisor or vmi.block.hypervisor or ""
    if hypervisor not in names():
        raise UsageError(f"no hypervisor named {hypervisor!r}; there are: {', '.join(names())}")
    if hypervisor != vmi.block.hypervisor:
        raise UsageError(f"made for {vmi.block.hypervisor}, not for {hypervisor}", file=request.rom)
    licences = abi.guest.get("license") or []
    if licences and vmi.license not in licences:
        raise RomError(
            f"licence {vmi.license!r}: a kernel takes only {' or '.join(licences)}", file=request.rom, offset=0x16
        )
    kernel = read_file(request.image)
    until = request.until
    if until is None and GUEST_END.encode() in image.data:
        until = GUEST_END
    setup = Setup(
        kernel=kernel,
        file=str(request.image),
        rom=data,
        rom_base=request.rom_base,
        hypervisor=hypervisor,
        append=request.append,
        initrd=None if request.initrd is None else read_file(request.initrd),
        memory_mib=request.memory_mib,
        until=until,
        limit=request.limit,
    )
    base = target.rom.linear
    stubs = {
        c.name: (base + c.offset) & 0xFFFFFFFF
        for c in vmi.calls
        if c.type in CALLABLE and not abi.calls[c.name].init and not abi.calls[c.name].get_relocation
    }
    subjects = subject.sites(image, found, target, abi, stubs)
    return Prepared(request, image, found, target, setup, abi, stubs, subjects)


def stand_for(prepared: Prepared) -> tuple[Stand, list[Subject]]:
    """The test stand, and every subject: the sites, and the ROM's calls by themselves."""
    request = prepared.request
    stand = prepare(
        prepared.setup, prepared.image.page_offset, prepared.subjects, prepared.abi.name, max(1, request.moments)
    )
    places(stand, prepared.stubs, prepared.abi.name)
    slots = subject.filled_slots(prepared.scan)
    return stand, [*prepared.subjects, *subject.calls(prepared.abi, stand.stubs, stand.references, slots)]


def validate(
    request: Request,
    *,
    with_sites: bool = True,
    with_boots: bool = True,
    count_calls: bool = True,
    only: tuple[int, int, int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Validation:
    """Validate; ``only`` is a site's address, a base and a state: that one trial again.

    Raises :class:`VmipatchError` for what cannot be tried at all.
    """
    begun = time.perf_counter()
    say = progress or (lambda text: None)
    prepared = open_all(request)
    changed = sum(1 for s in prepared.subjects if s.native != s.patched)
    result = Validation(
        request, prepared.setup.hypervisor, prepared.abi.name, prepared.setup.until, patched_sites=changed
    )
    if with_boots and only is None:
        result.boots = _boots(prepared, count_calls, say)
        again = _again(prepared, result.boots[0].instructions, count_calls, say)
        boots.judge(result.boots, console.known(prepared.image.version), again)
        if result.boots[0].verdict != "pass":
            # Without a native end there is no run to take states from.
            result.seconds = time.perf_counter() - begun
            return result
    if with_sites:
        say("booting for states to start from")
        stand, subjects = stand_for(prepared)
        result.warnings += _untried(prepared)
        result.no_site = only is None and not prepared.subjects
        result.warnings += stand.rejected_bases
        chosen = None
        if only is not None:
            subjects = [s for s in subjects if s.address == only[0]]
            if not subjects:
                raise UsageError(f"no site and no call at {only[0]:#x}", file=request.image)
            chosen = only[1], only[2]
        result.sites = validate_sites(
            stand, subjects, request.states, first=request.first, only=chosen, progress=_counting(say)
        )
    result.seconds = time.perf_counter() - begun
    return result


def _untried(prepared: Prepared) -> list[str]:
    """A word on sites that are in the image and cannot be tried."""
    annotated = [s for s in prepared.scan.sites if s.family in ANNOTATED]
    unknown = sum(s.op == UNKNOWN for s in annotated)
    found = [f"{unknown} of {len(annotated)} sites were not tried: nobody knows what they do"] if unknown else []
    if not prepared.subjects:
        found.append("no site was tried: this ROM changes none that is known")
    return found


def _counting(say: Callable[[str], None]) -> Progress:
    last = [-1]

    def progress(done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if percent >= last[0] + 10:
            last[0] = percent
            say(f"trying sites: {percent}%")

    return progress


def _boots(prepared: Prepared, count: bool, say: Callable[[str], None]) -> list[Boot]:
    say("booting natively")
    found = [boots.native(prepared.setup)]
    gc.collect()  # a machine and its hypervisor hold each other, and megabytes
    setup = prepared.patient(found[0].instructions)
    stubs = prepared.stubs if count else {}
    # Of .text only: what is for starting up may be given back, and hold anything in the end.
    offset = prepared.image.page_offset
    staying = {s.address for s in prepared.scan.sites if s.section == ".text"}
    text = {s.address - offset: s.length for s in prepared.subjects if s.address in staying}
    say(f"booting on {setup.hypervisor}: the kernel patches itself")
    found.append(boots.on_rom(setup, "self", stubs, sites=text))
    gc.collect()
    say(f"booting on {setup.hypervisor}: patched statically")
    found.append(boots.on_rom(setup, "static", stubs, patched_kernel(prepared), text))
    gc.collect()
    return found


def _again(prepared: Prepared, natively: int, count: bool, say: Callable[[str], None]) -> boots.Again:
    def again(kind: str, turn: int) -> Boot:
        say(f"booting with another clock ({kind}, {turn})")
        gc.collect()
        kernel = patched_kernel(prepared) if kind == "static" else None
        setup = replace(prepared.patient(natively), shift=turn)
        return boots.on_rom(setup, kind, prepared.stubs if count else {}, kernel)

    return again


def patched_kernel(prepared: Prepared) -> bytes:
    """The image with its sites rewritten for the ROM, as ``vmipatch patch --rom`` writes it."""
    with tempfile.TemporaryDirectory(prefix="vmipatch-") as folder:
        target = Path(folder) / "patched"
        planned = plan(prepared.image, prepared.scan, prepared.target, skip_unknown=True)
        apply(prepared.image, planned, target)
        return target.read_bytes()
