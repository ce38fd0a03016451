"""The kernel's own symbol table, as scripts/kallsyms.c lays it into .rodata, found by its content.

Every part is found from the next one: the token table by the digits that every
kernel's symbol names use, confirmed by the token index that repeats its
offsets; the markers and the compressed names in front of it; the addresses in
front of those (up to 6.3) or behind the token index (from 6.4).  Nothing is
believed that the rest does not confirm.  Imports image.search and image.text.

What differs between kernels (scripts/kallsyms.c and kernel/kallsyms.c):

- 2.6.10: names compressed with a token table; addresses absolute, one long each.
- 4.6: or 32-bit offsets and a base (KALLSYMS_BASE_RELATIVE); on 64-bit SMP an
  offset >= 0 is an absolute (per-cpu) value, one < 0 means base - 1 - offset.
- 4.20: markers are 32 bits, not a long.
- 6.1: lengths of 128 and more take two bytes (ULEB128).
- 6.2: the symbol numbers in order of name, three bytes each, behind the markers.
- 6.4: those and the addresses stand behind the token index.
- 7.0: a 32-bit offset counts from its own place, and there is no base (a 32-bit kernel that cannot be
  relocated has addresses); every part is aligned to 4 bytes, whatever the size of a long.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import accumulate, islice
from mmap import mmap
from operator import add, le

from vmipatch.image.search import find_all
from vmipatch.image.text import printable

# Each character that names use is the token of its own code, so these ten follow each other everywhere.
_DIGITS = b"".join(b"%d\0" % d for d in range(10))
# Bounds on what a damaged image can make us do; real kernels have 40,000 to 250,000 symbols,
# with names of at most 512 characters (KSYM_NAME_LEN).
_MAX_TOKEN_TABLE = 256 * 512
_MAX_SYMBOLS = 1 << 19
_MIN_BLOCK, _MAX_BLOCK = 256 * 2, 256 * (512 + 3)
# How many of each are looked at: places that may be token tables, token tables, markers for each of
# them, places for the number of symbols for each of those, and walks over all names.
_MAX_HITS, _MAX_TABLES, _MAX_MARKERS, _MAX_PLACES, _MAX_WALKS = 1000, 2, 8, 500, 3
_MAX_EXPANDED = 1 << 26
# Names that are searched for in the text of all; who asks for more gets an index, which takes as long as these do.
_SEARCHED = 16
_SAMPLED = 256
# The first two markers, 0 and then a number from _MIN_BLOCK to about _MAX_BLOCK; looked for in steps.
_FIRST_MARKERS = re.compile(rb"(?=\0\0\0\0.(?:[\2-\xff]\0|.[\1\2])\0|\0{8}.(?:[\2-\xff]\0|.[\1\2])\0)", re.DOTALL)
_STEP = 1 << 18
# The lowest address that the kernel's own text can have: PAGE_OFFSET of VMSPLIT_1G; __START_KERNEL_map.
_LOWEST = {32: 0x40000000, 64: 0xFFFFFFFF80000000}

Place = Callable[[int], int | None]
"""From an offset in the image's bytes to the virtual address of that byte, where it has one."""


