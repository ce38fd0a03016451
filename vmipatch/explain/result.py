"""What an explanation says.  Imports nothing but the words of annotate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vmipatch.annotate import Site
    from vmipatch.explain.engine import Kernel
    from vmipatch.explain.ground import Ground


class Unexplained(NamedTuple):
    """A run of bytes without a cause.

    ``address`` is virtual, as linked; ``expected`` what should stand there;
    ``start`` and the two texts are the instructions around it, disassembled from
    ``start`` on; ``site`` names the family and op of a site that it lies in;
    ``hint`` says what it looks like, without evidence.
    """

    address: int
    found: bytes
    expected: bytes
    symbol: str | None
    offset: int | None
    site: str | None
    hint: str | None
    instructions_found: tuple[str, ...]
    instructions_expected: tuple[str, ...]


class Proved(NamedTuple):
    """Bytes that something switched on at run time wrote, and the evidence for it in the dump.

    ``cause`` is ``ftrace``, ``kprobe``, ``optimised kprobe`` …; ``evidence`` one line for a person.
    """

    address: int
    length: int
    cause: str
    symbol: str | None
    offset: int | None
    evidence: str


@dataclass
class Explanation:
    """The causes of all bytes of ``[start, start + total)``; addresses are virtual, as linked.

    ``slide`` is what the running kernel adds to them.  ``by_cause`` counts rewritten
    bytes; ``runs`` is how many unexplained runs there are, of which ``unexplained`` has the first.
    ``ground`` and ``sites`` are what it was found from: explain.places tells of every place that changed; by
    ``kernel`` its modules are explained (explain.modules).
    """

    start: int
    total: int
    slide: int
    unexplained_bytes: int
    by_cause: dict[str, int]
    states: dict[str, dict[str, int]]
    evidence: list[str]
    unexplained: list[Unexplained]
    runs: int
    proved: list[Proved]
    warnings: list[str] = field(default_factory=list)
    ground: Ground | None = field(default=None, repr=False, compare=False)
    sites: Sequence[Site] = field(default=(), repr=False, compare=False)
    kernel: Kernel | None = field(default=None, repr=False, compare=False)

    @property
    def explained(self) -> int:
        """Bytes that were rewritten, and why is known."""
        return sum(self.by_cause.values())

    @property
    def pristine(self) -> int:
        """Bytes that are the image's own and should be."""
        return self.total - self.explained - self.unexplained_bytes
