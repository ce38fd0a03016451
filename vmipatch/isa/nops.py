"""Padding: the no-operation tables of ``specs/isa/nops.toml``."""

from __future__ import annotations

from functools import cache

from vmipatch import facts
from vmipatch.errors import UsageError


class NopTable:
    """No-operation sequences by length; the longest is repeated to fill more."""

    def __init__(self, name: str, sequences: tuple[bytes, ...]) -> None:
        self.name = name
        self.sequences = sequences

    def fill(self, length: int) -> bytes:
        """``length`` bytes of padding, longest sequences first, as the kernel's ``add_nops`` does."""
        longest = len(self.sequences)
        whole, rest = divmod(max(length, 0), longest)
        return self.sequences[-1] * whole + (self.sequences[rest - 1] if rest else b"")


@cache
def table(name: str) -> NopTable:
    """A table by name; raises :class:`UsageError` for a name that is not in the spec."""
    tables = facts.load("isa", "nops")
    if name not in tables:
        raise UsageError(f"no nop table named {name!r}; there are: {', '.join(sorted(tables))}")
    return NopTable(name, tuple(bytes.fromhex(s) for s in tables[name]["sequences"]))
