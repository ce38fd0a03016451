"""The ground of a comparison: a section of text as it was on disk, as it should be now, and as it is.

Imports image and isa.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from vmipatch.image import Image

_RUN = re.compile(rb"[^\0]+")
_ANY = bytes(1) + b"\xff" * 255
"""Translates what is not zero to 255."""
_OPPOSITE = bytes(reversed(range(256)))

PRISTINE = 0

_LONGEST = 256
"""Bytes of what is laid at once: a site of alternatives has at most 254."""
_LENGTH_BITS = 24
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_PIECE = 1 << 12
"""Bytes that are compared at once before they are looked at one by one."""


class Ground:
    """Bytes from virtual address ``base`` (as linked) on.

    ``pristine`` is the image's own with KASLR's relocations applied; ``expected``
    what should stand there, with a number for its cause at each byte that
    something wrote; ``found`` what the dump has.
    """

    def __init__(self, image: Image, base: int, disk: bytes, found: bytes) -> None:
        self.image = image
        self.base = base
        self.end = base + len(disk)
        self.disk = disk
        self.pristine = disk
        self.expected = bytearray(disk)
        self.found = found
        self._by = bytearray(len(disk))
        self._causes = ["pristine"]
        self._contents: list[bytes] = []
        # Where something was laid, with its length in the low bits; and fields that were moved in one text alone.
        self._laid = array("Q")
        self._moved: set[tuple[int, int]] = set()

    def cause(self, name: str) -> int:
        """The number of a cause."""
        if name not in self._causes:
            self._causes.append(name)
        return self._causes.index(name)

    def cause_at(self, address: int) -> str:
        """The name of what wrote the expected byte at an address."""
        return self._causes[self._by[address - self.base]]

    def lay(self, address: int, code: bytes, cause: int) -> None:
        """Expect ``code`` at an address; what lies outside is let go."""
        self.lay_all(((address, code),), cause)

    def lay_all(self, places: Iterable[tuple[int, bytes]], cause: int) -> None:
        """Expect code at each of many addresses, in this order; what lies outside is let go."""
        base, size, expected, by = self.base, len(self.expected), self.expected, self._by
        laid, mark = self._laid.append, bytes((cause,)) * _LONGEST
        for address, code in places:
            at, length = address - base, len(code)
            end = at + length
            if at >= 0 and end <= size:
                expected[at:end] = code
                by[at:end] = mark[:length] if length <= _LONGEST else mark[:1] * length
                laid(at << _LENGTH_BITS | length)

    def is_found(self, address: int, code: bytes) -> bool:
        """Whether the dump has these bytes at an address."""
        at = address - self.base
        return self.found[at : at + len(code)] == code

    def add(self, addresses: list[int], width: int, value: int) -> None:
        """Add ``value`` to the little-endian fields of ``width`` bytes at addresses, in what is expected."""
        _add(self.expected, [a - self.base for a in addresses], width, value)
        self._moved.symmetric_difference_update((a, width) for a in addresses)

    def relocate_pristine(self, addresses: list[int], width: int, value: int) -> None:
        """Add ``value`` to fields of the text as it was on disk."""
        changed = bytearray(self.pristine)
        _add(changed, [a - self.base for a in addresses], width, value)
        self.pristine = bytes(changed)
        self._moved.symmetric_difference_update((a, width) for a in addresses)

    def contents(self) -> list[bytes]:
        """The image's bytes: of all code, and of all initialised data that can be written."""
        if not self._contents:
            data = self.image.data
            self._contents = [
                bytes(data[s.offset : s.offset + s.file_size])
                for s in self.image.sections
                if s.file_size and s.alloc and (s.exec or s.write) and s.name != ".init.scratch"
            ]
        return self._contents

    def differences(self) -> Iterator[tuple[int, int]]:
        """Runs of bytes that are not what is expected: virtual address and length."""
        for start, stop in _runs(self.expected, self.found):
            yield self.base + start, stop - start

    def counts(self) -> Counter[str]:
        """Bytes that were rewritten as expected, by cause."""
        spans = self._touched()
        by, expected, pristine = (_parts(text, spans) for text in (self._by, self.expected, self.pristine))
        changed = _mask(expected, pristine)
        # What is expected to have changed but is not as expected explains nothing.
        if self.expected != self.found:
            changed = _both(changed, _mask(expected, _parts(self.found, spans)).translate(_OPPOSITE))
        numbers = _both(by, changed)
        counted = Counter({name: numbers.count(number) for number, name in enumerate(self._causes)})
        # What has no cause is 0, as is what has not changed.
        counted[self._causes[PRISTINE]] -= changed.count(0)
        return +counted

    def _touched(self) -> list[slice]:
        """The stretches in which what is expected may differ from what was on disk, none twice."""
        fields = (a - self.base for a, width in self._moved for a in range(a, a + width))
        moved = [at << _LENGTH_BITS | 1 for at in fields if 0 <= at < len(self.expected)]
        result = []
        end = 0
        for packed in sorted([*self._laid, *moved]):
            start = packed >> _LENGTH_BITS
            stop = start + (packed & _LENGTH_MASK)
            if start < end:
                start = end
            if stop > start:
                result.append(slice(start, stop))
                end = stop
        return result


def _parts(text: bytes | bytearray, spans: list[slice]) -> bytes:
    # Slices of bytes are made twice as fast as those of a bytearray.
    return b"".join(map(bytes(text).__getitem__, spans))


def _different(one: bytes | bytearray, two: bytes | bytearray) -> bytes:
    """A byte for each of two strings of one length, 0 where they are the same."""
    mixed = int.from_bytes(one, "little") ^ int.from_bytes(two, "little")
    return mixed.to_bytes(len(one), "little")


def _mask(one: bytes | bytearray, two: bytes | bytearray) -> bytes:
    """The same with 255 where they differ."""
    return _different(one, two).translate(_ANY)


def _both(one: bytes, two: bytes) -> bytes:
    """The bits that two strings of one length have both."""
    return (int.from_bytes(one, "little") & int.from_bytes(two, "little")).to_bytes(len(one), "little")


def _runs(one: bytes | bytearray, two: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where two byte strings of one length differ."""
    if one == two:
        return
    start = stop = 0
    for at in range(0, len(one), _PIECE):
        first, second = one[at : at + _PIECE], two[at : at + _PIECE]
        if first != second:
            for low, high in runs_of(_different(first, second)):
                if at + low != stop:
                    if stop > start:
                        yield start, stop
                    start = at + low
                stop = at + high
    if stop > start:
        yield start, stop


def runs_of(mask: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every run of bytes that are not zero."""
    return (match.span() for match in _RUN.finditer(mask))


def _add(data: bytearray, places: list[int], width: int, value: int) -> None:
    mask = (1 << 8 * width) - 1
    for at in places:
        if 0 <= at <= len(data) - width:
            field = int.from_bytes(data[at : at + width], "little")
            data[at : at + width] = (field + value & mask).to_bytes(width, "little")
