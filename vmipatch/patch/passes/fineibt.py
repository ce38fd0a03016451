"""kCFI and FineIBT (``apply_fineibt`` of arch/x86/kernel/alternative.c, 6.2 on): hashes, preambles and callers.

A kernel built with clang's kCFI has a hash in front of every function that may be
called indirectly, and a check of it in front of every indirect call.  While
booting the kernel seeds the hashes anew, and on CPUs with IBT turns preambles and callers into
FineIBT's, of which there are several forms.  What it chose cannot be known from the
image, but from the text that it has left: :func:`recover`.
Imports annotate, facts, image and its sisters in ``patch/passes/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from vmipatch import facts
from vmipatch.annotate import Site
from vmipatch.annotate.cfi import BEFORE, CALLER, offset_of
from vmipatch.annotate.endbr import ENDBR
from vmipatch.annotate.site import Hash, HashCheck
from vmipatch.image import Image
from vmipatch.isa import branch
from vmipatch.patch.passes import its
from vmipatch.patch.passes.contract import Boot, Checks, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

FAMILY = "cfi_sites"

BHI_STRIDE = 32
"""Bytes from one member of ``__bhi_args`` to the next."""

_MOV_R10D = b"\x41\xba"
_JUMP = bytes((branch.JMP_SHORT, CALLER - 2))
_HASH = (0x12345678).to_bytes(4, "little")
_LFSR = 0x80200003
_WORD = 0xFFFFFFFF
_R11 = 11


class Form(NamedTuple):
    """The sequences of one kernel: see ``specs/tables/cfi_sites.toml``."""

    name: str
    preamble: bytes
    caller: bytes
    paranoid: bytes
    indirect: int
    jump: bytes
    bhi: int
    bhi_call: bytes
    bhi1: bytes
    skip_without_endbr: bool


@dataclass(frozen=True)
class Kernel:
    """What an image tells: its form, how far functions lie behind their ``__cfi_`` symbols, and the era's rules.

    ``poison`` is what an ENDBR becomes; ``seal`` is ``none``, ``always`` or ``checked``; ``enabled`` what a kCFI
    caller gets back besides its first bytes, and where; ``bhi_args`` the virtual address of ``__bhi_args``.
    """

    form: Form
    offset: int
    poison: bytes
    seal: str
    enabled: tuple[int, bytes]
    bhi_args: int | None


def kernel(boot: Boot) -> Kernel | None:
    """What the image and, where nothing in it tells, its version say; None for a kernel without preambles."""
    core = boot.core or boot.image
    poison = boot.rules.section("endbr").get("poison")
    if poison is None:
        return None  # before 5.18 nothing is sealed, and there are no preambles
    return _kernel(boot.image, core, core.version or boot.rules.since, bytes.fromhex(poison))


@lru_cache(maxsize=4)
def _kernel(image: Image, core: Image, version: tuple[int, ...], poison: bytes) -> Kernel | None:
    offset = offset_of(image)
    form = form_of(core) if offset is not None else None
    if form is None or offset is None:
        return None
    spec = facts.load("tables", FAMILY)
    enabled = _since(spec["kcfi"], version)
    seal = _since(spec["seal"], version)
    code = bytes.fromhex(enabled["code"]) if enabled else b""
    return Kernel(
        form, offset, poison, seal["how"] if seal else "none",
        (enabled["at"] if enabled else 0, code), image.symbols.lookup("__bhi_args"),
    )  # fmt: skip


def _since(rows: Iterable[dict[str, Any]], version: tuple[int, ...]) -> dict[str, Any] | None:
    """The last row that holds for a version."""
    held = [r for r in rows if tuple(int(part) for part in r["since"].split(".")) <= version]
    return held[-1] if held else None


@lru_cache(maxsize=4)
def form_of(image: Image) -> Form | None:
    """The form whose preamble and caller the image's ``.rodata`` holds, else the one of the version."""
    rows = facts.load("tables", FAMILY)["form"]
    section = image.section(".rodata")
    data = bytes(image.data[section.offset : section.offset + section.file_size]) if section is not None else b""
    here = [r for r in rows if bytes.fromhex(r["preamble"]) in data and bytes.fromhex(r["caller"]) in data]
    row = here[0] if len(here) == 1 else _since(rows, image.version or ())
    if row is None:
        return None
    hexed = {
        key: bytes.fromhex(row.get(key, "")) for key in ("preamble", "caller", "paranoid", "jump", "bhi_call", "bhi1")
    }
    return Form(
        row["name"], hexed["preamble"], hexed["caller"], hexed["paranoid"], row.get("indirect", 0), hexed["jump"],
        row.get("bhi", 0),
        hexed["bhi_call"], hexed["bhi1"], row["skip_without_endbr"],
    )  # fmt: skip


def rehashed(value: int, seed: int | None, poison: bytes) -> int:
    """A hash under a seed, never one whose bytes, or whose negative's, are an ENDBR (``cfi_rehash``)."""
    if seed is None:
        return value
    value ^= seed
    while _is_endbr(value, poison) or _is_endbr(-value & _WORD, poison):
        value = value >> 1 ^ (_LFSR if value & 1 else 0)
    return value


