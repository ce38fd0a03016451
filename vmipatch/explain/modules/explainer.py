"""Every loaded module explained: the boot's passes and the later changes that a kernel's own text is explained by.

``module_finalize`` of arch/x86/kernel/module.c runs the passes of the boot over a module's tables, in the order of the
era; what the module's static keys and calls are then is decided by the same keys.  Imports annotate, image, patch,
errors and its sisters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vmipatch.annotate import scan
from vmipatch.annotate.site import Sites
from vmipatch.errors import ImageError, VmipatchError
from vmipatch.explain import engine, padding, runs
from vmipatch.explain.ground import Ground
from vmipatch.explain.modules import areas, files
from vmipatch.explain.modules.btf import Types
from vmipatch.explain.modules.files import Files, ModuleFile
from vmipatch.explain.modules.inside import Inside
from vmipatch.explain.modules.loaded import LIVE, Loaded, Region, Walk
from vmipatch.explain.modules.placement import Kernel, Placement
from vmipatch.explain.modules.result import ModuleExplained, Modules, Note
from vmipatch.explain.modules.view import View
from vmipatch.image import Image
from vmipatch.image.text import printable
from vmipatch.patch.passes import Boot, callthunks
from vmipatch.patch.patch import Plan
from vmipatch.patch.planner import Seen, boot_plan, refuse_findings

_TEXT, _LOCKS = ".text", "smp_locks"


def explain_modules(kernel: engine.Kernel, folder: Path) -> Modules:
    """Every module that the running kernel lists, held against its file below a folder.

    Raises :class:`UsageError` where there is no such folder; a module or a list that cannot be is a note, and the rest
    stands.
    """
    result = Modules(str(folder))
    found = Files(folder)
    view = View(kernel.running)
    types = Types(kernel.image)
    walk = Walk(view, types)
    result.notes += [Note("module-list", text, finding=True) for text in walk.findings]
    if walk.unseen:
        result.notes.append(
            Note("module-list", "no list with a module in it is found: none is explained", finding=False)
        )
    work = _Work(kernel, found, view, walk, result)
    how = callthunks.thunks_of(kernel.boot)
    if how is not None:
        at = work.around.moved(how.template.address)
        wanted = padding.code_at(kernel.boot, how, how.template.address, kernel.running.slide)
        if view.read(at, len(wanted)) != wanted:
            # Modules are held against this code as it runs.
            text = "the code that counts calls, which modules get a copy of, is not the image's"
            result.notes.append(Note("call-template", text, finding=True, address=at))
    for loaded in walk.modules:
        result.modules.append(work.one(loaded))
    result.areas, notes = areas.areas(work.around, types, walk.modules, work.texts)
    result.notes += notes
    if types.error is not None:
        result.notes.append(Note("btf", types.error, finding=True))
    return result


class _Work:
    """The modules of one kernel while they are being explained; those that others need are placed once."""

    def __init__(
        self,
        kernel: engine.Kernel,
        found: Files,
        view: View,
        walk: Walk,
        result: Modules,
    ) -> None:
        self._kernel = kernel
        self._layouts = {f: x for f, x in kernel.layouts.items() if f in engine.EVIDENCE}
        self._files = found
        texts = (range(r.address, r.address + r.size) for m in walk.modules for r in m.regions if r.exec)
        self.around = Kernel(view, tuple(texts))
        self._view = view
        self._result = result
        self._loaded = {m.name: m for m in reversed(walk.modules)}
        self.texts: dict[str, list[tuple[int, int]]] = {}
        self._placed: dict[str, Placement | None] = {}
        self._exports: dict[str, dict[str, int]] = {}

    def one(self, loaded: Loaded) -> ModuleExplained:
        """A module's bytes and their causes."""
        executable = [r for r in loaded.regions if r.exec]
        result = ModuleExplained(
            loaded.name, executable[0].address if executable else loaded.address, loaded.state,
            total=sum(r.size for r in executable),
        )  # fmt: skip
        if loaded.state != LIVE:
            self._say("module-state", f"is {loaded.state}: the kernel may be in the middle of it", loaded)
        placed = self._place(loaded)
        if placed is None:
            result.unexplained_bytes = result.total
            return result
        result.file = placed.image.path
        result.freed = placed.freed
        self.texts[loaded.name] = [(r.address, r.size) for r in placed.text]
        if placed.text:
            result.address, result.total = placed.text[0].address, sum(r.size for r in placed.text)
        try:
            self._text(loaded, placed, result)
        except VmipatchError as error:
            self._say("module-damaged-file", str(error), loaded, finding=True)
            result.unexplained_bytes = result.total - result.explained
        return result

    def _say(self, id: str, message: str, loaded: Loaded, *, finding: bool = False) -> None:
        self._result.notes.append(Note(id, message, finding, loaded.name, loaded.address))

    # Files

    def _place(self, loaded: Loaded) -> Placement | None:
        """The module at its addresses; None where its file is missing or wrong, which is then said."""
        name = loaded.name
        if name not in self._placed:
            # A module that needs itself finds nothing.
            self._placed[name] = None
            self._placed[name] = self._first(loaded)
        return self._placed[name]

    def _first(self, loaded: Loaded) -> Placement | None:
        paths = self._files.candidates(loaded.name)
        if not paths:
            self._say("module-no-file", f"has no file below {self._files.folder}", loaded, finding=True)
            return None
        said: list[tuple[str, str]] = []
        for path in paths:
            try:
                file = files.open_module(path)
                if file.bits != self._kernel.image.bits:
                    raise ImageError(f"a module of {file.bits} bits", file=path)
                placed = Placement(self.around, loaded, file, self._resolver(file))
                wrong = self._other_build(loaded, file, placed)
            except VmipatchError as error:
                said.append(("module-damaged-file", str(error)))
                continue
            if wrong is None:
                for note in placed.notes:
                    self._say("module-symbols", note, loaded)
                return placed
            said.append(("module-other-build", f"{path}: {wrong}"))
        for id, text in said:
            self._say(id, text, loaded, finding=True)
        return None

    def _resolver(self, file: ModuleFile) -> _Resolver:
        needs = files.modinfo(file, "depends") or ""
        return _Resolver(self, [n.replace("-", "_") for n in needs.split(",") if n])

    def exported_by(self, name: str) -> dict[str, int]:
        """What a loaded module exports; nothing for one that is not there."""
        if name not in self._exports:
            loaded = self._loaded.get(name)
            placed = self._place(loaded) if loaded is not None else None
            self._exports[name] = placed.image.exported if placed is not None else {}
        return self._exports[name]

    def exported(self, name: str) -> int | None:
        """The running address of a symbol that the kernel exports."""
        return self.around.exported(name)

    def _other_build(self, loaded: Loaded, file: ModuleFile, placed: Placement) -> str | None:
        """Why the file is not that of the loaded module; None where nothing says so."""
        for section in file.sections:
            if section.name != ".note.gnu.build-id" or not section.file_size:
                continue
            own = files.build_id(file.bytes_of(section))
            there = loaded.build_id
            at = next((s.address for s in placed.image.sections if s.index == section.index and s.alloc), None)
            if there is None and at is not None:
                data = self._view.read(at, section.file_size)
                there = files.build_id(data) if data is not None else None
                if data is not None and there is None:
                    return "where its build ID should be in memory there is none"
            if own is not None and there is not None and own != there:
                return f"its build ID is {own.hex()}, that of the loaded module {there.hex()}"
        source = files.modinfo(file, "srcversion")
        if loaded.srcversion and source and source != loaded.srcversion:
            ours, theirs = printable(source.encode()), printable(loaded.srcversion.encode())
            return f"its srcversion is {ours}, that of the loaded module {theirs}"
        return None

    # Bytes

    def _text(self, loaded: Loaded, placed: Placement, result: ModuleExplained) -> None:
        image = placed.image
        running = Inside(self.around, image)
        boot = self._boot(image)
        read = scan(image, engine.EVIDENCE, self._layouts)
        refuse_findings(image, read)
        # What was only for its initialisation is gone, and with it whatever was patched there.
        read = replace(read, sites=tuple(s for s in read.sites if any(r.holds(s.address) for r in placed.text)))
        # module_finalize of 6.1 gives one section to alternatives_smp_module_add, that of 6.12 the memory of all text.
        if any(r.kind == "core" for r in placed.text):
            read = replace(read, sites=tuple(s for s in read.sites if s.family != _LOCKS or s.section == _TEXT))
        assert boot.native is not None
        planned = boot_plan(
            image, read, boot.native, kernel=boot.rules.since, seen=Seen(boot.return_thunk, boot.checks)
        )
        sites = Sites(planned.sites.get(family) or read.of(family) for family in boot.rules.boot)
        whole = engine.Kernel(image, running, boot, running)
        total = 0
        for region in placed.text:
            found = self._view.read(region.address, region.size)
            if found is None:
                self._say("module-not-in-dump", f"{region.size} bytes of its {region.kind} are not in the dump", loaded)
                result.total -= region.size
                continue
            total += self._region(region, placed, found, planned, whole, sites, result)
        result.unexplained_bytes = total

    def _region(
        self,
        region: Region,
        placed: Placement,
        found: bytes,
        planned: Plan,
        whole: engine.Kernel,
        sites: Sites,
        result: ModuleExplained,
    ) -> int:
        ground = Ground(placed.image, region.address, placed.pristine(region, found), found)
        engine.lay_plan(ground, planned)
        compared = engine.finish(whole, ground, sites)
        listed, number, count = runs.unexplained(ground, compared.sites)
        for cause, size in ground.counts().items():
            result.by_cause[cause] = result.by_cause.get(cause, 0) + size
        for family, tally in compared.tallies.items():
            states = result.states.setdefault(family, {})
            for state, sites_in in tally.states.items():
                states[state] = states.get(state, 0) + sites_in
        result.unexplained += listed
        result.runs += number
        result.proved += compared.proved
        return count

    def _boot(self, image: Image) -> Boot:
        """The kernel's boot, in running addresses."""
        boot = self._kernel.boot
        thunk = None if boot.return_thunk is None else self.around.moved(boot.return_thunk)
        return replace(boot, image=image, return_thunk=thunk, core=boot.image, its=None)


class _Resolver:
    """Symbols that one module wants from elsewhere: of the kernel first, then of the modules that it names."""

    def __init__(self, work: _Work, needs: list[str]) -> None:
        self._work = work
        self._needs = needs

    def __call__(self, name: str) -> int | None:
        found = self._work.exported(name)
        if found is not None:
            return found
        for module in self._needs:
            found = self._work.exported_by(module).get(name)
            if found is not None:
                return found
        return None
