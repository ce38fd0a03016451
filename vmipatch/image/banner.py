"""The kernel's version banner and the version in it.  Imports image.search only.

The banner is ``linux_banner`` of init/version.c.  A module has its kernel's
release in the ``vermagic`` of .modinfo instead.
"""

from __future__ import annotations

import re
from mmap import mmap

from vmipatch.image.search import find_all

_START = b"Linux version "
_BANNER = re.compile(rb"Linux version \d+\.\d+[ -~]{0,1000}")
_RELEASE = re.compile(r"(\d+(?:\.\d+)+)")
# Debian's release name keeps the first upstream version of the series (6.1.0-50-686); the package
# version in the banner has the real one: "(Debian 2.6.32-48)", "Debian 6.1.176-1 (2026-07-02)".
_DEBIAN = re.compile(r"Debian (\d+(?:\.\d+)+)[-~+]")
_VERMAGIC = re.compile(rb"(?:^|\0)vermagic=(\d+\.\d+[!-~]{0,200})")


def find(data: bytes | mmap, windows: list[tuple[int, int]]) -> str | None:
    """The banner, one line without its line end; ``windows`` are ranges of offsets to search, best first."""
    for start, stop in windows:
        for hit in find_all(data, _START, start, stop, limit=100):
            match = _BANNER.match(data[hit : hit + 1100])
            if match:
                return match[0].decode("ascii").rstrip()
    return None


def vermagic(modinfo: bytes) -> str | None:
    """The release of the kernel that a module is for (``6.1.0-50-686``)."""
    match = _VERMAGIC.search(modinfo)
    return match[1].decode("ascii") if match else None


def version(text: str) -> tuple[int, ...] | None:
    """The upstream version in a banner or a release, of at least three numbers."""
    release = _RELEASE.search(text)
    if release is None:
        return None
    found = _numbers(release[1])
    # The compiler's version stands in the same words: ours is the one of the same series.
    for match in _DEBIAN.finditer(text):
        if _numbers(match[1])[:2] == found[:2]:
            return _numbers(match[1])
    return found


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(n[:9]) for n in text.split(".")[:6])
    return numbers + (0,) * (3 - len(numbers))
