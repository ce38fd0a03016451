"""What a boot chose by chance or by its command line, as the dump shows it: seeds, checks of calls, pages of thunks.

Imports annotate, patch and its sisters in ``explain/``.
"""

from __future__ import annotations

from vmipatch.annotate import Scan, scan
from vmipatch.explain import fit
from vmipatch.explain.ground import Ground
from vmipatch.explain.running import Running
from vmipatch.image import Image
from vmipatch.patch.passes import Boot, Checks, fineibt, its
from vmipatch.patch.planner import Seen

_CS, _ESCAPE = 0x2E, 0x0F
_BRANCHES = (0xE8, 0xE9)


def seen(running: Running, found: Scan, ground: Ground, boot: Boot) -> tuple[Seen, list[str]]:
    """What was chosen, and what of it is worth a line; ``boot`` is what is known already."""
    image = ground.image
    said: list[str] = []
    checks = _checks(ground, boot)
    if checks is not None:
        said.append(f"checks of indirect calls: {checks}, as the text says")
    thunks = its.Thunks.of(image)
    thunks.find = Pages(running, ground).find
    return Seen(return_thunk(image, running, found, ground), checks, thunks), said


def return_thunk(image: Image, running: Running, found: Scan, ground: Ground) -> int | None:
    """What returns were made of: ``x86_return_thunk`` where the dump has it, else what most of them jump to."""
    address = image.symbols.lookup("x86_return_thunk")
    thunk = running.pointer(address) if address is not None else None
    return thunk or fit.return_thunk(ground, found)


def _checks(ground: Ground, boot: Boot) -> Checks | None:
    how = fineibt.kernel(boot)
    if how is None:
        return None

    def read(address: int, length: int) -> bytes | None:
        at = address - ground.base
        return bytes(ground.found[at : at + length]) if 0 <= at <= len(ground.found) - length else None

    return fineibt.recover(ground.image, scan(ground.image, [fineibt.FAMILY]).sites, how, read)


class Pages:
    """Finds the pages of thunks that were made while booting, by the branches that lead there."""

    def __init__(self, running: Running, ground: Ground) -> None:
        self._running = running
        self._ground = ground

    def find(self, site: int, begins: int, entered: int) -> int | None:
        """Where a page is (:attr:`its.Thunks.find`): where the branch at ``site`` goes, less the thunk's place in it.

        None for a site outside the text that is explained, for one that is no direct branch, and where that
        would be no page outside the image.
        """
        at = site - self._ground.base
        code = bytes(self._ground.found[at : at + 6]) if at >= 0 else b""
        if len(code) < 6:
            return None
        length = 6 if code[0] in (_CS, _ESCAPE) else 5
        if length == 5 and code[0] not in _BRANCHES:
            return None
        target = site + length + int.from_bytes(code[length - 4 : length], "little", signed=True)
        base = target - entered & (1 << self._ground.image.bits) - 1
        if base % its.PAGE or self._ground.image.section_at(target) is not None:
            return None
        return base if self._running.read_running(base + self._running.slide, its.PAGE) is not None else None


def altered_pages(running: Running, thunks: its.Thunks | None) -> list[int]:
    """Pages of thunks, by their virtual addresses in the running kernel, that are not as the kernel filled them."""
    found = []
    for base, page in zip(thunks.bases, thunks.pages, strict=True) if thunks is not None else ():
        if base is not None and running.read_running(base + running.slide, its.PAGE) != bytes(page):
            found.append(base + running.slide)
    return found
