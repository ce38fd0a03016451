"""Finding byte strings in an image that may be hundreds of megabytes.  Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

_CHUNK = 1 << 24


def find_all(data: bytes | mmap, pattern: bytes, start: int, stop: int, *, limit: int) -> Iterator[int]:
    """The offsets of ``pattern`` in ``data[start:stop]``, ascending, at most ``limit`` of them.

    By pieces of 16 MiB, because ``bytes.find`` is ten times as fast as ``mmap.find``.
    """
    stop = min(stop, len(data))
    while start < stop:
        piece = data[start : min(start + _CHUNK + len(pattern) - 1, stop)]
        at = piece.find(pattern)
        while at >= 0:
            yield start + at
            limit -= 1
            if limit <= 0:
                return
            at = piece.find(pattern, at + 1)
        start += _CHUNK
