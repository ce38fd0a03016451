"""Finding the image's kernel in a memory dump, or saying in one line why it is not there.

The evidence is the banner (``linux_banner``), the build id in ``.notes``, and the
share of text bytes that agree.  Imports image, errors and its sisters in ``explain/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from vmipatch.errors import ImageError
from vmipatch.explain.memory import PAGE, Memory
from vmipatch.explain.refusal import (
    LEAST_AGREEMENT,
    MOST_BANNERS,
    agreement,
    banners,
    check_build,
    physical,
    refusal,
)
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.image.model import Section

_POINTERS = 400


def locate(image: Image, memory: Memory) -> Running:
    """The running kernel; raises :class:`ImageError` with how it was noticed that the dump does not have it."""
    text = image.section(".text")
    if text is None:
        raise ImageError("the image has no .text section to compare with", file=image.path)
    best: tuple[float, Running] | None = None
    alias: Running | None = None
    tried = set[tuple[int, int | None]]()
    for slide, shift, how in _candidates(image, memory, text):
        if (slide, shift) in tried:
            continue
        tried.add((slide, shift))
        running = Running(image, memory, slide, shift, how)
        share = agreement(running, text)
        if share is None:
            continue
        if share >= LEAST_AGREEMENT and shift is None and _slide_in_text(running, text) not in (None, slide):
            # The same memory at another address, as in the direct mapping; or a base that is wrong.
            alias = alias or running
            continue
        if best is None or share > best[0]:
            best = share, running
        if share > LEAST_AGREEMENT:
            break
    if best is None or best[0] < LEAST_AGREEMENT:
        raise _misplaced(alias, text) if alias is not None else refusal(image, memory, text, best)
    running = best[1]
    check_build(image, running)
    if running.shift is not None:
        own = _slide_in_text(running, text)
        if own is None:
            own = _slide_of(running, text)
        running = Running(image, memory, own, running.shift, running.how)
    return running


def _misplaced(alias: Running, text: Section) -> ImageError:
    mask = (1 << alias.image.bits) - 1
    own = _slide_in_text(alias, text) or 0
    return ImageError(
        f"the text stands at {text.address + alias.slide & mask:#x}, but its own addresses say "
        f"{text.address + own & mask:#x}: is the base right?",
        file=alias.memory.path,
    )


def _candidates(image: Image, memory: Memory, text: Section) -> Iterator[tuple[int, int | None, str]]:
    """Slide, physical shift and how it was thought of, best first."""
    mask = (1 << image.bits) - 1
    place = physical(image, text.address)
    if "KERNELOFFSET" in memory.info:
        slide = _number(memory.info["KERNELOFFSET"], 16)
        # phys_base: what the text's physical addresses are above the place that it was linked for.
        base = _number(memory.info.get("NUMBER(phys_base)", ""), 10)
        if place is not None and memory.physical:
            yield slide, slide + base, "VMCOREINFO"
        if memory.virtual:
            yield slide, None, "VMCOREINFO"
    if memory.virtual and memory.has(memory.virtual, text.address, text.size):
        yield 0, None, "at its linked address"
    if memory.physical and place is not None and memory.has(memory.physical, place, text.size):
        yield 0, 0, "at its linked physical address"
    for banner, offset in banners(image).items():
        linked = image.address_of(offset)
        loaded = physical(image, linked)
        for hit in memory.find(banner.encode(), MOST_BANNERS):
            for virtual in memory.all_addresses(memory.virtual, hit):
                if not (virtual - linked) % PAGE and not (memory.raw and virtual < 1 << 31):
                    yield (virtual - linked) & mask, None, "by its banner"
            at = memory.addresses_of(memory.physical, hit)
            if at is not None and loaded is not None and not (at - loaded) % PAGE:
                yield at - loaded, at - loaded, "by its banner"
    for region in memory.virtual:
        # Text alone, from a base that KASLR chose.
        if memory.raw and region.size <= 2 * text.size and not (region.start - text.address) % PAGE:
            yield (region.start - text.address) & mask, None, "by the base given"


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        return 0


def _slide_in_text(running: Running, text: Section) -> int | None:
    """How far the kernel was moved, by what KASLR has added to the fields of its text; None where nothing tells."""
    table = running.image.relocations
    if table is None:
        return None
    start, end = text.address, text.end - 4
    fields = [f for f in table.absolute32 if start <= f < end]
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
