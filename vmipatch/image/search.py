"""Finding byte strings in an image that may be hundreds of megabytes.  Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import mmap

_CHUNK = 1 << 24


def find_all(data: bytes | mmap, pattern: bytes, start: int, stop: int, *, limit: int) -> Iterator[int]:
    """The offsets of ``pattern`` in ``data[start:stop]``, ascending, at most ``limit`` of them."""
    return (at for at, _ in find_each(data, (pattern,), start, stop, limit=limit))


def find_each(
    data: bytes | mmap, patterns: Sequence[bytes], start: int, stop: int, *, limit: int | None = None
) -> Iterator[tuple[int, int]]:
    """The offsets of each pattern in ``data[start:stop]`` with its number, those of one ascending.

    At most ``limit`` of each.  By pieces of 16 MiB, because ``bytes.find`` is ten times as fast as ``mmap.find``.
    """
    stop = min(stop, len(data))
    if not patterns:
        return
    longest = max(map(len, patterns))
    left = [limit if limit is not None else stop] * len(patterns)
    while start < stop and any(left):
        piece = data[start : min(start + _CHUNK + longest - 1, stop)]
        for number, pattern in enumerate(patterns):
            # What begins behind the piece is found in the next one.
            end = min(len(piece), _CHUNK + len(pattern) - 1)
            at = piece.find(pattern, 0, end) if left[number] > 0 else -1
            while at >= 0:
                yield start + at, number
                left[number] -= 1
                at = piece.find(pattern, at + 1, end) if left[number] > 0 else -1
        start += _CHUNK
