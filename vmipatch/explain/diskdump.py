"""Compressed kdump files: what makedumpfile writes, and QEMU's ``dump-guest-memory`` with ``kdump-…`` formats.

``struct disk_dump_header``, ``kdump_sub_header`` and ``page_desc_t`` of makedumpfile's
diskdump_mod.h and its IMPLEMENTATION file.  Pages compressed by zlib or Zstandard are read,
LZO and Snappy are refused.  The pages that the dump has are taken to lie one behind the other,
so that all who read memory by offset can.  A flattened file, which is what can be written into a
pipe, is a list of pieces with their places.  Imports errors and explain.core.
"""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmipatch.errors import ImageError
from vmipatch.explain import core

MAGIC = b"KDUMP   "
FLATTENED = b"makedumpfile\0"
PAGE = 4096

Read = Callable[[int, int], bytes]
"""Bytes at an offset of a length, fewer at the end."""

_HEAD = 512
# block_size, sub_hdr_size, bitmap_blocks, max_mapnr: behind a time stamp of two words, and status.
_BLOCKS = {64: 428, 32: 416}
# In the sub-header: offset and size of the VMCOREINFO text and of the ELF notes, then max_mapnr in 64 bits.
_SUB = {64: (struct.Struct("<32xQQQQ"), 96), 32: (struct.Struct("<20xQIQI"), 72)}
_DESCRIPTOR = struct.Struct("<QII8x")
_ZLIB, _LZO, _SNAPPY, _ZSTD = 1, 2, 4, 0x20
_MOST_NOTES = 1 << 24
_LAST = 1 << 14
_KEPT = 1024
"""Pages that are kept unpacked."""

_FULL = re.compile(rb"\xff+|[^\0\xff]")


@dataclass(frozen=True, slots=True)
class Header:
    """Where things are in the file.

    ``descriptors`` is an offset; ``frames`` are runs of page frames that it has, first and length; ``missing`` is how
    many bytes its last ``pages`` lie past the end of the file.
    """

    descriptors: int
    frames: tuple[tuple[int, int], ...]
    pages: int
    cr3: tuple[int, ...]
    info: dict[str, str]
    missing: int


