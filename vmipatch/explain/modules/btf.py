"""BTF: the kernel's description of its own types, for offsets and sizes of structure members by name.

include/uapi/linux/btf.h of 6.12 and 7.3 (which widened ``vlen`` to 24 bits and
the kind to 7, and added a section that says how long each kind is); what the
bits mean: Documentation/bpf/btf.rst.  Nothing is believed: identifiers, lengths
and nesting are bounded.  Imports image and errors.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from vmipatch.errors import AddressError, ImageError
from vmipatch.image import Image

MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_MOST_TYPES = 1 << 20
"""BTF_MAX_TYPE; a kernel of 7.3 with everything built in has 170,000."""
_MOST_MEMBERS = 1 << 16
_DEEPEST = 32
"""Modifiers in a row, or structures in each other, that are followed."""

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(9, 20)
_ALIKE = frozenset((TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG))
"""Kinds that stand for the type that they name."""
_NAMED = frozenset((STRUCT, UNION, ENUM, ENUM64, TYPEDEF))

# Kind: words behind the three of struct btf_type, and words for each of vlen elements.
_WORDS = {
    INT: (1, 0), PTR: (0, 0), ARRAY: (3, 0), STRUCT: (0, 3), UNION: (0, 3), ENUM: (0, 2), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), FUNC_PROTO: (0, 2),
    VAR: (1, 0), DATASEC: (0, 3), FLOAT: (0, 0), DECL_TAG: (1, 0), TYPE_TAG: (0, 0), ENUM64: (0, 3),
}  # fmt: skip

_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")


class Field(NamedTuple):
    """Where a member lies in its structure: ``offset`` and ``size`` in bytes.

    Of a bitfield ``bit`` and ``bits`` are its place and width in bits from the start of the structure, and ``size`` the
    bytes that hold it; else ``bits`` is 0.  ``elements`` is the number of elements of an array (0 for one without
    a length), 1 for all else; ``type`` the number of its type.
    """

    offset: int
    size: int
    bit: int
    bits: int
    elements: int
    type: int


class Btf:
    """The types of one kernel; raises :class:`ImageError` where its bytes contradict themselves.

    ``file`` and ``offset`` are the place of the bytes, for errors.
    """

    def __init__(self, data: bytes, *, file: str | None = None, offset: int = 0, bits: int = 64) -> None:
        self._file = file
        self._offset = offset
        self._pointer = bits // 8
        if len(data) < _HEADER.size:
            raise self._error(f"BTF of {len(data)} bytes is cut short", 0)
        magic, version, _, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(data)
        if magic != MAGIC or version != 1:
            raise self._error(f"not BTF: magic {magic:#x}, version {version}", 0)
        end = len(data)
        if header < _HEADER.size or header + type_at + type_size > end or header + string_at + string_size > end:
            raise self._error(f"the sections of the BTF run past its {end} bytes", 4)
        self._at = header + type_at
        self._words = memoryview(data)[self._at : self._at + (type_size & ~3)].cast("I")
        self._strings = data[header + string_at : header + string_at + string_size]
        self._lengths = dict(_WORDS)
        if header >= 32:
            self._layout(data, header)
        self._starts = array("I", (0,))
        self._by_name: dict[int, list[int]] = {}
        self._found: dict[tuple[str, frozenset[int]], int | None] = {}
        self._fields: dict[tuple[str, str], Field | None] = {}
        self._index()

    def _error(self, message: str, at: int) -> ImageError:
        return ImageError(message, file=self._file, section=".BTF", offset=self._offset + at)

    def _layout(self, data: bytes, header: int) -> None:
        """How long kinds are that came after the ones known here (from 7.1 on)."""
        at, size = struct.unpack_from("<II", data, 24)
        if header + at + size > len(data):
            raise self._error(f"the sections of the BTF run past its {len(data)} bytes", 24)
        for kind in range(min(size // 4, 128)):
            info, element = data[header + at + 4 * kind], data[header + at + 4 * kind + 1]
            if kind and kind not in self._lengths and not info % 4 and not element % 4:
                self._lengths[kind] = info // 4, element // 4

    def _index(self) -> None:
        """Where each type begins, and which types have a name at which place of the strings."""
        words, starts, names, lengths = self._words, self._starts, self._by_name, self._lengths
        at, end = 0, len(words)
        while at + 3 <= end:
            info = words[at + 1]
            kind = info >> 24 & 0x7F
            length = lengths.get(kind)
            if length is None:
                raise self._error(f"a type of kind {kind}, which nobody knows", self._at + 4 * at)
            if kind in _NAMED and words[at]:
                names.setdefault(words[at], []).append(len(starts))
            starts.append(at)
            at += 3 + length[0] + length[1] * (info & 0xFFFFFF)
            if at > end or len(starts) > _MOST_TYPES:
                raise self._error("a type runs past the end, or there are too many", self._at + 4 * starts[-1])

    def __len__(self) -> int:
        """How many types there are, void not counted."""
        return len(self._starts) - 1

    def string(self, at: int) -> str:
        """The name at an offset of the strings."""
        end = self._strings.find(b"\0", at)
        if end < 0:
            raise self._error(f"a name at {at:#x}, outside the strings", self._at)
        return self._strings[at:end].decode("ascii", "backslashreplace")

    def find(self, name: str, kinds: frozenset[int] = frozenset((STRUCT, UNION))) -> int | None:
        """The number of the first type of a name and one of some kinds."""
        if (name, kinds) not in self._found:
            self._found[name, kinds] = self._find(name, kinds)
        return self._found[name, kinds]

    def _find(self, name: str, kinds: frozenset[int]) -> int | None:
        wanted = name.encode() + b"\0"
        best: int | None = None
        at = self._strings.find(wanted)
        while at >= 0:
            for number in self._by_name.get(at, ()):
                if self._kind(number) in kinds and (best is None or number < best):
                    best = number
            at = self._strings.find(wanted, at + 1)
        return best

    def size(self, name: str) -> int | None:
        """The bytes of a structure or union; None where there is none of that name."""
        number = self.find(name)
        return None if number is None else self._words[self._starts[number] + 2]

    def field(self, name: str, path: str) -> Field | None:
        """A member of a structure: ``list.next``, ``mem[2].base``; None where it has none.

        Members of anonymous structures and unions are found as C finds them.
        """
        if (name, path) not in self._fields:
            self._fields[name, path] = self._field(name, path)
        return self._fields[name, path]

    def _field(self, name: str, path: str) -> Field | None:
        number = self.find(name)
        if number is None:
            return None
        current: Field | None = Field(0, 0, 0, 0, 1, number)
        position = 0
        for step in _STEP.finditer(path):
            if path[position : step.start()] not in ("", ".") or current is None:
                return None
            position = step.end()
            member, element = step.groups()
            current = self._member(current, member, set()) if member else self._element(current, int(element))
        return current if position == len(path) else None

    def offset(self, name: str, path: str) -> int | None:
        """The offset in bytes of a member of a structure."""
        found = self.field(name, path)
        return None if found is None else found.offset

    def members(self, name: str) -> Iterator[tuple[str, Field]]:
        """The direct members of a structure in order; of anonymous ones the name is empty."""
        number = self.find(name)
        if number is not None:
            base = Field(0, 0, 0, 0, 1, number)
            for label, kind, bit, bits in self._rows(number):
                yield label, self._make(base, kind, bit, bits)

    def enumerator(self, enum: str, name: str) -> int | None:
        """The value of a constant of an enumeration, as an unsigned number of its width."""
        number = self.find(enum, frozenset((ENUM, ENUM64)))
        if number is None:
            return None
        at = self._starts[number]
        wide = self._kind(number) == ENUM64
        step = 3 if wide else 2
        for row in range(at + 3, at + 3 + step * min(self._words[at + 1] & 0xFFFFFF, _MOST_MEMBERS), step):
            if self.string(self._words[row]) == name:
                return self._words[row + 1] | (self._words[row + 2] << 32 if wide else 0)
        return None

    # Types by number

    def _kind(self, number: int) -> int:
        return self._words[self._start(number) + 1] >> 24 & 0x7F

    def _start(self, number: int) -> int:
        if not 0 < number < len(self._starts):
            raise self._error(f"names type {number} of {len(self)}", self._at)
        return self._starts[number]

    def _plain(self, number: int) -> int:
        """The type behind names and qualifiers; 0 is void."""
        for _ in range(_DEEPEST):
            if not number or self._kind(number) not in _ALIKE:
                return number
            number = self._words[self._start(number) + 2]
        raise self._error(f"type {number} stands for itself", self._at)

    def _rows(self, number: int) -> Iterator[tuple[str, int, int, int]]:
        """Members of a structure: name, type, place in bits, width in bits (0: no bitfield)."""
        at = self._start(number)
        info = self._words[at + 1]
        flagged = info >> 31
        for row in range(at + 3, at + 3 + 3 * min(info & 0xFFFFFF, _MOST_MEMBERS), 3):
            where = self._words[row + 2]
            bit, bits = (where & 0xFFFFFF, where >> 24) if flagged else (where, 0)
            yield self.string(self._words[row]), self._words[row + 1], bit, bits

    def _make(self, base: Field, number: int, bit: int, bits: int) -> Field:
        plain = self._plain(number)
        at = self._start(plain) if plain else 0
        kind = self._kind(plain) if plain else 0
        if not bits and kind == INT:
            # Without the flag the width of a bitfield stands in its type.
            encoded = self._words[at + 3]
            width = encoded & 0xFF
            if width and (width != 8 * self._words[at + 2] or encoded >> 16 & 0xFF or bit % 8):
                bit, bits = bit + (encoded >> 16 & 0xFF), width
        size = self._size(plain, 0)
        count = self._words[at + 5] if kind == ARRAY else 1
        whole = base.bit + bit
        if bits:
            size = (whole % 8 + bits + 7) // 8
        return Field(whole // 8, size, whole, bits, count, plain)

    def _size(self, number: int, depth: int) -> int:
        """The bytes of a type; 0 for void, functions and what is only declared."""
        plain = self._plain(number)
        if not plain or depth > _DEEPEST:
            return 0
        at = self._start(plain)
        kind = self._kind(plain)
        if kind == PTR:
            return self._pointer
        if kind == ARRAY:
            return self._size(self._words[at + 3], depth + 1) * self._words[at + 5]
        return self._words[at + 2] if kind in (INT, STRUCT, UNION, ENUM, ENUM64, FLOAT) else 0

    def _member(self, base: Field, name: str, seen: set[int]) -> Field | None:
        plain = self._plain(base.type)
        if not plain or self._kind(plain) not in (STRUCT, UNION) or plain in seen or len(seen) > _DEEPEST:
            return None
        # A structure that lacks the name lacks it wherever it stands.
        seen.add(plain)
        inner = []
        for label, kind, bit, bits in self._rows(plain):
            if label == name:
                return self._make(base, kind, bit, bits)
            if not label and not bits:
                inner.append((kind, bit))
        for kind, bit in inner:
            found = self._member(self._make(base, kind, bit, 0), name, seen)
            if found is not None:
                return found
        return None

    def _element(self, base: Field, index: int) -> Field | None:
        plain = self._plain(base.type)
        if not plain or self._kind(plain) != ARRAY:
            return None
        at = self._starts[plain]
        element, count = self._words[at + 3], self._words[at + 5]
        # Arrays without a length are counted by something else.
        if index and count and index >= count:
            return None
        return self._make(base, element, 8 * index * self._size(element, 0), 0)


class Types:
    """An image's own types, read when they are first asked for; ``error`` says that they are damaged."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.error: str | None = None

    @cached_property
    def known(self) -> Btf | None:
        """The types; None where the image has none, or damaged ones."""
        try:
            return read(self._image)
        except ImageError as error:
            self.error = str(error)
            return None

    def field(self, name: str, path: str) -> Field | None:
        """See :meth:`Btf.field`; None without types too."""
        if self.known is None:
            return None
        try:
            return self.known.field(name, path)
        except ImageError as error:
            self.error = str(error)
            return None

    def offset(self, name: str, path: str) -> int | None:
        """See :meth:`Btf.offset`; None without types too."""
        found = self.field(name, path)
        return None if found is None else found.offset


