"""What stands at sites that a running kernel rewrites after its boot: the words that its families share.

Imports annotate, patch.passes and its sisters in ``explain/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vmipatch import facts
from vmipatch.annotate import Site
from vmipatch.annotate.site import Sites
from vmipatch.explain.ground import Ground
from vmipatch.explain.result import Proved
from vmipatch.isa.nops import NopTable
from vmipatch.patch.passes import Boot


class Data(Protocol):
    """The data of a running kernel, by the virtual addresses that its sites use."""

    def read(self, address: int, length: int) -> bytes | None:
        """Bytes at an address; None where the dump lacks any of them."""

    def pointer(self, address: int) -> int | None:
        """A pointer at an address, in the addresses that sites use; None where the dump lacks it."""


@dataclass(frozen=True, slots=True)
class Live:
    """What sites are decided by: the boot that went before, and the dump's data where it has them."""

    boot: Boot
    data: Data | None


class Move(NamedTuple):
    """A field of ``width`` bytes at ``offset`` of a state.

    It grows with the addresses of the memory that ``plus`` names, and shrinks with those that ``minus`` names.
    """

    offset: int
    width: int
    plus: tuple[str, ...]
    minus: tuple[str, ...]


class State(NamedTuple):
    """One byte string that a site may hold, and when.

    Bytes at the offsets ``free`` may have any value there; ``moves`` are the fields that change with the
    kernel's place in memory.
    """

    code: bytes
    cause: str
    free: tuple[int, ...] = ()
    moves: tuple[Move, ...] = ()


@dataclass(slots=True)
class Tally:
    """How many sites of a family are in which state, and on what evidence."""

    states: Counter[str] = field(default_factory=Counter)
    evidence: Counter[str] = field(default_factory=Counter)


class LateFamily:
    """A family whose sites change at run time."""

    family = ""

    def expect(self, ground: Ground, sites: Sites, live: Live) -> Tally:
        """Lay over the ground what each site must hold now.

        A state that depends on a variable is decided by that variable where the dump has it; where it has not,
        sites of one variable must agree with each other.
        """
        raise NotImplementedError

    def proved(self, ground: Ground, sites: Sequence[Site], live: Live) -> list[Proved]:
        """What was switched on at run time, with its evidence."""
        return []

    def states(self, site: Site, boot: Boot) -> tuple[list[State], tuple[str, ...]]:
        """What the site may hold besides what it holds on disk, and the names of its patterns (legal.DOMAINS)."""
        raise NotImplementedError


def five_byte_nop(nops: NopTable) -> bytes:
    """The nop of one instruction that a kernel with this nop table puts over a call."""
    return bytes.fromhex(facts.load("tables", "mcount")["nops"].get(nops.name, nops.sequences[4].hex()))


def five_byte_nops(boot: Boot) -> list[bytes]:
    """Every such nop that the kernel may choose, on whatever CPU."""
    return list(dict.fromkeys(five_byte_nop(table) for table in boot.rules.nop_tables(boot.image.bits)))
