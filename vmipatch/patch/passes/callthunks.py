"""Call depth tracking (arch/x86/kernel/callthunks.c, 6.2 on): calls go to code in the padding before a function.

On CPUs that need it (X86_FEATURE_CALL_DEPTH) the kernel copies a few instructions, which
count the call, to the end of the padding that the compiler left in front of
every function, and lets direct calls enter there.  The instructions are read
from the image, where they stand between ``skl_call_thunk_template`` and ``skl_call_thunk_tail``.
Imports annotate, image, isa and its sisters in ``patch/passes/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

from vmipatch.annotate import Site
from vmipatch.annotate.site import Alternative, Place
from vmipatch.errors import AddressError
from vmipatch.image import Image, Section
from vmipatch.isa import branch
from vmipatch.isa.decode import detailed
from vmipatch.patch.passes.contract import Boot, Choice, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rules import Rules, eras
from vmipatch.patch.text import Text

FAMILY = "call_sites"
ALTERNATIVES = "altinstructions"
FEATURE = "CALL_DEPTH"
PADDING = "padding"
NOP = 0x90
_CS = 0x2E


class Template(NamedTuple):
    """The instructions that count a call, and the virtual address at which they stand in the image."""

    address: int
    code: bytes


def template(image: Image, spec: Mapping[str, Any]) -> Template | None:
    """The image's own template, or that of a module's kernel; None where the kernel cannot track calls.

    Between its two symbols, or, in a kernel whose symbol table has no data, the only
    place in its constants that has the form of one of ``spec["templates"]``.
    """
    # A module without calls has functions that others call; a table that nobody named may not have been looked for yet.
    sure = image.container != "module" and not image.reconstructed
    if image.bits != 64 or (sure and image.section(".call_sites") is None):
        return None
    start, end = (image.symbols.lookup(name) for name in ("skl_call_thunk_template", "skl_call_thunk_tail"))
    if start is not None and end is not None and 0 < end - start <= spec["most"]:
        return Template(start, image.read(start, end - start))
    found = [
        Template(section.address + match.start(), match.group())
        for section in _constants(image)
        for form in spec["templates"]
        for match in _pattern(form).finditer(bytes(image.data[section.offset : section.offset + section.file_size]))
    ]
    return found[0] if len(found) == 1 else None


def _constants(image: Image) -> list[Section]:
    """The sections of read-only data.

    Where nobody named them: what lies between .text and .init.text, as vmlinux.lds.S places RO_DATA.
    """
    if image.container == "module":
        return []
    section, text, init = (image.section(name) for name in (".rodata", ".text", ".init.text"))
    if section is not None:
        return [section]
    if not image.reconstructed or text is None or init is None:
        return []
    return [s for s in image.sections if s.file_size and text.end <= s.address and s.end <= init.address]


def _pattern(form: str) -> re.Pattern[bytes]:
    """Hexadecimal bytes, ``..`` for any, as a pattern."""
    parts = [
        b"." if form[i : i + 2] == ".." else re.escape(bytes.fromhex(form[i : i + 2])) for i in range(0, len(form), 2)
    ]
    return re.compile(b"".join(parts), re.DOTALL)


class Reads(Protocol):
    """Text as it stands."""

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a virtual address; :class:`AddressError` where there are none."""


@dataclass(frozen=True)
class Thunks:
    """Where calls of each function go.

    ``core`` are the bounds of the text whose calls are counted (``_text`` to ``_etext``, or a module's), ``skipped``
    the functions that are never counted, ``skipped_ranges`` stretches of them; all virtual addresses as linked.
    ``others`` are texts of functions that a module's calls may enter too, and ``around`` reads them as they run.
    """

    template: Template
    core: range
    skipped: frozenset[int]
    skipped_ranges: tuple[range, ...]
    others: tuple[range, ...] = ()
    around: Reads | None = None

    def entry(self, text: Reads, function: int) -> int | None:
        """Where a call of the function goes (``patch_dest``): its padding, whether the template stands there already
        or has to be written; None where calls go to the function itself."""
        if function in self.skipped or any(function in r for r in self.skipped_ranges):
            return None
        if function not in self.core:
            if self.around is None or not any(function in r for r in self.others):
                return None
            text = self.around
        size = len(self.template.code)
        pad = function - size
        try:
            there = text.read(pad, size)
        except AddressError:
            return None
        return pad if there in (bytes((NOP,)) * size, self.code_at(pad)) else None

    def code_at(self, pad: int) -> bytes:
        """The template as it stands at a virtual address: its operands name what they did where it was read."""
        code, shift = bytearray(self.template.code), self.template.address - pad
        for at in self._fields:
            value = int.from_bytes(code[at : at + 4], "little") + shift & 0xFFFFFFFF
            code[at : at + 4] = value.to_bytes(4, "little")
        return bytes(code)

    @cached_property
    def _fields(self) -> list[int]:
        """Where in the template RIP-relative displacements lie."""
        code, at, found = self.template.code, 0, []
        while at < len(code) and (instruction := detailed(code[at:], 64)) is not None:
            if instruction.rip_offset:
                found.append(at + instruction.rip_offset)
            at += instruction.size
        return found


