"""What a scan gives: sites, tables and findings, the same for every family.  Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, groupby, repeat
from operator import attrgetter
from typing import NamedTuple, overload


class Paravirt(NamedTuple):
    """A call site of paravirt_ops.

    ``type`` is the word index of the slot in the kernel's own numbering,
    ``slot`` the virtual address of the function pointer that the site reads
    (None where the site's bytes name none), ``clobbers`` the registers that the
    kernel says the site may lose (bits: 1 EAX, 2 ECX, 4 EDX).
    """

    type: int
    slot: int | None
    clobbers: int


class Alternative(NamedTuple):
    """One entry of ``.altinstructions``.

    ``replacement`` is the virtual address of ``replacement_length`` bytes;
    ``feature`` a bit number of x86_capability; ``pad_length`` the trailing nops
    inside the site where the layout counts them (4.1 to 5.12), else None.
    """

    replacement: int
    replacement_length: int
    feature: int
    inverted: bool
    direct_call: bool
    pad_length: int | None


class Lock(NamedTuple):
    """A LOCK prefix."""


class Vmi(NamedTuple):
    """One entry of ``.vmi.annotation``.

    ``version`` is ``v1``, ``v1b`` or ``v2``; ``call`` the number in that version's
    ABI; ``translation`` the virtual address of ``translation_length`` bytes;
    ``growth`` the translation's length less that of the unpadded native code;
    ``call_offset`` where in the translation its ``E8`` stands (v1 says nothing: None).
    """

    version: str
    call: int
    translation: int
    translation_length: int
    growth: int
    call_offset: int | None


class Afterburn(NamedTuple):
    """One sensitive instruction and its padding; ``device`` names the device table, or is empty."""

    device: str


class Mcount(NamedTuple):
    """The call of ``__fentry__`` (or ``mcount``) that a function begins with; ``target`` is 0 where a nop stands."""

    target: int


class JumpLabel(NamedTuple):
    """A branch that a static key decides: a nop, or a jump to ``target``.

    ``key`` is the virtual address of the ``struct static_key``; ``likely`` is true
    where the jump is taken while the key is off.
    """

    target: int
    key: int
    likely: bool


class StaticCall(NamedTuple):
    """A call of (``tail``: a jump to) what a ``struct static_call_key`` names now.

    ``key`` is the key's virtual address (0: no table says it), ``trampoline`` that of the
    eight bytes through which everybody may call it.
    """

    key: int
    trampoline: int
    tail: bool


class Thunk(NamedTuple):
    """A branch that goes through a thunk of the kernel: its ``target``, and ``register`` where it stands for one.

    ``register`` is x86's number, or None for a return and where no symbol tells.
    """

    target: int
    register: int | None


class RuntimeConst(NamedTuple):
    """An immediate that becomes the value of ``variable``: a pointer (``ptr``, 8 bytes) or a shift (``shift``, 1)."""

    kind: str
    variable: str


class Hash(NamedTuple):
    """The type hash of a function that may be called indirectly (kCFI), as on disk.

    ``register`` is x86's number of the register that the preamble loads it into: 0, or, where the compiler
    tells how many arguments a function has, that number (7: more than six).  ``function`` is the
    virtual address of the function's first instruction.
    """

    value: int
    register: int
    function: int


class HashCheck(NamedTuple):
    """A caller's check of such a hash; ``branch`` is the indirect branch behind it: ``call``, ``jmp`` or ``jcc``."""

    value: int
    branch: str


class Place(NamedTuple):
    """An address and nothing more: an ``ENDBR`` or a call that a table names."""


Detail = (
    Paravirt
    | Alternative
    | Lock
    | Vmi
    | Afterburn
    | Mcount
    | JumpLabel
    | StaticCall
    | Thunk
    | RuntimeConst
    | Hash
    | HashCheck
    | Place
)


class Site(NamedTuple):
    """The bytes in the kernel that one annotation names.

    ``address`` and ``entry`` (the table entry's own place) are virtual;
    ``length`` is in bytes, padding included; ``section`` holds the site, ``table``
    the entry; ``op`` says what the site does, ``unknown`` where nothing tells.
    """

    family: str
    address: int
    length: int
    op: str
    section: str
    table: str
    entry: int
    detail: Detail

    @property
    def end(self) -> int:
        """The virtual address just after the site."""
        return self.address + self.length


def many(
    family: str,
    addresses: Iterable[int],
    lengths: Iterable[int],
    ops: Iterable[str],
    sections: Iterable[str],
    table: str,
    entries: Iterable[int],
    details: Iterable[Detail],
) -> list[Site]:
    """The sites of one table by their columns: tables of a hundred thousand entries are made at once."""
    rows = zip(repeat(family), addresses, lengths, ops, sections, repeat(table), entries, details, strict=False)
    return list(map(partial(tuple.__new__, Site), rows))


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table that was found: ``count`` entries of the layout named ``layout``, at virtual ``address``.

    ``sealed`` tables were emptied by ``vmipatch patch --seal``, or their sites written in the file: they name no site.
    ``found`` says how a table without a section of its own was found, else it is empty.  ``padding`` is how many
    entries more are zero, name nothing and are not counted: what the linker fills a page with, or a seal leaves.
    """

    family: str
    section: str
    address: int
    size: int
    layout: str | None
    count: int
    sealed: bool = False
    found: str = ""
    padding: int = 0


class Places(Sequence[Site]):
    """The sites of one table in bulk, each made when it is asked for.

    All have ``length`` bytes; ``addresses`` are virtual, in table order; ``make`` makes the one with a number.
    """

    def __init__(
        self, table: TableInfo, length: int, addresses: Sequence[int], make: Callable[[int, int], Site]
    ) -> None:
        self.table = table
        self.length = length
        self.addresses = addresses
        self._make = make

    def site(self, number: int) -> Site:
        """The site that an entry names."""
        return self._make(number, self.addresses[number])

    def within(self, start: int, end: int) -> Places:
        """Those that lie in a range of virtual addresses."""
        last = end - self.length
        numbers = [number for number, address in enumerate(self.addresses) if start <= address <= last]
        if len(numbers) == len(self.addresses):
            return self
        own = [self.addresses[number] for number in numbers]
        return Places(self.table, self.length, own, lambda number, address: self._make(numbers[number], address))

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Site]:
        return map(self._make, range(len(self.addresses)), self.addresses)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> list[Site]: ...

    def __getitem__(self, index: int | slice) -> Site | list[Site]:
        numbers = range(len(self.addresses))[index]
        return self.site(numbers) if isinstance(numbers, int) else [self.site(number) for number in numbers]


class Sites(Sequence[Site]):
    """Sites of several sequences, one behind the other: those in bulk are made when they are asked for."""

    def __init__(self, parts: Iterable[Sequence[Site]] = ()) -> None:
        self.parts = tuple(parts)

    def addresses(self) -> Iterator[int]:
        """The virtual address of each."""
        for part in self.parts:
            yield from part.addresses if isinstance(part, Places) else [site.address for site in part]

    def within(self, start: int, end: int) -> Sites:
        """Those that lie in a range of virtual addresses."""
        return Sites(
            part.within(start, end)
            if isinstance(part, Places)
            else [s for s in part if start <= s.address and s.address + s.length <= end]
            for part in self.parts
        )

    @cached_property
    def _whole(self) -> list[Site]:
        return list(self)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Site]:
        return chain.from_iterable(self.parts)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> list[Site]: ...

    def __getitem__(self, index: int | slice) -> Site | list[Site]:
        return self._whole[index]


Detailed = str | int | bool | None | tuple[str, ...] | tuple[int, ...]
"""What a finding's details may hold: plain values, and rows of them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong that a person should see; ``id`` is stable.

    ``severity`` is ``error``, ``warning`` or ``note``.  ``address`` is virtual, ``offset`` the same place in
    :attr:`Image.data` in bytes (None where the image has no bytes for it), ``length`` in bytes; ``symbol`` the
    name that the address is in, ``symbol_offset`` bytes after its start.  ``details`` are free: an integer whose
    key is ``address`` or ends in ``_address`` is a virtual address.  Scans fill in the first five; audits the rest.
    """

    id: str
    severity: str
    message: str
    section: str
    address: int | None = None
    offset: int | None = None
    length: int | None = None
    symbol: str | None = None
    symbol_offset: int | None = None
    details: Mapping[str, Detailed] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        place = self.section + (f", address {self.address:#x}" if self.address is not None else "")
        return f"{self.severity}: {place}: {self.message} [{self.id}]"


@dataclass(frozen=True)
class Scan:
    """All that a scan found; ``sites`` in table order (order is meaning: later entries win).

    ``families`` are those whose sites were read; of others the entries were counted at most.  The sites of the tables
    in ``bulk`` are not among ``sites``.
    """

    tables: tuple[TableInfo, ...]
    sites: tuple[Site, ...]
    findings: tuple[Finding, ...]
    families: tuple[str, ...] = ()
    bulk: tuple[Places, ...] = ()

    def of(self, family: str) -> list[Site]:
        """The sites of one family, in table order."""
        return list(self.all_of(family))

    def all_of(self, family: str) -> Sites:
        """The same, those in bulk without an object for each."""
        return Sites((self._by_family.get(family, ()), *self.in_bulk(family)))

    def in_bulk(self, family: str) -> list[Places]:
        """The tables of one family that were read in bulk."""
        return [places for places in self.bulk if places.table.family == family]

    @cached_property
    def _by_family(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for family, sites in groupby(self.sites, attrgetter("family")):
            found.setdefault(family, []).extend(sites)
        return found
