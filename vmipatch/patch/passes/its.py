"""Indirect Target Selection (arch/x86/kernel/alternative.c, 6.15, stable kernels of 2025): thunks made while booting.

An indirect branch that would lie in the lower half of a cache line becomes a
direct one to a jump through its register, in the upper half of a line of a page that the kernel
fills in the order of its sites.  So a thunk's page and offset follow from
the sites alone; only where the pages are has to be found.  Imports image and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmipatch.errors import AddressError
from vmipatch.image import Image

PAGE = 4096
HALF = 0x20
"""The bit of an address that is clear in the lower half of a cache line, where the processor's fault strikes."""

STATIC = "__x86_indirect_its_thunk_array"
STRIDE = 64
"""Bytes from one register's thunk of the image to the next (ITS_THUNK_SIZE)."""

_FIRST = 32
_INT3 = b"\xcc"
_JNE = b"\x75\xfd"


def wanted_at(address: int, register: int) -> bool:
    """Whether an indirect branch at a virtual address needs a thunk: its last byte decides."""
    return not (address + 1 + register // 8) & HALF


def code_of(register: int, check: bytes = b"") -> bytes:
    """A thunk: a jump through the register and INT3; ``check`` completes the caller of paranoid FineIBT before it."""
    return check + (b"\x41" if register >= 8 else b"") + bytes((0xFF, 0xE0 + (register & 7))) + _INT3


def check_of(image: Image) -> bytes:
    """What paranoid FineIBT puts before a thunk, as the image's own thunks have it; empty where they have none.

    An undefined instruction (``EA``, since 6.18 ``D6``) and a JNE to it.
    """
    array = image.symbols.lookup(STATIC)
    if array is None:
        return b""
    try:
        found = image.read(array - 3, 3)
    except AddressError:
        return b""
    return found if found[1:] == _JNE else b""


@dataclass
class Thunks:
    """The thunks of one boot (``its_allocate_thunk``).

    ``check`` is empty, or under paranoid FineIBT what :func:`check_of` gives.  ``find`` tells where a page is: it gets
    the virtual address of a branch to one of its thunks, and where in the page that thunk begins and is entered,
    and answers with a virtual address as linked, or None where that site does not tell: the image's own thunk
    then serves, as in a kernel without memory.
    """

    static: int | None
    check: bytes = b""
    find: Callable[[int, int, int], int | None] = lambda site, begins, entered: None
    pages: list[bytearray] = field(default_factory=list)
    bases: list[int | None] = field(default_factory=list)
    _offset: int = PAGE

    @classmethod
    def of(cls, image: Image) -> Thunks:
        """Those of an image on its own: no page is known."""
        return cls(image.symbols.lookup(STATIC))

    def target(self, site: int, register: int) -> int | None:
        """Where the branch at virtual address ``site`` goes; None where neither page nor static thunk is known."""
        page, begins = self._allocate(register)
        # The branch enters behind the undefined instruction.
        entered = begins + (1 if self.check else 0)
        if page == len(self.bases):
            self.bases.append(None)
        if self.bases[page] is None:
            self.bases[page] = self.find(site, begins, entered)
        base = self.bases[page]
        if base is not None:
            return base + entered
        if self.static is None:
            return None
        return self.static + STRIDE * register - (2 if self.check else 0)

    def _allocate(self, register: int) -> tuple[int, int]:
        """The page, in the order of their making, and the offset at which a new thunk's code begins."""
        code = code_of(register, self.check)
        size = len(code)
        if self._offset + size - 1 >= PAGE:
            self.pages.append(bytearray(_INT3 * PAGE))
            self._offset = _FIRST
        if (self._offset + size - 1) % 64 < 32:
            self._offset = ((self._offset - 1) | 0x3F) + 33
        at = self._offset
        self.pages[-1][at : at + size] = code
        self._offset = at + size
        return len(self.pages) - 1, at


def led(old: bytes, address: int, target: int) -> bytes:
    """A direct branch (its prefix and condition stay) at a virtual address, led to a target."""
    distance = target - (address + len(old))
    return old[:-4] + (distance & 0xFFFFFFFF).to_bytes(4, "little")
