"""The ground of a comparison: a section of text as it was on disk, as it should be now, and as it is.

Imports image and isa.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from vmipatch.image import Image

_RUN = re.compile(rb"[^\0]+")

PRISTINE = 0


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
        at = address - self.base
        if at < 0 or at + len(code) > len(self.expected):
            return
        self.expected[at : at + len(code)] = code
        self._by[at : at + len(code)] = bytes((cause,)) * len(code)

    def is_found(self, address: int, code: bytes) -> bool:
        """Whether the dump has these bytes at an address."""
        at = address - self.base
        return self.found[at : at + len(code)] == code

    def add(self, addresses: list[int], width: int, value: int) -> None:
        """Add ``value`` to the little-endian fields of ``width`` bytes at addresses, in what is expected."""
        _add(self.expected, [a - self.base for a in addresses], width, value)

    def relocate_pristine(self, addresses: list[int], width: int, value: int) -> None:
        """Add ``value`` to fields of the text as it was on disk."""
        changed = bytearray(self.pristine)
        _add(changed, [a - self.base for a in addresses], width, value)
        self.pristine = bytes(changed)

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
        numbers: Counter[int] = Counter()
        for start, stop in _runs(self.expected, self.pristine):
            numbers.update(self._by[start:stop])
        # What is expected to have changed but is not as expected explains nothing.
        for start, stop in _runs(self.expected, self.found):
            for i in range(start, stop):
                if self.expected[i] != self.pristine[i]:
                    numbers[self._by[i]] -= 1
        return Counter({self._causes[number]: count for number, count in numbers.items() if count})


def _runs(one: bytes | bytearray, two: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where two byte strings of one length differ."""
    if one != two:
        mixed = int.from_bytes(one, "little") ^ int.from_bytes(two, "little")
        yield from runs_of(mixed.to_bytes(len(one), "little"))


def runs_of(mask: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every run of bytes that are not zero."""
    return (match.span() for match in _RUN.finditer(mask))


def _add(data: bytearray, places: list[int], width: int, value: int) -> None:
    mask = (1 << 8 * width) - 1
    for at in places:
        if 0 <= at <= len(data) - width:
            field = int.from_bytes(data[at : at + width], "little")
            data[at : at + width] = (field + value & mask).to_bytes(width, "little")
