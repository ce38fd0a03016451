"""The CPU that a kernel is patched for: who made it, and its x86_capability words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmipatch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU; ``words`` are the kernel's x86_capability, 32 bits each."""

    name: str
    vendor: str | None
    family: int | None
    model: int | None
    stepping: int | None
    words: tuple[int, ...]
    complete: bool = True

    def has(self, feature: int) -> bool:
        """Whether a feature bit (word * 32 + bit) is set."""
        word = feature >> 5
        return word < len(self.words) and bool(self.words[word] >> (feature & 31) & 1)


def from_features(path: Path) -> Cpu:
    """The words of a features file."""
    try:
        return Cpu(str(path), None, None, None, None, tuple(int(w, 16) for w in path.read_text().split()))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read feature words: {error}", file=path) from error


def from_spec(name: str, release: tuple[int, ...] | None) -> Cpu:
    """A named CPU."""
    raise UsageError(f"no cpu named {name!r}")