def parse(read: Read, size: int, path: str) -> Header:
    """Read the headers and bitmaps of a dump of ``size`` bytes; raises :class:`ImageError` for what is no such dump."""
    head = read(0, _HEAD)
    if len(head) < _HEAD:
        raise ImageError("cut short: it ends within its header", file=path, offset=len(head))
    if not head.startswith(MAGIC):
        raise ImageError("cut short: the header, which is written last, is missing", file=path, offset=0)
    fields = {bits: struct.unpack_from("<IIII", head, at) for bits, at in _BLOCKS.items()}
    bits = next((bits for bits, (block, sub_blocks, *_) in fields.items() if block == PAGE and 0 < sub_blocks < 256), 0)
    if not bits:
        raise ImageError("a kdump header without a block size of 4096", file=path, offset=0)
    _, sub_blocks, bitmap_blocks, most = fields[bits]
    form, wide = _SUB[bits]
    sub = read(PAGE, wide + 8)
    if len(sub) == wide + 8:
        most = max(most, int.from_bytes(sub[wide:], "little"))
    bitmaps = (1 + sub_blocks) * PAGE
    length = bitmap_blocks * PAGE
    if bitmaps + length > size:
        raise ImageError("cut short: its bitmaps lie past the end of the file", file=path, offset=bitmaps)
    # Two bitmaps, of the frames that there are and of those that were dumped; old dumps have one.
    one = -(-most // 8 // PAGE) * PAGE
    start, length = (bitmaps + length // 2, length // 2) if length >= 2 * one else (bitmaps, length)
    frames = tuple(_runs(read(start, length), most))
    pages = sum(count for _, count in frames)
    table = bitmaps + bitmap_blocks * PAGE
    if table + pages * _DESCRIPTOR.size > size:
        raise ImageError(f"cut short: it lacks the descriptors of its {pages} pages", file=path, offset=table)
    cr3: tuple[int, ...] = ()
    info: dict[str, str] = {}
    if len(sub) >= form.size:
        info_at, info_size, note_at, note_size = form.unpack_from(sub)
        cr3, info = core.read_notes(read(_within(note_at, size), min(note_size, _MOST_NOTES)))
        info |= core.vmcoreinfo(read(_within(info_at, size), min(info_size, _MOST_NOTES)))
    # Pages of zeros share one: the end of the file belongs to one of the last descriptors, not to the last.
    some = min(pages, _LAST)
    ends = _DESCRIPTOR.iter_unpack(read(table + (pages - some) * _DESCRIPTOR.size, some * _DESCRIPTOR.size))
    missing = max(0, *(at + length - size for at, length, _ in ends), 0)
    return Header(table, frames, pages, cr3, info, missing)


def _within(offset: int, size: int) -> int:
    """An offset that can be read at; the end of the file for one beyond it."""
    return min(offset, size)


def _runs(bitmap: bytes, most: int) -> Iterator[tuple[int, int]]:
    """First frame and length of each run of bits that are set, below ``most``."""
    first = count = 0
    for match in _FULL.finditer(bitmap):
        byte = match[0][0]
        whole = [(match.start() * 8, 8 * len(match[0]))]
        if byte != 0xFF:
            whole = [(match.start() * 8 + i, 1) for i in range(8) if byte >> i & 1]
        for frame, length in whole:
            if frame >= most:
                break
            length = min(length, most - frame)
            if count and frame == first + count:
                count += length
                continue
            if count:
                yield first, count
            first, count = frame, length
    if count:
        yield first, count


class Pages:
    """The pages of a dump as if they lay one behind the other, unpacked when they are read."""

    def __init__(self, read: Read, header: Header, path: str) -> None:
        self._read = read
        self._header = header
        self._path = path
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the pages from an offset on; fewer at their end, or where the file is cut short."""
        last = min(offset + length, self._header.pages * PAGE)
        if offset >= last:
            return b""
        first, stop = offset // PAGE, -(-last // PAGE)
        at = self._header.descriptors + first * _DESCRIPTOR.size
        table = self._read(at, (stop - first) * _DESCRIPTOR.size)
        pieces = []
        for number, row in enumerate(_DESCRIPTOR.iter_unpack(table[: len(table) // 24 * 24]), first):
            page = self._page(*row)
            if page is None:
                break
            pieces.append(page[offset - number * PAGE :] if number == first else page)
        return b"".join(pieces)[: last - offset]

    def _page(self, offset: int, size: int, flags: int) -> bytes | None:
        page = self._kept.get(offset)
        if page is not None:
            self._kept.move_to_end(offset)
            return page
        if size > PAGE or offset > 1 << 62:
            raise ImageError(f"a page of {size} bytes at offset {offset:#x}: the dump is damaged", file=self._path)
        data = self._read(offset, size)
        if len(data) < size:
            return None
        page = _unpacked(data, flags, self._path, offset)
        if len(page) != PAGE:
            raise ImageError(f"a page of {len(page)} bytes", file=self._path, offset=offset)
        self._kept[offset] = page
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return page


def _unpacked(data: bytes, flags: int, path: str, offset: int) -> bytes:
    if not flags & (_ZLIB | _LZO | _SNAPPY | _ZSTD):
        return data
    try:
        if flags & _ZLIB:
            return zlib.decompressobj().decompress(data, PAGE + 1)
        if flags & _ZSTD:
            import zstandard

            return zstandard.ZstdDecompressor().decompress(data, max_output_size=PAGE)
    except Exception as error:
        if isinstance(error, (zlib.error, ValueError)) or type(error).__name__ == "ZstdError":
            raise ImageError(f"a page that cannot be unpacked: {error}", file=path, offset=offset) from error
        raise
    how = "LZO" if flags & _LZO else "Snappy"
    raise ImageError(f"its pages are compressed by {how}: make it anew with zlib or without", file=path, offset=offset)


_PIECE = struct.Struct(">qq")
_MOST_PIECES = 1 << 24


class Flattened:
    """A flattened file put together: ``read`` gives what stands at an offset of the file that was meant.

    ``struct makedumpfile_data_header``: where a piece belongs and its size, both big-endian, then the piece; the
    list ends with two numbers of -1.  Raises :class:`ImageError` where there is no such list.
    """

    def __init__(self, read: Read, size: int, path: str) -> None:
        self._from = read
        places: dict[int, tuple[int, int]] = {}
        at = PAGE
        for _ in range(_MOST_PIECES):
            head = read(at, _PIECE.size)
            if len(head) < _PIECE.size:
                # Its end mark is missing; what is missing of its content is seen when that is read.
                break
            place, length = _PIECE.unpack(head)
            if place < 0 or length < 0:
                break
            # A piece may be written anew: the header is, when the dump is done.
            places[place] = (min(length, max(0, size - at - _PIECE.size)), at + _PIECE.size)
            at += _PIECE.size + length
        if not places:
            raise ImageError("a flattened dump without content", file=path, offset=PAGE)
        self._places = sorted((place, length, start) for place, (length, start) in places.items())
        self._starts = [place for place, _, _ in self._places]
        self.size = max(place + length for place, length, _ in self._places)
        """Bytes of the file that was meant."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at an offset, zeros between the pieces; fewer where the file is cut short."""
        pieces = []
        while length > 0 and offset < self.size:
            i = bisect_right(self._starts, offset) - 1
            place, size, start = self._places[i] if i >= 0 else (0, 0, 0)
            inside = offset - place
            if inside < size:
                piece = self._from(start + inside, min(length, size - inside))
            else:
                following = self._starts[i + 1] if i + 1 < len(self._starts) else self.size
                piece = bytes(min(length, following - offset))
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)
