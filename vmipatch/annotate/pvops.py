"""Names of the paravirt slots of one image: which function pointer belongs to which operation.

The layouts of ``specs/pvops/`` are tried on the image: of each slot the function that it holds there speaks for
the operation that a layout says, against it, or not at all.  The layouts that are contradicted least are taken, and
of a slot only what they agree on and nothing contradicts has a name.  Imports image, facts and errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby, product
from typing import NamedTuple, TypeVar

from vmipatch import facts
from vmipatch.errors import AddressError
from vmipatch.image import Image

Version = tuple[int, ...]
_T = TypeVar("_T")

_FUNCTIONS = "native-functions"
_LAYOUT = "linux-"
# paravirt_callee_save thunks, and functions that exist only to be pointed at by pv_ops (5.15 on).
_NATIVE = re.compile(r"(?:__raw_callee_save_)?_*(?:pv_)?native_(\w+)")

LEAST_MATCHES = 3
"""Slots that must hold their own native function before a layout counts as proved."""


class Slot(NamedTuple):
    """One function pointer.

    ``type`` is its number in ``.parainstructions`` (None where nothing tells how
    many slots the objects before it have), ``address`` its virtual address,
    ``name`` the op, ``function`` the virtual address that it holds in the image (0 for none).
    """

    type: int | None
    address: int
    name: str
    function: int


class _Word(NamedTuple):
    """One word of a layout: the object it is in, its place there, and the member's name; ``data`` holds no function."""

    object: str
    place: int
    part: str
    field: str
    data: bool = False

    @property
    def name(self) -> str:
        return ".".join(x for x in (self.object, self.part, self.field) if x)


_Variant = tuple[_Word, ...]
"""A layout for one configuration; the position of a word is its type."""


