"""Names of addresses, out of everything that an image and its System.map know.

The symbol table, System.map, the image's own kallsyms and its exports are each
read when first needed.  A distribution's i386 kernel has no symbol table, has
only functions in kallsyms, and has its data (``pv_ops``, ``boot_cpu_data``)
only in the exports: so the answer comes from whichever knows best.
Imports image.kallsyms and image.model.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Protocol

from vmipatch.image.kallsyms import Kallsyms
from vmipatch.image.model import SectionMap


class Source(Protocol):
    """One origin of symbols; ``addresses`` are ascending."""

    @property
    def addresses(self) -> list[int]: ...
    def floor(self, address: int) -> int: ...
    def entry(self, index: int) -> str: ...
    def lookup(self, name: str) -> int | None: ...


class Table:
    """A source made of rows: virtual address, rank among aliases (0 is best), kind letter, name.

    ``letter`` gives the kind letter of an address where the rows have none.
    """

    def __init__(self, rows: Iterable[tuple[int, int, str, str]], letter: Callable[[int], str] | None = None) -> None:
        self._rows = sorted(rows)
        self._letter = letter
        self.addresses = [row[0] for row in self._rows]

    def floor(self, address: int) -> int:
        """The number of the symbol that an address is in, or -1; of aliases that of the best rank."""
        i = bisect_right(self.addresses, address) - 1
        return i if i < 0 else bisect_left(self.addresses, self.addresses[i])

    def entry(self, index: int) -> str:
        """Kind letter and name of a symbol, as one string."""
        address, _, letter, name = self._rows[index]
        return (self._letter(address) if self._letter else letter) + name

    def lookup(self, name: str) -> int | None:
        """The address of a name; of symbols with one name the lowest of rank 0, else the lowest."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        found = {row[3]: row[0] for row in reversed(self._rows)}
        if any(row[1] for row in self._rows):
            found.update((row[3], row[0]) for row in reversed(self._rows) if not row[1])
        return found


Loader = Callable[[], Source | None]
# Who is asked first for the address of a name: exports before kallsyms, which must expand all its names.
_BY_NAME = ("symtab", "System.map", "exports", "kallsyms")
# Whose name an address gets where several have a symbol there.
_BY_ADDRESS = ("symtab", "System.map", "kallsyms", "exports")


class Symbols:
    """What is where: by name, by address, or all of it."""

    def __init__(self, loaders: dict[str, Loader], sections: SectionMap) -> None:
        self._loaders = loaders
        self._loaded: dict[str, Source | None] = {}
        self._sections = sections
        self._low = self._high = 0
        # The last answer: the symbol from its address up to the next one's.
        self._start = self._stop = 0
        self._name = ""
        self._names: dict[tuple[int, int], str] = {}
        self._addresses: dict[str, int | None] = {}

    def _source(self, name: str) -> Source | None:
        if name not in self._loaded:
            loader = self._loaders.get(name)
            self._loaded[name] = loader() if loader else None
        return self._loaded[name]

    @cached_property
    def _found(self) -> list[Source]:
        return [s for s in map(self._source, _BY_ADDRESS) if s is not None and s.addresses]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Which of ``symtab``, ``System.map``, ``kallsyms`` and ``exports`` there are and have symbols."""
        found = ((name, self._source(name)) for name in _BY_ADDRESS)
        return tuple(name for name, source in found if source is not None and source.addresses)

    def lookup(self, name: str) -> int | None:
        """The virtual address of a symbol, or None; of several of one name a global one, else the lowest."""
        if name not in self._addresses:
            sources = (source for origin in _BY_NAME if (source := self._source(origin)) is not None)
            found = (address for source in sources if (address := source.lookup(name)) is not None)
            self._addresses[name] = next(found, None)
        return self._addresses[name]

    def at(self, address: int) -> tuple[str, int] | None:
        """The symbol that a virtual address is in or after, and the distance from it in bytes.

        The nearest symbol of any source that is not in another section; None where there is none.
        Exports name only some of the data, so a large distance means little there.
        """
        # Addresses are mostly asked in ascending order: the answer is kept up to the next symbol.
        if self._start <= address < self._stop and self._low <= address < self._high:
            return self._name, address - self._start
        best, start, index = -1, -1, 0
        stop = 1 << 64
        for i, source in enumerate(self._found):
            places = source.addresses
            after = bisect_right(places, address)
            if after < len(places):
                stop = min(stop, places[after])
            if after:
                begin = places[after - 1]
                if begin > start:
                    best, start, index = i, begin, bisect_left(places, begin, 0, after)
        if best < 0:
            return None
        if not self._low <= address < self._high:
            section = self._sections.at(address)
            if section is not None:
                self._low, self._high = section.address, section.end
            else:
                self._low = self._high = 0
        if start < self._low:
            return None
        name = self._names.get((best, index))
        if name is None:
            name = self._names[best, index] = self._found[best].entry(index)[1:]
        self._start, self._stop, self._name = start, stop, name
        return name, address - start

    def addresses(self) -> list[int]:
        """The virtual addresses of all symbols, ascending, none twice."""
        # Each source is in order already, and sorting what is costs next to nothing.
        return list(dict.fromkeys(sorted(chain.from_iterable(source.addresses for source in self._found))))

    def all(self) -> Iterator[tuple[int, str, str]]:
        """Every symbol: virtual address, kind letter of nm(1), name; by address, none twice."""
        rows = [zip(source.addresses, _entries(source), strict=True) for source in self._found]
        last, seen = -1, set[str]()
        # Merged and not collected: a damaged table can have names without end.
        for address, entry in heapq.merge(*rows, key=itemgetter(0)):
            if address != last:
                last, seen = address, set()
            if entry[1:] not in seen:
                seen.add(entry[1:])
                yield address, entry[:1] or "?", entry[1:]


def _entries(source: Source) -> Iterable[str]:
    return source.entries if isinstance(source, Kallsyms) else map(source.entry, range(len(source.addresses)))
