"""Why a dump is not the memory of the image's kernel: one line, with how that was noticed.

Imports image, errors and its sisters in ``explain/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import compress, islice
from operator import eq

from vmipatch.errors import AddressError, ImageError
from vmipatch.explain.memory import PAGE, Memory, Region
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.image.model import Section

LEAST_AGREEMENT = 0.8
"""Share of the text that no running kernel of the same build falls below: patching touches a few bytes in a hundred."""

SAMPLES = 64
"""Pages of text that are looked at before the whole is read."""

MOST_BANNERS = 64
_BANNER = re.compile(rb"Linux version \d+\.\d+[ -~]{0,1000}")
_SHOWN = 90
_TRIED, _LEAST_TRIED = 16, 4
"""Pieces of the text that are searched for at every offset of a dump that has no text where it should be."""
_SEARCHED = 1 << 34
"""Bytes that are read for that, unless the dump is so large that the least number of pieces takes more."""
_PIECE = 24
_LEAST_VALUES = 8
"""Different bytes in such a piece: less is padding, of which there is more than one place."""


def agreement(running: Running, text: Section) -> float | None:
    """The share of sampled text bytes that are as on disk; None where the dump lacks any of the text."""
    image = running.image
    if running.read(text.end - 1, 1) is None or running.read(text.address, 1) is None:
        return None
    pages = max(1, text.size // PAGE)
    same = total = 0
    for page in range(0, pages, max(1, pages // SAMPLES)):
        length = min(PAGE, text.size - page * PAGE)
        found = running.read(text.address + page * PAGE, length)
        if found is None:
            return None
        disk = image.data[text.offset + page * PAGE : text.offset + page * PAGE + length]
        # Padding agrees with anything that is padding too: only bytes that are something count.
        something = len(disk) - disk.count(0)
        same += something if disk == found else sum(compress(map(eq, disk, found), disk))
        total += something
    return same / total if total else None


def physical(image: Image, address: int) -> int | None:
    """Where an address of the image was to be loaded; None where no segment says."""
    try:
        return image.physical_of(address)
    except AddressError:
        return None


def banners(image: Image) -> dict[str, int]:
    """The banners in the image's read-only data, with their offsets.

    There may be two: from 6.1 on the kernel is linked with one that lacks the build's number as well (init/version.c).
    """
    rodata = image.section(".rodata")
    start, stop = (rodata.offset, rodata.offset + rodata.file_size) if rodata else (0, len(image.data))
    found = {m[0].decode("ascii").rstrip(): start + m.start() for m in _BANNER.finditer(bytes(image.data[start:stop]))}
    return dict(list(found.items())[:MOST_BANNERS])


def check_build(image: Image, running: Running) -> None:
    """The same version may be another build: its notes say so, and its banner.  Raises :class:`ImageError`."""
    notes = image.section(".notes")
    if notes is not None and notes.file_size:
        here = image.read(notes.address, notes.file_size)
        there = running.read(notes.address, notes.file_size)
        ours, theirs = _build_id(here), _build_id(there or b"")
        if ours and theirs and ours != theirs:
            raise ImageError(
                f"memory of another build: its build id is {theirs.hex()}, the image's {ours.hex()}",
                file=running.memory.path,
            )
    own = banners(image)
    for text, offset in own.items():
        match = _BANNER.match(running.read(image.address_of(offset), len(text)) or b"")
        theirs_too = match[0].decode("ascii").rstrip() if match else text
        if theirs_too not in own:
            raise ImageError(_other(theirs_too, own), file=running.memory.path)


def _build_id(notes: bytes) -> bytes:
    """The description of the NT_GNU_BUILD_ID note."""
    at = notes.find(b"\x14\0\0\0\x03\0\0\0GNU\0")
    return notes[at + 12 : at + 32] if 0 <= at <= len(notes) - 32 else b""


def refusal(image: Image, memory: Memory, text: Section, best: tuple[float, Running] | None) -> ImageError:
    """The one line that says what the dump is instead; ``best`` is the share of the best match, and where it is."""
    if best is not None:
        running = best[1]
        found = running.read(text.address, text.size)
        if found is not None and not any(found):
            return ImageError("the kernel's text is all zeros in it", file=memory.path, address=text.address)
    own = banners(image)
    ours, other = _banners_in(memory, own)
    if other is not None:
        return ImageError(_other(other, own), file=memory.path)
    if memory.missing and best is None:
        return ImageError(f"cut short: its headers name {memory.missing} bytes more than it has", file=memory.path)
    for known, start in ((memory.virtual, text.address), (memory.physical, physical(image, text.address))):
        if start is None:
            continue
        had = sum(max(0, min(r.start + r.size, start + text.size) - max(r.start, start)) for r in known)
        if 0 < had < text.size:
            missing = f"cut short: it has {had} of the {text.size} bytes of the kernel's text"
            return ImageError(missing, file=memory.path, address=text.address)
    moved = _misplaced(image, memory, text)
    if moved:
        where = f"the kernel's text stands in it {moved:#x} bytes past a page boundary"
        return ImageError(f"not page-aligned: {where}; does it begin where it is said to?", file=memory.path)
    if best is not None:
        share = f"only {best[0]:.0%} of the text's bytes are those of the image"
        return ImageError(f"not the memory of this kernel: {share}", file=memory.path, address=text.address)
    regions = memory.physical or memory.virtual
    if regions and all(_zero(memory, region) for region in regions):
        return ImageError("nothing but zeros", file=memory.path)
    said = "its banner is, its text is not" if ours else f"{text.address:#x}, {text.size} bytes; no banner either"
    return ImageError(f"the kernel's text is not in it ({said})", file=memory.path)


def _zero(memory: Memory, region: Region) -> bool:
    probes = range(region.offset, region.offset + region.size, max(PAGE, region.size // 256 // PAGE * PAGE))
    return not any(any(memory.at(offset, 64)) for offset in probes)


def _other(theirs: str, own: Iterable[str]) -> str:
    """What to say of another banner; of one of the same release what is different in it."""

    def alike(text: str) -> int:
        pairs = enumerate(zip(theirs, text, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(text)))

    ours = max(own, key=alike, default="")
    release = theirs.split(" ")[2:3]
    if release != ours.split(" ")[2:3]:
        return f"memory of another kernel: its banner is {theirs[:_SHOWN]!r}, the image's {ours[:_SHOWN]!r}"
    word = theirs.rfind(" ", 0, alike(ours)) + 1
    what = f"its banner says {theirs[word:][:_SHOWN]!r} where the image's says {ours[word:][:_SHOWN]!r}"
    return f"memory of another build of {''.join(release)}: {what}"


def _banners_in(memory: Memory, own: Iterable[str]) -> tuple[bool, str | None]:
    """Whether the dump has one of the image's banners, and the first other one."""
    ours = [text.encode() for text in own]
    seen = False
    other = None
    for hit in memory.find(b"Linux version ", MOST_BANNERS):
        match = _BANNER.match(memory.at(hit, 1100))
        if match is None:
            continue
        # A copy may be cut short, or go on.
        if any(match[0].startswith(text) or text.startswith(match[0]) for text in ours):
            seen = True
        elif other is None:
            other = match[0].decode("ascii").rstrip()
    return seen, other