def thunks(image: Image, spec: Mapping[str, Any]) -> Thunks | None:
    """What this image has; None for a kernel without call depth tracking.

    ``spec`` is the section ``callthunks`` of an era: names of functions that are not counted (``skip``), and of
    stretches (``skip_ranges``: a symbol with a size in bytes, or two symbols).
    """
    found = template(image, spec) if spec else None
    core = image.own_text
    if found is None or core is None:
        return None
    lookup = image.symbols.lookup
    skipped = frozenset(a for name in spec["skip"] if (a := lookup(name)) is not None)
    ranges = []
    for name, limit in spec["skip_ranges"]:
        first = lookup(name)
        last = lookup(limit) if isinstance(limit, str) else first + limit if first is not None else None
        if first is not None and last is not None:
            ranges.append(range(first, last))
    return Thunks(found, core, skipped, tuple(ranges), image.other_texts, image)


def plan(text: Text, sites: Iterable[Site], how: Thunks) -> Iterator[Patch]:
    """A patch for every call that is led to padding, and one before it for the padding itself.

    ``sites`` are the direct calls of ``.call_sites``, or alternatives; what stands there now decides.  No call outside
    :attr:`Thunks.core` changes.  A site whose op is ``padding`` is only written.
    """
    entries: dict[int, int | None] = {}
    for site in sites:
        if site.address not in how.core:
            continue
        padding = site.op == PADDING
        target = site.end if padding else called(text.read(site.address, min(site.length, 6)), site.address)
        if target is None:
            continue
        if target not in entries:
            entries[target] = how.entry(text, target)
            yield from _padding(text, how, entries[target], site)
        pad = entries[target]
        if pad is None or padding:
            continue
        old = text.read(site.address, branch.CALL_SIZE)
        new = branch.near(branch.CALL, site.address, pad, 64)
        if new != old:
            text.write(site.address, new)
            yield Patch(site.address, old, new, Cause(FAMILY, "call", "a call that is counted"), site)


def _padding(text: Text, how: Thunks, pad: int | None, site: Site) -> Iterator[Patch]:
    """The patch that writes the template into padding, if it does not stand there already and the text is its own."""
    if pad is None or pad not in how.core:
        return
    code = how.code_at(pad)
    old = text.read(pad, len(code))
    if old != code:
        text.write(pad, code)
        yield Patch(pad, old, code, Cause(FAMILY, PADDING, "counts a call"), site, how.template.address)


def called(code: bytes, address: int) -> int | None:
    """The function that the direct call at a virtual address calls; None for any other instruction."""
    prefixes = 0
    while prefixes < len(code) and code[prefixes] == _CS:
        prefixes += 1
    body = code[prefixes:]
    if len(body) < branch.CALL_SIZE or body[0] != branch.CALL:
        return None
    return branch.target_of(body, address + prefixes, 64)


@lru_cache(maxsize=4)
def _thunks(image: Image, era: str) -> Thunks | None:
    return thunks(image, next(rules for rules in eras() if rules.name == era).section("callthunks"))


def thunks_of(boot: Boot) -> Thunks | None:
    """How this boot counts calls; None where it does not (X86_FEATURE_CALL_DEPTH)."""
    return _thunks(boot.image, boot.rules.name) if boot.has(FEATURE) else None


def paddings(boot: Boot) -> Iterator[Site]:
    """A site for the padding of every function that a symbol names and that calls of it could enter."""
    image, how = boot.image, _thunks(boot.image, boot.rules.name)
    if how is None:
        return
    size = len(how.template.code)
    for function in dict.fromkeys(address for address, _, _ in image.symbols.all()):
        if function in how.core and how.entry(image, function) is not None:
            yield Site(FAMILY, function - size, size, PADDING, ".text", "", function - size, Place())


class CallThunks(Pass):
    """Calls that are counted, and the padding that counts them."""

    family = FAMILY
    silent = True

    def applies(self, boot: Boot) -> bool:
        """Where the CPU's mitigations count calls."""
        return thunks_of(boot) is not None

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        how = thunks_of(boot)
        if how is not None:
            yield from plan(text, sites, how)

    def also(self, rules: Rules) -> tuple[str, ...]:
        """Where alternatives come first, what they have put in is looked at again (``patch_alt_call_sites``)."""
        order = rules.boot
        if FAMILY in order and ALTERNATIVES in order and order.index(FAMILY) > order.index(ALTERNATIVES):
            return (ALTERNATIVES,)
        return ()

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """Calls are counted, or not."""
        number = rules.bit(FEATURE)
        if number is None or _thunks(image, rules.name) is None or not any(_may_call(image, s) for s in sites):
            return []
        return [[Choice("calls not counted", ((number, False),)), Choice("calls counted", ((number, True),))]]


def _may_call(image: Image, site: Site) -> bool:
    """Whether a direct call may ever stand at a site."""
    if not isinstance(site.detail, Alternative):
        return True
    size = site.detail.replacement_length
    starts = image.read(site.address, site.length), image.read(site.detail.replacement, size) if size else b""
    return any(code.lstrip(bytes((_CS,)))[:1] == bytes((branch.CALL,)) for code in starts)