class Kallsyms:
    """The decoded table; ``addresses`` are virtual and ascending, ``extent`` where it lies: offsets into the image."""

    def __init__(
        self,
        addresses: list[int],
        names: bytes,
        starts: list[int],
        tokens: list[str],
        orders: Iterable[bytes] = (),
        extent: range = range(0),
    ) -> None:
        """``orders`` are what may be the symbols' numbers in order of name, three bytes each."""
        self.addresses = addresses
        self.extent = extent
        self._names = names
        self._starts = starts
        self._tokens = tokens
        self._asked = 0
        self._order = next((order for order in orders if self._is_order(order)), None)

    def __len__(self) -> int:
        return len(self.addresses)

    def floor(self, address: int) -> int:
        """The number of the symbol that an address is in, or -1; of aliases the first, as in the kernel."""
        i = bisect_right(self.addresses, address) - 1
        return i if i < 0 else bisect_left(self.addresses, self.addresses[i])

    def entry(self, index: int) -> str:
        """The kind letter and the name of a symbol, as one string (``Tprintk``)."""
        start, stop = self._starts[index], self._starts[index + 1]
        start += 2 if self._names[start] & 0x80 else 1
        return "".join(map(self._tokens.__getitem__, self._names[start:stop]))

    @cached_property
    def _text(self) -> str:
        """All kind letters and names in order of address, a line feed before each and behind the last."""
        # Expanded in one go, the length bytes too; those are then made into the separators.
        pieces = list(map(self._tokens.__getitem__, self._names))
        names = self._names
        for at in self._starts[:-1]:
            pieces[at] = "\n"
            if names[at] & 0x80:
                pieces[at + 1] = ""
        return "".join(pieces[: self._starts[-1]]) + "\n"

    @cached_property
    def entries(self) -> list[str]:
        """All kind letters and names, in order of address."""
        return self._text.split("\n")[1:-1]

    def lookup(self, name: str) -> int | None:
        """The address of a name; of symbols with one name the lowest global one, else the lowest."""
        return self._searched(name) if self._order is None else self._by_order(self._order, name)

    def _by_order(self, order: bytes, name: str) -> int | None:
        """As the kernel itself looks a name up (kallsyms_lookup_names of kernel/kallsyms.c)."""
        found = []
        for place in range(bisect_left(range(len(self)), name, key=self._name_in_order), len(self)):
            number = self._number(order, place)
            entry = self.entry(number)
            if entry[1:] != name:
                break
            found.append((not entry[:1].isupper(), self.addresses[number]))
        return min(found)[1] if found else None

    def _searched(self, name: str) -> int | None:
        """In the text of all names, or from an index of them where many are asked for."""
        self._asked += 1
        if self._asked > _SEARCHED:
            return self._by_name.get(name)
        lowest = None
        at = self._text.find(f"{name}\n")
        while at > 0:
            if self._text[at - 2] == "\n":
                letter = self._text[at - 1]
                if lowest is None or letter.isupper():
                    lowest = self.addresses[self._text.count("\n", 0, at) - 1]
                if letter.isupper():
                    break
            at = self._text.find(f"{name}\n", at + 1)
        return lowest

    def _name_in_order(self, place: int) -> str:
        assert self._order is not None
        return self.entry(self._number(self._order, place))[1:]

    def _number(self, order: bytes, place: int) -> int:
        """The number of the symbol that stands at a place in the order of names."""
        return min(int.from_bytes(order[3 * place : 3 * place + 3], "big"), len(self) - 1)

    def _is_order(self, order: bytes) -> bool:
        """Whether the bytes are such an order, by some of the names."""
        count = len(self)
        if len(order) != 3 * count:
            return False
        sample = range(0, count, max(1, count // _SAMPLED))
        numbers = [int.from_bytes(order[3 * i : 3 * i + 3], "big") for i in sample]
        if max(numbers) >= count or len(set(numbers)) < len(numbers):
            return False
        names = [self.entry(number)[1:] for number in numbers]
        return names == sorted(names)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        pairs = list(zip(reversed(self.entries), reversed(self.addresses), strict=True))
        found = {entry[1:]: address for entry, address in pairs}
        found.update((entry[1:], address) for entry, address in pairs if entry[:1].isupper())
        return found


def find(data: bytes | mmap, bits: int, windows: list[tuple[int, int]], place: Place) -> Kallsyms | None:
    """The table in ``data``, or None; ``windows`` are the ranges of offsets to search, best first.

    ``place`` is asked where the table is: the newest layout tells addresses only by their distance from it.
    """
    tried: set[int] = set()
    for start, stop in windows:
        for hit in find_all(data, _DIGITS, start, stop, limit=_MAX_HITS):
            if hit in tried or len(tried) == _MAX_TABLES:
                continue
            found = _token_table(data, hit)
            if found is not None:
                tried.add(hit)
                table = _around(data, bits, place, *found)
                if table is not None:
                    return table
    return None


def _token_table(data: bytes | mmap, digits: int) -> tuple[list[str], int, int] | None:
    """The 256 tokens, the offset of their table and that of the end of the index, if ``digits`` is in one."""
    tail = data[digits : digits + _MAX_TOKEN_TABLE]
    end = 0
    for _ in range(256 - ord("0")):
        end = tail.find(b"\0", end) + 1
        if end == 0:
            return None
    for index in range(digits + end, digits + end + 8):
        if index + 512 > len(data):
            return None
        offsets = struct.unpack("<256H", data[index : index + 512])
        table = digits - offsets[ord("0")]
        if offsets[0] or offsets[ord("9") + 1] - offsets[ord("0")] != len(_DIGITS) or table < 0:
            continue
        tokens = data[table : digits + end].split(b"\0")[:-1]
        if tuple(accumulate((len(t) + 1 for t in tokens[:-1]), initial=0)) == offsets:
            return [printable(t) for t in tokens], table, index + 512
    return None


def _around(
    data: bytes | mmap, bits: int, place: Place, tokens: list[str], table: int, index_end: int
) -> Kallsyms | None:
    long = bits // 8
    longest = max(map(len, tokens))
    for markers_at, markers in islice(_markers(data, table, long), _MAX_MARKERS):
        for count_at, names_at, starts in _names(data, markers_at, markers, long):
            found = _addresses(data, bits, place, len(starts) - 1, count_at, index_end)
            if found is None:
                continue
            addresses, lies = found
            names = data[names_at:markers_at]
            if longest * len(names) > _MAX_EXPANDED and sum(len(tokens[n]) for n in names) > _MAX_EXPANDED:
                continue
            places = _order_places(markers_at, len(markers), len(addresses), index_end, long)
            orders = (data[at : at + 3 * len(addresses)] for at in places)
            extent = range(min(lies.start, count_at), max(lies.stop, index_end))
            return Kallsyms(addresses, names, starts, tokens, orders, extent)
    return None


def _order_places(markers_at: int, markers: int, count: int, index_end: int, long: int) -> Iterator[int]:
    """Where the symbols' numbers in order of name may begin: behind the markers, or behind the addresses."""
    for size in sorted({4, long}):
        yield -(-(markers_at + size * markers) // long) * long
    for alignment in sorted({4, long}):
        first = -(-index_end // alignment) * alignment
        for size in sorted({4, long}):
            behind = -(-(first + size * count) // alignment) * alignment
            yield behind
            yield behind + long


def _markers(data: bytes | mmap, table: int, long: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Candidates for the markers (offset, values): the offsets into the names of every 256th symbol.

    They start with 0 and rise; behind them comes the token table or, in 6.2 and
    6.3 and where that was ported back to, three bytes for each symbol before it.
    """
    stop = table - table % 4
    for end in range(stop, max(stop - 4 * _MAX_SYMBOLS, 0), -_STEP):
        start = max(end - _STEP, 0)
        piece = data[start : end + 8]
        for hit in reversed([m.start() for m in _FIRST_MARKERS.finditer(piece)]):
            for size in sorted({4, long}):
                if hit % 4 == 0:
                    values = _rising(data, start + hit, stop, size)
                    rest = table - (start + hit + size * len(values))
                    # Between them and the table lie 3 bytes a symbol, or none, and up to 7 of alignment.
                    if len(values) > 1 and (rest < 8 or (rest - 7) // 768 < len(values) <= rest // 768 + 1):
                        yield start + hit, values


def _rising(data: bytes | mmap, start: int, stop: int, size: int) -> tuple[int, ...]:
    """The words from ``start`` that can be markers: each a block of 256 names further than the one before."""
    count = 1
    # Most candidates end soon: no need to read far.
    for limit in (8, _MAX_SYMBOLS >> 8):
        words = _words(data, start, min(stop - (stop - start) % size, start + limit * size), size)
        while count < len(words) and _MIN_BLOCK <= words[count] - words[count - 1] <= _MAX_BLOCK:
            count += 1
        if count < limit:
            break
    return tuple(words[:count])


def _names(
    data: bytes | mmap, markers_at: int, markers: tuple[int, ...], long: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Where the number of symbols is, where the names are, and the start of each and the last one's end."""
    # The names end at the markers; how long their last block is must be tried.
    low = max(0, markers_at - markers[-1] - _MAX_BLOCK - 2 * long)
    low += (markers_at - low) % 4
    words = _words(data, low, markers_at, 4)
    smallest, largest = (len(markers) - 1) * 256 + 1, len(markers) * 256
    places = [i for i in range((markers_at - markers[-1] - low) // 4) if smallest <= words[i] <= largest]
    tries = 0
    for i in places[: -_MAX_PLACES - 1 : -1]:
        for gap in sorted({4, long}):
            names_at = low + i * 4 + gap
            # The first block alone rules out nearly everything.
            if _starts(data[names_at : names_at + markers[1]], 256, markers[:1]) is None:
                continue
            starts = _starts(data[names_at:markers_at], words[i], markers)
            if starts is not None:
                yield low + i * 4, names_at, starts
            tries += 1
            if tries == _MAX_WALKS:
                return


def _starts(names: bytes, count: int, markers: tuple[int, ...]) -> list[int] | None:
    """The offsets of all names and of the end behind the last, if they agree with the markers."""
    starts: list[int] = []
    add = starts.append
    at = 0
    try:
        for marker in markers:
            if at != marker:
                return None
            for _ in range(min(256, count)):
                add(at)
                length = names[at]
                if not 0 < length < 0x80:
                    at += 1
                    second = names[at]
                    if length == 0 or second == 0:
                        return None
                    length = (length & 0x7F) | second << 7
                at += length + 1
            count -= 256
    except IndexError:
        return None
    # Only what the markers' alignment leaves over may follow.
    if not 0 <= len(names) - at < 8 or any(names[at:]):
        return None
    add(at)
    return starts


def _addresses(
    data: bytes | mmap, bits: int, place: Place, count: int, count_at: int, index_end: int
) -> tuple[list[int], range] | None:
    """The addresses, from in front of the number of symbols or from behind the token index; where they lie."""
    long = bits // 8
    offsets_size = -(-4 * count // long) * long
    behind = -(-index_end // long) * long
    layouts = (
        (count_at - long - offsets_size, count_at - long),
        (behind, behind + offsets_size),
    )
    for offsets_at, base_at in layouts:
        if offsets_at < 0 or base_at + long > len(data):
            continue
        found = _relative(data, bits, count, offsets_at, base_at)
        if found is not None:
            return found, range(offsets_at, base_at + long)
    for start in (count_at - long * count, behind):
        if start >= 0 and start + long * count <= len(data):
            values = _words(data, start, start + long * count, long).tolist()
            if values == sorted(values) and _LOWEST[bits] <= values[count // 2] and values[0] < values[-1]:
                return values, range(start, start + long * count)
    at = -(-index_end // 4) * 4
    found = _self_relative(data, bits, place, count, at)
    return None if found is None else (found, range(at, at + 4 * count))


def _self_relative(data: bytes | mmap, bits: int, place: Place, count: int, offsets_at: int) -> list[int] | None:
    """The addresses where each offset counts from its own place."""
    first = place(offsets_at)
    if first is None or offsets_at + 4 * count > len(data):
        return None
    offsets = memoryview(_words(data, offsets_at, offsets_at + 4 * count, 4)).cast("B").cast("i")
    values = list(map(add, range(first, first + 4 * count, 4), offsets))
    if not all(map(le, values, values[1:])) or not _LOWEST[bits] <= values[0] < values[-1] < 1 << bits:
        return None
    return values


def _relative(data: bytes | mmap, bits: int, count: int, offsets_at: int, base_at: int) -> list[int] | None:
    base = int.from_bytes(data[base_at : base_at + bits // 8], "little")
    offsets = _words(data, offsets_at, offsets_at + 4 * count, 4).tolist()
    if base < _LOWEST[bits]:
        return None
    # The base is the lowest relative symbol, so one offset is 0 (or, beside absolute ones, -1).
    if offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] > 0 and base + offsets[-1] < 1 << bits:
        return [base + o for o in offsets]
    absolute = next((i for i, o in enumerate(offsets) if o & 0x80000000), count)
    if absolute < count and offsets[absolute] == 0xFFFFFFFF:
        values = offsets[:absolute] + [base + 0xFFFFFFFF - o for o in offsets[absolute:]]
        if values == sorted(values) and values[-1] < 1 << bits:
            return values
    return None


def _words(data: bytes | mmap, start: int, stop: int, size: int) -> array[int]:
    """Little-endian words of 4 or 8 bytes."""
    words = array("I" if size == 4 else "Q", data[start:stop])
    if sys.byteorder != "little":
        words.byteswap()
    return words
