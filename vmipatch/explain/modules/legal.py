"""The legal-patch set of modules that are not loaded: sites by section and offset, and what moves with their memory.

A module has no addresses before it is loaded.  It is placed twice, each kind of its memory moved by a distance of
its own: what differs between the two states of a site are fields that move, and by how much they
differ says with which memory.  Imports annotate, image, patch and its sisters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmipatch import facts
from vmipatch.annotate import scan
from vmipatch.errors import VmipatchError
from vmipatch.explain import engine
from vmipatch.explain.late import Move
from vmipatch.explain.legal import Legal, within
from vmipatch.explain.modules import files, layout
from vmipatch.explain.modules.files import Files, ModuleFile
from vmipatch.explain.modules.loaded import LIVE, Loaded, Region
from vmipatch.explain.modules.placement import Kernel, Placement
from vmipatch.explain.modules.view import View
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.image.module import BASE
from vmipatch.patch.evidence import rules_for
from vmipatch.patch.planner import refuse_findings
from vmipatch.patch.rules import Rules

_PITCH = 0x02000000
"""Between two kinds of a module's memory; more than any module has of one."""
_STEP = 0x10000
"""Powers of five of this, so that sums and differences of distances tell which they are of."""


class ModuleState(NamedTuple):
    """Bytes that a site may hold where memory lies at the places of :attr:`ModuleLegal.bases`."""

    code: bytes
    cause: str
    moves: tuple[Move, ...]


class ModuleSite(NamedTuple):
    """A site by its section and the offset in it."""

    section: str
    offset: int
    length: int
    families: tuple[str, ...]
    states: tuple[ModuleState, ...]
    patterns: tuple[str, ...]


class ModuleLegal(NamedTuple):
    """One module's file; ``bases`` has a virtual address for each kind of its memory.

    ``error`` says why it has no sites.
    """

    name: str
    file: str
    build_id: str | None
    bases: dict[str, int]
    sites: tuple[ModuleSite, ...]
    error: str | None


class _OnDisk(Running):
    """A kernel that does not run: its memory is what its file has."""

    def __init__(self, image: Image) -> None:
        # No method that reads a dump is asked.
        super().__init__(image, None, 0, None, "on disk")  # type: ignore[arg-type]

    def read(self, address: int, length: int) -> bytes | None:
        """See :meth:`Running.read`."""
        try:
            return self.image.read(address, length)
        except VmipatchError:
            return None

    def read_running(self, address: int, length: int) -> bytes | None:
        """See :meth:`Running.read_running`."""
        return self.read(address, length)


def legal_modules(image: Image, folder: Path, *, kernel: tuple[int, ...] | None = None) -> Iterator[ModuleLegal]:
    """The legal-patch set of every module below a folder, for the kernel of an image.

    Raises :class:`UsageError` where there is no such folder; a file that is damaged has an error and no sites.
    """
    found = Files(folder)
    evidence = scan(image, engine.EVIDENCE)
    refuse_findings(image, evidence)
    work = _Work(image, found, rules_for(image, evidence, kernel).rules, engine.layouts_of(evidence))
    for name in found.names():
        yield work.one(name)


class _Work:
    def __init__(self, image: Image, found: Files, rules: Rules, layouts: dict[str, str]) -> None:
        self._files = found
        self._rules = rules
        self._layouts = {f: x for f, x in layouts.items() if f in engine.EVIDENCE}
        self._kernel = Kernel(View(_OnDisk(image)))
        self._separate = (image.version or (9,)) >= (6, 4)
        self._bits = image.bits

    def one(self, name: str) -> ModuleLegal:
        path = self._files.candidates(name)[0]
        bases: dict[str, int] = {}
        try:
            file = files.open_module(path)
            ids = (files.build_id(file.bytes_of(s)) for s in file.sections if s.name == ".note.gnu.build-id")
            build = next((i.hex() for i in ids if i is not None), None)
            placed = layout.layout(layout.loaded(file.sections), separate=self._separate)
            moves = {kind: 5**i * _STEP for i, kind in enumerate(placed.sizes)}
            bases = {kind: BASE[self._bits] + i * _PITCH for i, kind in enumerate(placed.sizes)}
            sites = self._sites(name, file, placed, bases)
            moved = self._sites(name, file, placed, {kind: at + moves[kind] for kind, at in bases.items()})
            listed = tuple(_together(a, b, moves) for a, b in zip(sites, moved, strict=True))
        except (VmipatchError, ValueError) as error:
            return ModuleLegal(name, str(path), None, bases, (), str(error))
        return ModuleLegal(name, str(path), build, bases, listed, None)

    def _sites(
        self, name: str, file: ModuleFile, placed: layout.Layout, bases: dict[str, int]
    ) -> list[tuple[str, int, Legal]]:
        regions = tuple(Region(kind, at, layout.pages(placed.sizes[kind])) for kind, at in bases.items())
        loaded = Loaded(name, 0, LIVE, regions, percpu=0)
        image = Placement(self._kernel, loaded, file, self._resolve).image
        read = scan(image, engine.EVIDENCE, self._layouts)
        refuse_findings(image, read)
        init = facts.load("modules", "loader")["init"]
        code = [s for s in image.sections if s.exec and s.alloc and s.size and not s.name.startswith(init)]
        result = []
        for entry in within(image, self._rules, read, [(s.address, s.end) for s in code]):
            section = next(s for s in code if s.address <= entry.address < s.end)
            result.append((section.name, entry.address - section.address, entry))
        return result

    def _resolve(self, name: str) -> int | None:
        # What other modules export has no address either: a branch to it stays as the file has it.
        return self._kernel.exported(name)


def _together(one: tuple[str, int, Legal], two: tuple[str, int, Legal], moves: dict[str, int]) -> ModuleSite:
    """A site of both placements; its states are made by the same boots in the same order."""
    section, offset, entry = one
    states = tuple(
        ModuleState(a.code, a.cause, tuple(_fields(a.code, b.code, moves)))
        for a, b in zip(entry.states, two[2].states, strict=True)
    )
    return ModuleSite(section, offset, entry.length, entry.families, states, entry.patterns)


def _fields(one: bytes, two: bytes, moves: dict[str, int]) -> Iterator[Move]:
    """Where two states differ, as fields that move."""
    at = 0
    while at < len(one):
        if one[at] == two[at]:
            at += 1
            continue
        # Distances are odd multiples of 2^16 or sums of them: the third byte of a field differs first.
        start = max(0, at - 2)
        width = 8 if one[start + 4 : start + 8] != two[start + 4 : start + 8] and len(one) >= start + 8 else 4
        low, high = (int.from_bytes(x[start : start + width], "little") for x in (one, two))
        distance = (high - low + (1 << 8 * width - 1)) % (1 << 8 * width) - (1 << 8 * width - 1)
        plus, minus = _parts(distance // _STEP, list(moves))
        yield Move(start, width, plus, minus)
        at = start + width


def _parts(distance: int, kinds: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds of memory whose distances add up to one: each is there once, once with a minus, or not at all."""
    plus, minus = [], []
    for kind in kinds:
        digit = (distance + 2) % 5 - 2
        if digit == 1:
            plus.append(kind)
        elif digit == -1:
            minus.append(kind)
        distance = (distance - digit) // 5
    return tuple(plus), tuple(minus)