def _is_endbr(value: int, poison: bytes) -> bool:
    """``is_endbr``: ENDBR64, ENDBR32, and what a sealed one has become."""
    return value.to_bytes(4, "little") in (ENDBR[64], ENDBR[32], poison)


def _marked(text: Text, address: int, how: Kernel) -> bool:
    return _is_endbr(int.from_bytes(text.read(address, 4), "little"), how.poison)


def plan(
    text: Text, sites: Sequence[Site], how: Kernel, state: Checks, thunks: its.Thunks | None = None
) -> Iterator[Patch]:
    """What the pass writes over preambles and callers, in the kernel's order.

    ``thunks`` are those against Indirect Target Selection where this CPU wants them.
    """
    callers = [s for s in sites if isinstance(s.detail, HashCheck)]
    preambles = [s for s in sites if isinstance(s.detail, Hash)]
    for site in callers:
        new = caller_bytes(text, site, how, state, thunks)
        yield from _written(text, site.address, new, f"a caller: {state}", site)
    for site in preambles:
        address, new = preamble_bytes(text, site, how, state)
        yield from _written(text, address, new, f"a preamble: {state}", site)
    if state.mode == "fineibt" and how.seal != "none":
        for site in preambles:
            # Nobody calls a function at its own ENDBR any more (cfi_rewrite_endbr).
            function = site.address + how.offset
            if site.length > how.offset and text.read(function, 4) == ENDBR[64]:
                yield from _written(text, function, how.poison, "called through its preamble only", site)


def _written(text: Text, address: int, new: bytes, why: str, site: Site) -> Iterator[Patch]:
    old = text.read(address, len(new))
    if new != old:
        text.write(address, new)
        yield Patch(address, old, new, Cause(FAMILY, site.op, why), site)


def caller_bytes(text: Text, site: Site, how: Kernel, state: Checks, thunks: its.Thunks | None) -> bytes:
    """The bytes of a caller; under paranoid FineIBT with the branch behind it."""
    detail = site.detail
    assert isinstance(detail, HashCheck)
    old = text.read(site.address, site.length)
    value = rehashed(detail.value, state.seed, how.poison)
    check = (-value & _WORD).to_bytes(4, "little")
    if state.mode == "off":
        return _JUMP + check + old[6:CALLER]
    if state.mode == "kcfi":
        at, code = how.enabled
        kept = bytearray(_MOV_R10D + check + old[6:CALLER])
        kept[at : at + len(code)] = code
        return bytes(kept)
    form = how.form
    if not state.paranoid:
        return _with_hash(form.caller, value)
    if detail.branch not in ("call", "jmp"):
        # A conditional jump follows no caller: the kernel warns, and leaves it without a check.
        return _JUMP + check + old[6:CALLER]
    new = bytearray(_with_hash(form.paranoid, value))
    if thunks is not None and its.wanted_at(site.address + form.indirect, _R11):
        target = thunks.target(site.address + CALLER, _R11)
        if target is None:
            return old
        new[CALLER : site.length] = its.led(old[CALLER:], site.address + CALLER, target)
    elif detail.branch == "jmp":
        new[form.indirect :] = form.jump
    return bytes(new)


def preamble_bytes(text: Text, site: Site, how: Kernel, state: Checks) -> tuple[int, bytes]:
    """Where a preamble is written, and what; hashes are read from the text as it stands."""
    detail = site.detail
    assert isinstance(detail, Hash)
    value = rehashed(detail.value, state.seed, how.poison)
    register, function = detail.register, detail.function
    plain = bytes((0xB8 + register,)) + value.to_bytes(4, "little")
    form = how.form
    if state.mode != "fineibt":
        return site.address, plain
    if form.skip_without_endbr and not _marked(text, function, how):
        return site.address, plain
    address = function - BEFORE
    new = bytearray(_with_hash(form.preamble, value))
    if state.bhi and register and form.bhi:
        if register == 1 and not state.permissive:
            new[form.bhi : form.bhi + len(form.bhi1)] = form.bhi1
        elif how.bhi_args is not None:
            at = form.bhi + len(form.bhi_call) - 1
            call = branch.near(branch.CALL, address + at, how.bhi_args + BHI_STRIDE * register, 64)
            new[form.bhi : at] = form.bhi_call[:-1]
            new[at : at + len(call)] = call
    # Where the padding is longer, kCFI's preamble stays in front of FineIBT's, seeded.
    kept = plain[: address - site.address]
    kept += text.read(site.address + len(kept), address - site.address - len(kept))
    return site.address, kept + bytes(new)


def _with_hash(form: bytes, value: int) -> bytes:
    return form.replace(_HASH, value.to_bytes(4, "little"), 1)


