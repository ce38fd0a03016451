"""Names of the paravirt slots of one image: which function pointer belongs to which operation.

The layouts of ``specs/pvops/`` are tried on the image: a layout fits when the
functions that its slots hold in the image are those of the operations it says.
Only what every layout that fits agrees on has a name.  Imports image, facts and errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
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
    """One word of a layout: the object it is in, its place there, and the member's name."""

    object: str
    place: int
    part: str
    field: str

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

    The layouts of the image's own release are tried; where the image's functions
    contradict them all (a vendor's kernel), or the release has none or is not known, every
    other layout is.  Without any evidence in the image, as in a module, the
    release alone decides, and only for types.
    """
    version = image.version
    own = _layout_of(version) if version is not None else None
    if own is not None:
        types = facts.load("pvops", own).get("types")
        if types is not None:
            return Resolver(image, dict(enumerate(types)), {})
        evidence = _Evidence(image)
        variants = _variants(own, image.bits)
        fitting = _fitting(evidence, variants)
        if fitting:
            return _agreed(image, evidence, fitting)
        if not evidence.found:
            return _agreed(image, evidence, variants)
    else:
        evidence = _Evidence(image)
    others = [v for name in _layouts() if name != own for v in _variants(name, image.bits)]
    return _agreed(image, evidence, _fitting(evidence, others))


def _fitting(evidence: _Evidence, variants: list[_Variant]) -> list[_Variant]:
    """The variants that the image's functions prove, less those that leave unsaid what another one explains."""
    proved = [(variant, found) for variant in variants if (found := evidence.proof(variant))]
    return [variant for variant, found in proved if not any(found < more for _, more in proved)]


def _agreed(image: Image, evidence: _Evidence, variants: list[_Variant]) -> Resolver:
    """What all the variants say alike: op by type, and op by address where the objects' addresses are known."""
    size = image.bits // 8
    types: dict[int, set[str]] = {}
    names: dict[int, set[str]] = {}
    numbers: dict[int, set[int]] = {}
    for variant in variants:
        for number, word in enumerate(variant):
            types.setdefault(number, set()).add(word.name)
            base = evidence.base(word.object)
            if base is not None:
                address = base + word.place * size
                names.setdefault(address, set()).add(word.name)
                numbers.setdefault(address, set()).add(number)
    slots = {
        address: Slot(_only(numbers[address]), address, name, evidence.pointer(address))
        for address, found in names.items()
        if (name := _only(found)) is not None
    }
    return Resolver(image, {n: name for n, found in types.items() if (name := _only(found)) is not None}, slots)


def _only(found: set[_T]) -> _T | None:
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

    def proof(self, variant: _Variant) -> frozenset[int]:
        """Addresses of the slots that hold a native function of their own.

        Empty if a slot holds a function of another, or too few hold their own.
        """
        matches: set[int] = set()
        others = 0
        for word in variant:
            base = self.base(word.object)
            if base is None:
                continue
            slot = base + word.place * self._size
            function = self.pointer(slot)
            if not function:
                continue
            fields = self._means(function)
            if fields is None:
                return frozenset()
            if word.field in fields:
                matches.add(slot)
            elif _NEUTRAL in fields:
                continue
            elif fields:
                return frozenset()
            else:
                others += 1
        return frozenset(matches) if len(matches) >= max(LEAST_MATCHES, others) else frozenset()


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
                words.append(_Word(name, place, group.get("part", ""), field))
    return tuple(words)
