"""Names of the bits of x86_capability, from ``specs/isa/features.toml``; most of Linux's own move between releases."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from vmipatch import facts

Version = tuple[int, ...]


class _Range(NamedTuple):
    """A name, the first release whose header has it, and the last series (empty: the newest header still has it)."""

    name: str
    first: Version
    last: Version

    def covers(self, version: Version) -> bool:
        """Whether a kernel of that release numbers the bit so."""
        return self.first <= version and version[: len(self.last)] <= self.last if self.last else self.first <= version


@cache
def _names() -> dict[int, str]:
    spec = facts.load("isa", "features")
    return {int(word) * 32 + int(bit): name for word, row in spec["words"].items() for bit, name in row.items()}


@cache
def _ranges() -> dict[int, tuple[_Range, ...]]:
    spec = facts.load("isa", "features")
    return {
        _number(place): tuple(_Range(row[0], _version(row[1]), _version(row[2]) if row[2:] else ()) for row in rows)
        for place, rows in spec["ranges"].items()
    }


def _number(place: str) -> int:
    """``7*32+4`` to a bit number."""
    word, bit = place.split("*32+")
    return int(word) * 32 + int(bit)


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


@cache
def numbers(version: Version | None = None) -> dict[str, int]:
    """Feature names to bit numbers, for kernels of a release.

    Without one: names that have had the same number wherever they are known, and those that somebody asks for by name
    although their bit later got another meaning.
    """
    moved: dict[str, int] = facts.load("isa", "features")["numbers"]
    found = moved | {name: number for number, name in _names().items()}
    places: dict[str, set[int]] = {}
    for number, rows in _ranges().items():
        for row in rows:
            if version is None or row.covers(version):
                places.setdefault(row.name, set()).add(number)
    return found | {name: numbers.pop() for name, numbers in places.items() if len(numbers) == 1}


@cache
def feature_name(number: int, version: Version | None = None) -> str:
    """The name of a feature bit in kernels of a release; ``word*32+bit`` where no header that was read tells it.

    Without a release only bits that never changed their meaning have a name.
    """
    if version is not None:
        for row in _ranges().get(number, ()):
            if row.covers(version):
                return row.name
    return _names().get(number) or f"{number >> 5}*32+{number & 31}"