def sealed(text: Text, address: int, how: Kernel, state: Checks) -> list[tuple[int, bytes]]:
    """What sealing the ENDBR at a virtual address writes in front of it (``poison_cfi``): addresses and bytes."""
    zero = bytes(4)
    checked = how.seal == "checked"
    if state.mode == "kcfi" and how.seal != "none":
        start = address - (how.offset if checked else BEFORE)
        code = text.read(start, 5)
        if checked and (code[0] not in range(0xB8, 0xC0) or code[1:] == zero):
            return []
        return [(start + 1, zero)]
    if state.mode != "fineibt":
        return []
    start = address - BEFORE
    marked = _marked(text, start, how)
    if checked and not marked:
        return []
    found = [(start, how.poison)] if marked else []
    if how.seal != "none":
        found.append((start + how.form.preamble.index(_HASH), zero))
    return found


Read = Callable[[int, int], bytes | None]
"""Bytes of the running kernel's text by virtual address as linked; None where there are none."""


def recover(image: Image, sites: Sequence[Site], how: Kernel, read: Read) -> Checks:
    """What the boot chose, by the text that it left: most of a sample decide; every site is then held against it."""
    form = how.form
    modes: Counter[tuple[str, bool]] = Counter()
    seeds: Counter[int] = Counter()
    callers = [s for s in sites if isinstance(s.detail, HashCheck)]
    for site in callers[:: max(1, len(callers) // _SAMPLE)]:
        now = read(site.address, CALLER)
        mode = _mode(now, form) if now is not None else None
        if now is None or mode is None:
            continue
        modes[mode] += 1
        if mode[0] == "fineibt":
            at = (form.paranoid if mode[1] else form.caller).index(_HASH)
            value = int.from_bytes(now[at : at + 4], "little")
        else:
            value = -int.from_bytes(now[2:6], "little") & _WORD
        assert isinstance(site.detail, HashCheck)
        seeds[value ^ site.detail.value] += 1
    chosen, paranoid = modes.most_common(1)[0][0] if modes else ("kcfi", False)
    seed = seeds.most_common(1)[0][0] if seeds else 0
    bhi, permissive = _arguments(image, sites, how, read) if chosen == "fineibt" else (False, False)
    return Checks(chosen, seed or None, paranoid, bhi, permissive)


def _mode(now: bytes, form: Form) -> tuple[str, bool] | None:
    """What a caller's bytes look like: the mode, and whether it is the paranoid one."""
    for code, mode in ((form.paranoid, ("fineibt", True)), (form.caller, ("fineibt", False))):
        if code and _like(now, code):
            return mode
    if now[:2] == _JUMP:
        return "off", False
    return ("kcfi", False) if now[:2] == _MOV_R10D else None


def _like(now: bytes, code: bytes) -> bool:
    at = code.index(_HASH)
    return now[:at] == code[:at] and now[at + 4 : CALLER] == code[at + 4 : CALLER]


def _arguments(image: Image, sites: Sequence[Site], how: Kernel, read: Read) -> tuple[bool, bool]:
    """Whether preambles clear arguments, and whether those of one argument do so by a call."""
    form = how.form
    ones: Counter[bool] = Counter()
    more: Counter[bool] = Counter()
    several = [s for s in sites if isinstance(s.detail, Hash) and s.detail.register]
    for site in several[:: max(1, len(several) // _SAMPLE)] if form.bhi else ():
        function = site.address + how.offset
        now = read(function - BEFORE + form.bhi, len(form.bhi_call))
        if now is None or site.length <= how.offset:
            continue
        assert isinstance(site.detail, Hash)
        (ones if site.detail.register == 1 else more)[now == form.bhi_call] += 1
    called = ones[True] > ones[False]
    return (more[True] > more[False] if more else called), called


_SAMPLE = 2048

MODES = ("off", "kcfi", "fineibt")


def every_state(form: Form) -> Iterator[Checks]:
    """Every way in which a boot may go, hashes as on disk."""
    for mode in MODES:
        yield Checks(mode, None)
    for paranoid in (False, True) if form.paranoid else (False,):
        for bhi, permissive in ((False, False), (True, False), (True, True)) if form.bhi else ((False, False),):
            if paranoid or bhi:
                yield Checks("fineibt", None, paranoid, bhi, permissive)


class FineIbt(Pass):
    """Preambles and callers as the boot formed and seeded them (:attr:`Boot.checks`)."""

    family = FAMILY
    needs_cpu = False

    def applies(self, boot: Boot) -> bool:
        """Only where it is known what the boot chose: a kernel chooses its seed by chance."""
        return boot.checks is not None

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        how = kernel(boot)
        if how is None or boot.checks is None:
            return
        thunks = boot.its if boot.has("INDIRECT_THUNK_ITS") else None
        if thunks is not None and boot.checks.paranoid:
            thunks.check = its.check_of(boot.image)
        yield from plan(text, sites, how, boot.checks, thunks)

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """Every mode; a hash is any number besides."""
        form = form_of(image)
        return [[Choice(str(state), checks=state) for state in every_state(form)]] if form is not None else []