def read(image: Image) -> Btf | None:
    """An image's own types: its section ``.BTF``, or the bytes behind ``__start_BTF``, or what looks like them.

    None where it has none; raises :class:`ImageError` for damaged ones.
    """
    section = image.section(".BTF")
    if section is not None and section.file_size:
        data = bytes(image.data[section.offset : section.offset + section.file_size])
        return Btf(data, file=image.path, offset=section.offset, bits=image.bits)
    if image.sections and image.section(".text") is not None:
        return None
    address = image.symbols.lookup("__start_BTF")
    if address is not None:
        try:
            return _at(image, image.offset_of(address))
        except AddressError:
            pass
    for length in (24, 32):
        wanted = struct.pack("<HBBI", MAGIC, 1, 0, length)
        at = image.data.find(wanted)
        while at >= 0:
            header = _HEADER.unpack(image.data[at : at + _HEADER.size].ljust(_HEADER.size, b"\0"))
            # The strings follow the types.
            if header[4] == 0 and header[6] == header[5] and header[5] and not at % 4:
                return _at(image, at)
            at = image.data.find(wanted, at + 1)
    return None


def _at(image: Image, offset: int) -> Btf:
    header = bytes(image.data[offset : offset + 32])
    end = 0
    if len(header) >= _HEADER.size:
        _, _, _, length, types, type_size, strings, string_size = _HEADER.unpack_from(header)
        end = length + max(types + type_size, strings + string_size)
        if length >= 32 and len(header) == 32:
            end = max(end, length + sum(struct.unpack_from("<II", header, 24)))
    data = bytes(image.data[offset : offset + min(end, len(image.data) - offset)])
    return Btf(data, file=image.path, offset=offset, bits=image.bits)