def _misplaced(image: Image, memory: Memory, text: Section) -> int:
    """How far past a page boundary the kernel's text stands in the dump; 0 where it stands on one or is not found."""
    tries = max(_LEAST_TRIED, min(_TRIED, _SEARCHED // max(1, memory.size)))
    for piece in islice(_pieces(image, text), tries):
        for hit in memory.find(image.read(piece, _PIECE), 4):
            for regions, linked in ((memory.physical, physical(image, piece)), (memory.virtual, piece)):
                at = memory.addresses_of(regions, hit)
                if at is None or linked is None or not (at - linked) % PAGE:
                    continue
                shift = at - linked if regions is memory.physical else None
                running = Running(image, memory, at - linked, shift, "by its text")
                share = agreement(running, text)
                if share is not None and share >= LEAST_AGREEMENT:
                    return (at - linked) % PAGE
    return 0


def _pieces(image: Image, text: Section) -> Iterator[int]:
    """Addresses of a few pieces of the text that are no padding."""
    # An odd step: pieces begin anywhere in their functions, some where the kernel patches nothing.
    for address in range(text.address, text.end - _PIECE, max(PAGE // 64, text.size // (4 * _TRIED)) | 1):
        if len(set(image.read(address, _PIECE))) >= _LEAST_VALUES:
            yield address