class Resolver:
    """What is known of an image's slots; made by :func:`resolve`."""

    def __init__(self, image: Image, types: Mapping[int, str], slots: Mapping[int, Slot]) -> None:
        self._image = image
        self._types = types
        self._slots = slots

    def name_of_slot(self, address: int) -> str | None:
        """The op of the slot at a virtual address; None where it is no slot, or nothing tells which."""
        slot = self._slots.get(address)
        return None if slot is None else slot.name

    def name_of_type(self, type: int) -> str | None:
        """The op that a type of ``.parainstructions`` means in this kernel; None where nothing tells."""
        return self._types.get(type)

    def slots(self) -> list[Slot]:
        """Every slot whose op and address are known, by address."""
        return sorted(self._slots.values(), key=lambda slot: slot.address)

    def function(self, slot: int) -> int:
        """The virtual address that the slot at a virtual address holds in the image, 0 for none.

        Raises :class:`AddressError` if the image holds no bytes there.
        """
        return int.from_bytes(self._image.read(slot, self._image.bits // 8), "little")


def resolve(image: Image) -> Resolver:
    """Find the paravirt objects of an image and name their slots.

    The layouts of the image's own release are tried; where the image's functions contradict each of them somewhere
    (a vendor's kernel), or the release has none or is not known, every other layout is, and one of those is taken
    that is contradicted less.  Without any evidence in the image, as in a module, the release alone decides, and
    only for types.
    """
    version = image.version
    own = _layout_of(version) if version is not None else None
    evidence = _Evidence(image)
    best: list[_Fit] = []
    if own is not None:
        types = facts.load("pvops", own).get("types")
        if types is not None:
            return Resolver(image, dict(enumerate(types)), {})
        variants = _variants(own, image.bits)
        best = _best(evidence, variants)
        if best and not best[0].against:
            return _agreed(image, evidence, best)
        if not evidence.found:
            return _agreed(image, evidence, [_Fit(v, frozenset(), frozenset()) for v in variants])
    others = [v for name in _layouts() if name != own for v in _variants(name, image.bits)]
    other = _best(evidence, others)
    if not best or (other and len(other[0].against) < len(best[0].against)):
        best = other
    return _agreed(image, evidence, best)


class _Fit(NamedTuple):
    """What an image says of a layout: the positions of the words that it proves, and of those that it contradicts."""

    variant: _Variant
    proved: frozenset[int]
    against: frozenset[int]

    def named(self) -> Iterator[tuple[int, bool, bool]]:
        """The position of each word that holds a function; whether its slot has its name; whether its type has.

        What says nothing itself goes with its neighbours in the object: it has its name where neither the evidence
        before it nor that behind it contradicts.  Where an object ends against the evidence nobody knows how many
        words it has, and the types behind it have no names.
        """
        counts = True
        for _, words in groupby(enumerate(self.variant), lambda item: item[1].object):
            numbers = [number for number, _ in words]
            behind = list(self._contradicted(reversed(numbers)))
            for number, before, after in zip(numbers, self._contradicted(numbers), reversed(behind), strict=True):
                fits = number in self.proved or not (before or after)
                if not self.variant[number].data:
                    yield number, fits, fits and counts
            last = max((n for n in numbers if n in self.proved or n in self.against), default=None)
            counts = counts and last not in self.against

    def _contradicted(self, numbers: Iterable[int]) -> Iterator[bool]:
        """Of each word, whether the last evidence up to it in this direction contradicts."""
        last = False
        for number in numbers:
            last = number in self.against or (last and number not in self.proved)
            yield last


def _best(evidence: _Evidence, variants: list[_Variant]) -> list[_Fit]:
    """Of the variants that the image's functions prove those that they contradict least.

    Those that leave unsaid what another one explains are not among them.
    """
    fits = [fit for variant in variants if (fit := evidence.fit(variant)) is not None]
    least = min((len(fit.against) for fit, _ in fits), default=0)
    fits = [(fit, slots) for fit, slots in fits if len(fit.against) == least]
    return [fit for fit, slots in fits if not any(slots < more for _, more in fits)]


def _agreed(image: Image, evidence: _Evidence, fits: list[_Fit]) -> Resolver:
    """What all the variants say alike: op by type, and op by address where the objects' addresses are known."""
    size = image.bits // 8
    types: dict[int, set[str | None]] = {}
    names: dict[int, set[str | None]] = {}
    numbers: dict[int, set[int | None]] = {}
    for fit in fits:
        for number, slot_named, type_named in fit.named():
            word = fit.variant[number]
            types.setdefault(number, set()).add(word.name if type_named else None)
            base = evidence.base(word.object)
            if base is not None:
                address = base + word.place * size
                names.setdefault(address, set()).add(word.name if slot_named else None)
                numbers.setdefault(address, set()).add(number if type_named else None)
    slots = {
        address: Slot(_only(numbers[address]), address, name, evidence.pointer(address))
        for address, found in names.items()
        if (name := _only(found)) is not None
    }
    return Resolver(image, {n: name for n, found in types.items() if (name := _only(found)) is not None}, slots)


def _only(found: set[_T | None]) -> _T | None:
    return next(iter(found)) if len(found) == 1 else None


class _Evidence:
    """What the image's own pointers say; each address is looked up once."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._size = image.bits // 8
        self._bases: dict[str, int | None] = {}
        self._pointers: dict[int, int] = {}
        self._fields: dict[int, frozenset[str] | None] = {}
        self.found = False

    def base(self, name: str) -> int | None:
        """The virtual address of a paravirt object, or None."""
        if name not in self._bases:
            own = self._image.container != "module"
            self._bases[name] = self._image.symbols.lookup(name) if own else None
        return self._bases[name]

    def pointer(self, slot: int) -> int:
        """What the slot holds; 0 where the image has no bytes there."""
        if slot not in self._pointers:
            try:
                value = int.from_bytes(self._image.read(slot, self._size), "little")
            except AddressError:
                value = 0
            self._pointers[slot] = value
        return self._pointers[slot]

    def _means(self, function: int) -> frozenset[str] | None:
        """The slots that a function belongs to; empty where it tells nothing; None if it is no function."""
        if function not in self._fields:
            named = self._image.symbols.at(function)
            fields: frozenset[str] | None = frozenset()
            if named is not None:
                self.found = True
                fields = _fields_of(named[0]) if named[1] == 0 else None
            self._fields[function] = fields
        return self._fields[function]

    def fit(self, variant: _Variant) -> tuple[_Fit, frozenset[int]] | None:
        """What the image says of a variant, and the addresses of the slots that prove it.

        None if that are too few: fewer than :data:`LEAST_MATCHES`, than those with a function that nobody knows, or
        not more than those that contradict.
        """
        proved: dict[int, int] = {}
        against: set[int] = set()
        others = 0
        for number, word in enumerate(variant):
            base = self.base(word.object)
            if base is None or word.data:
                continue
            slot = base + word.place * self._size
            function = self.pointer(slot)
            if not function:
                continue
            fields = self._means(function)
            if fields is None:
                against.add(number)
            elif word.field in fields:
                proved[number] = slot
            elif _NEUTRAL in fields and word.field not in _occupied():
                continue
            elif fields:
                against.add(number)
            else:
                others += 1
        if len(proved) < max(LEAST_MATCHES, others, len(against) + 1):
            return None
        return _Fit(variant, frozenset(proved), frozenset(against)), frozenset(proved.values())


_NEUTRAL = ""


@cache
def _fields_of(function: str) -> frozenset[str]:
    """The slots that hold a function of that name on bare hardware; empty for a function we do not know."""
    natives, neutral = _functions()
    if function in neutral:
        return frozenset((_NEUTRAL,))
    fields = natives.get(function, frozenset())
    match = _NATIVE.fullmatch(function)
    return fields | {match[1]} if match else fields


@cache
def _functions() -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    spec = facts.load("pvops", _FUNCTIONS)
    fields: dict[str, set[str]] = {}
    for field, functions in spec["native"].items():
        for function in functions:
            fields.setdefault(function, set()).add(field)
    return {name: frozenset(found) for name, found in fields.items()}, frozenset(spec["neutral"])


@cache
def _occupied() -> frozenset[str]:
    return frozenset(facts.load("pvops", _FUNCTIONS)["occupied"])


@cache
def _layouts() -> dict[str, Version]:
    """Names of the layouts, newest first, with the release that each begins at (which its name says)."""
    found = [name for name in facts.names("pvops") if name.startswith(_LAYOUT)]
    since = {name: _version(name.removeprefix(_LAYOUT)) for name in found}
    return dict(sorted(since.items(), key=lambda item: item[1], reverse=True))


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def _layout_of(version: Version) -> str | None:
    """The layout of a release; None where no layout was checked against it."""
    for name, since in _layouts().items():
        if since <= version:
            return name if version < _version(facts.load("pvops", name)["until"]) else None
    return None


@cache
def _variants(name: str, bits: int) -> list[_Variant]:
    """The layout for each configuration there can be, none twice."""
    groups = facts.load("pvops", name).get("group", ())
    return list(dict.fromkeys(_lay_out(groups, holds) for holds in _configurations(groups, bits)))


def _configurations(groups: list[facts.Spec], bits: int) -> Iterator[dict[str, bool]]:
    """Truth of every condition, in each combination that a kernel of ``bits`` bits can have."""
    conditions = {c.removeprefix("!") for group in groups for c in group.get("when", ())}
    fixed = {"64": bits == 64}
    if bits == 64:
        fixed |= {"pae": False}
    else:
        fixed |= {"levels-5": False}
    free = sorted(conditions - fixed.keys() - {"levels-3"})
    for values in product((False, True), repeat=len(free)):
        holds = fixed | dict(zip(free, values, strict=True))
        yield holds | {"levels-3": bits == 64 or holds.get("pae", False)}


def _lay_out(groups: list[facts.Spec], holds: dict[str, bool]) -> _Variant:
    words: list[_Word] = []
    sizes: dict[str, int] = {}
    for group in groups:
        if all(holds[c.removeprefix("!")] != c.startswith("!") for c in group.get("when", ())):
            name = group["object"]
            for field in group["slots"]:
                place = sizes.get(name, 0)
                sizes[name] = place + 1
                words.append(_Word(name, place, group.get("part", ""), field, group.get("data", False)))
    return tuple(words)
