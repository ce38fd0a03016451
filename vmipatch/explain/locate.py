"""Finding the image's kernel in a memory dump, or saying in one line why it is not there.

The evidence is the banner (``linux_banner``), the build id in ``.notes``, and the
share of text bytes that agree.  Imports image, errors and its sisters in ``explain/``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from vmipatch.errors import AddressError, ImageError
from vmipatch.explain.memory import Memory, Region
from vmipatch.explain.running import PAGE, Running
from vmipatch.image import Image
from vmipatch.image.model import Section

LEAST_AGREEMENT = 0.8
"""Share of the text that no running kernel of the same build falls below: patching touches a few bytes in a hundred."""

SAMPLES = 64
"""Pages of text that are looked at before the whole is read."""

_MOST_BANNERS = 64
_BANNER = re.compile(rb"Linux version \d+\.\d+[ -~]{0,300}")
_POINTERS = 400


def locate(image: Image, memory: Memory) -> Running:
    """The running kernel; raises :class:`ImageError` with how it was noticed that the dump does not have it."""
    text = image.section(".text")
    if text is None:
        raise ImageError("the image has no .text section to compare with", file=image.path)
    best: tuple[float, Running] | None = None
    tried = set[tuple[int, int | None]]()
    for slide, shift, how in _candidates(image, memory, text):
        if (slide, shift) in tried:
            continue
        tried.add((slide, shift))
        running = Running(image, memory, slide, shift, how)
        share = _agreement(running, text)
        if share is not None and (best is None or share > best[0]):
            best = share, running
        if best is not None and best[0] > LEAST_AGREEMENT:
            break
    if best is None or best[0] < LEAST_AGREEMENT:
        raise _refusal(image, memory, text, best)
    running = best[1]
    _check_build(image, running)
    own = _slide_in_text(running, text)
    if running.shift is not None:
        if own is None:
            own = _slide_of(running, text)
        running = Running(image, memory, own, running.shift, running.how)
    elif own is not None and own != running.slide:
        raise ImageError(
            f"the text stands at {text.address + running.slide:#x}, but its own addresses say "
            f"{text.address + own & (1 << image.bits) - 1:#x}: is the base right?",
            file=memory.path,
        )
    return running


def _candidates(image: Image, memory: Memory, text: Section) -> Iterator[tuple[int, int | None, str]]:
    """Slide, physical shift and how it was thought of, best first."""
    mask = (1 << image.bits) - 1
    physical = _physical(image, text.address)
    if "KERNELOFFSET" in memory.info:
        slide = _number(memory.info["KERNELOFFSET"], 16)
        # phys_base: what the text's physical addresses are above the place that it was linked for.
        base = _number(memory.info.get("NUMBER(phys_base)", ""), 10)
        if physical is not None and memory.physical:
            yield slide, slide + base if base else slide, "VMCOREINFO"
        if memory.virtual:
            yield slide, None, "VMCOREINFO"
    if memory.virtual and memory.has(memory.virtual, text.address, text.size):
        yield 0, None, "at its linked address"
    if memory.physical and physical is not None and memory.has(memory.physical, physical, text.size):
        yield 0, 0, "at its linked physical address"
    offset = _banner_offset(image)
    if offset is not None and image.banner is not None:
        linked = image.address_of(offset)
        place = _physical(image, linked)
        for hit in memory.find(image.banner.encode(), _MOST_BANNERS):
            virtual = memory.addresses_of(memory.virtual, hit)
            if virtual is not None and not (virtual - linked) % PAGE and not (memory.raw and virtual < 1 << 31):
                yield (virtual - linked) & mask, None, "by its banner"
            at = memory.addresses_of(memory.physical, hit)
            if at is not None and place is not None and not (at - place) % PAGE:
                yield at - place, at - place, "by its banner"
    for region in memory.virtual:
        # Text alone, from a base that KASLR chose.
        if memory.raw and region.size <= 2 * text.size and not (region.start - text.address) % PAGE:
            yield (region.start - text.address) & mask, None, "by the base given"


def _physical(image: Image, address: int) -> int | None:
    try:
        return image.physical_of(address)
    except AddressError:
        return None


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0


def _banner_offset(image: Image) -> int | None:
    if image.banner is None:
        return None
    wanted = image.banner.encode()
    rodata = image.section(".rodata")
    start, stop = (rodata.offset, rodata.offset + rodata.file_size) if rodata else (0, len(image.data))
    at = bytes(image.data[start:stop]).find(wanted)
    return start + at if at >= 0 else None


def _agreement(running: Running, text: Section) -> float | None:
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
        same += sum(a == b for a, b in zip(disk, found, strict=True) if a)
        total += sum(map(bool, disk))
    return same / total if total else None


def _slide_in_text(running: Running, text: Section) -> int | None:
    """How far the kernel was moved, by what KASLR has added to the fields of its text; None where nothing tells."""
    table = running.image.relocations
    if table is None:
        return None
    fields = [f for f in table.absolute32 if text.address <= f < text.end - 4]
    grown: Counter[int] = Counter()
    for field in fields[:: max(1, len(fields) // _POINTERS)]:
        now = running.read(field, 4)
        if now is not None:
            grown[int.from_bytes(now, "little") - int.from_bytes(running.image.read(field, 4), "little")] += 1
    if not grown:
        return None
    slide, count = grown.most_common(1)[0]
    return slide & 0xFFFFFFFF if count * 2 > grown.total() else None


def _slide_of(running: Running, text: Section) -> int:
    """How far the virtual addresses were moved: what the kernel's own pointers to its text have grown by."""
    image = running.image
    size = image.bits // 8
    grown: Counter[int] = Counter()
    for name in (".rodata", ".data"):
        section = image.section(name)
        if section is None:
            continue
        data = memoryview(bytes(image.data[section.offset : section.offset + section.file_size // 8 * 8]))
        words = data.cast("I" if size == 4 else "Q")
        places = (i for i, word in enumerate(words) if text.address <= word < text.end)
        for i in islice(places, _POINTERS):
            now = running.word(section.address + i * size)
            if now is not None:
                difference = now - words[i]
                if not difference % PAGE:
                    grown[difference] += 1
        if grown:
            break
    if not grown:
        return running.slide
    slide, count = grown.most_common(1)[0]
    return slide & ((1 << image.bits) - 1) if count * 2 > grown.total() else running.slide


def _check_build(image: Image, running: Running) -> None:
    """The same version may be another build: its notes say so."""
    notes = image.section(".notes")
    if notes is None or not notes.file_size:
        return
    here = image.read(notes.address, notes.file_size)
    there = running.read(notes.address, notes.file_size)
    if there is None or here == there:
        return
    ours, theirs = _build_id(here), _build_id(there)
    if ours and theirs and ours != theirs:
        raise ImageError(
            f"memory of another build: its build id is {theirs.hex()}, the image's {ours.hex()}",
            file=running.memory.path,
        )


def _build_id(notes: bytes) -> bytes:
    """The description of the NT_GNU_BUILD_ID note."""
    at = notes.find(b"\x14\0\0\0\x03\0\0\0GNU\0")
    return notes[at + 12 : at + 32] if at >= 0 else b""


def _refusal(image: Image, memory: Memory, text: Section, best: tuple[float, Running] | None) -> ImageError:
    """The one line that says what the dump is instead."""
    other = _other_banner(image, memory)
    if best is not None:
        running = best[1]
        found = running.read(text.address, text.size)
        if found is not None and not any(found):
            return ImageError("the kernel's text is all zeros in it", file=memory.path, address=text.address)
    if other is not None:
        text_of = f"memory of another kernel: its banner is {other[:90]!r}, the image's {(image.banner or '')[:90]!r}"
        return ImageError(text_of, file=memory.path)
    if memory.missing and best is None:
        return ImageError(f"cut short: its headers name {memory.missing} bytes more than it has", file=memory.path)
    for regions, start in ((memory.virtual, text.address), (memory.physical, _physical(image, text.address))):
        if start is None:
            continue
        had = sum(max(0, min(r.start + r.size, start + text.size) - max(r.start, start)) for r in regions)
        if 0 < had < text.size:
            missing = f"cut short: it has {had} of the {text.size} bytes of the kernel's text"
            return ImageError(missing, file=memory.path, address=text.address)
    if best is not None:
        share = f"only {best[0]:.0%} of the text's bytes are those of the image"
        return ImageError(f"not the memory of this kernel: {share}", file=memory.path, address=text.address)
    if all(_zero(memory, region) for region in (memory.physical or memory.virtual)):
        return ImageError("nothing but zeros", file=memory.path)
    return ImageError(
        f"the kernel's text is not in it ({text.address:#x}, {text.size} bytes; no banner either)", file=memory.path
    )


def _zero(memory: Memory, region: Region) -> bool:
    probes = range(region.offset, region.offset + region.size, max(PAGE, region.size // 256 // PAGE * PAGE))
    return not any(any(memory.at(offset, 64)) for offset in probes)


def _other_banner(image: Image, memory: Memory) -> str | None:
    ours = (image.banner or "").encode()
    for hit in memory.find(b"Linux version ", _MOST_BANNERS):
        match = _BANNER.match(memory.at(hit, 320))
        if match and not ours.startswith(match[0]) and not match[0].startswith(ours):
            return match[0].decode("ascii")
    return None
