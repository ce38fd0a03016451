"""What a pass is: one walk of the kernel's own patcher over the sites of one family.

Planner, legal set and explainer run the same objects; in which order is the era's data (``specs/kernels/``).
Imports annotate, image, isa, patch.patch, patch.text, patch.rules and patch.target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmipatch.annotate import Site
from vmipatch.annotate.site import Places
from vmipatch.image import Image
from vmipatch.isa.nops import NopTable
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import its
from vmipatch.patch.patch import Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

NO_FEATURES = Cpu("any", None, None, None, None, ())
"""Stands for a CPU of which nothing is known."""


class Checks(NamedTuple):
    """How a boot has its indirect calls checked (kCFI and FineIBT).

    ``mode`` is ``off``, ``kcfi`` or ``fineibt``; ``seed`` None where hashes are as on disk.  ``paranoid`` callers
    check too; ``bhi`` preambles clear arguments, with ``permissive`` (cfi=warn) those of functions of one
    argument by a call as well.
    """

    mode: str
    seed: int | None
    paranoid: bool = False
    bhi: bool = False
    permissive: bool = False

    def __str__(self) -> str:
        words = [w for w, on in (("paranoid", self.paranoid), (self.mode, True), ("with BHI", self.bhi)) if on]
        words += ["permissive"] if self.permissive else []
        return " ".join(words) + (f", seed {self.seed:#010x}" if self.seed is not None else ", hashes as on disk")


@dataclass(frozen=True)
class Boot:
    """One boot of one kernel: what its passes go by.

    ``native`` is the CPU and how many of them, None where nothing is known of them.  ``return_thunk`` is the
    virtual address, as linked, that ``x86_return_thunk`` holds when returns are patched, where a dump or its text
    tells; None leaves it to the CPU's features.  ``checks`` is None where nothing tells how indirect calls are
    checked; ``its`` are the thunks against Indirect Target Selection that this boot makes, filled by its passes.
    """

    image: Image
    rules: Rules
    nops: NopTable
    native: Native | None = None
    return_thunk: int | None = None
    checks: Checks | None = None
    its: its.Thunks | None = None
    core: Image | None = None
    """The kernel's own image, where ``image`` is a module's."""

    @property
    def cpu(self) -> Cpu:
        """The CPU; one without features where none is known."""
        return NO_FEATURES if self.native is None else self.native.cpu

    def has(self, feature: str) -> bool:
        """Whether this CPU has a feature, by the number that this kernel gives it; no where nothing tells that."""
        number = self.rules.bit(feature)
        return number is not None and self.cpu.has(number)

    def lookup(self, name: str) -> int | None:
        """The virtual address of a symbol of the image."""
        return self.image.symbols.lookup(name)


class Choice(NamedTuple):
    """One way in which a boot may go: feature bits on or off, a number of CPUs, a nop table, a return thunk.

    ``says`` names it for a person; empty where it is the ordinary one.
    """

    says: str
    features: tuple[tuple[int, bool], ...] = ()
    cpus: int | None = None
    nops: NopTable | None = None
    return_thunk: int | None = None
    checks: Checks | None = None


class Pass:
    """One pass; each has the name of its ``family``, and says what it writes."""

    family = ""
    needs_cpu = True
    """Whether it can only be run for a CPU that is known."""
    silent = False
    """Whether the kernel does not even walk the table where this pass does not apply."""

    def applies(self, boot: Boot) -> bool:
        """Whether this boot's pass writes anything at all: sites need not be read where it does not."""
        return True

    def also(self, rules: Rules) -> tuple[str, ...]:
        """Families whose sites this pass walks behind its own."""
        return ()

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """Every patch in the order of the kernel, each laid over ``text``; :class:`PatchError` for what cannot be."""
        raise NotImplementedError

    def codes(self, text: Text, places: Places, boot: Boot) -> list[bytes] | None:
        """What :meth:`patches` makes of each site of a table in bulk; None where that needs the sites themselves."""
        return None

    def kept(self, sites: Sequence[Site]) -> frozenset[int]:
        """Virtual addresses that the kernel's own patcher must find as they are on disk, because of these sites.

        It takes what it finds there for a fault, or runs it before it has patched what goes with it.
        """
        return frozenset()

    def choices(self, image: Image, sites: Sequence[Site], rules: Rules) -> list[list[Choice]]:
        """Groups of choices that decide what these sites become: one of each group is made."""
        return []
