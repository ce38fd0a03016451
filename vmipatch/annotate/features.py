"""Names of the bits of x86_capability, from ``specs/isa/features.toml``."""

from __future__ import annotations

from functools import cache

from vmipatch import facts


@cache
def _names() -> dict[int, str]:
    spec = facts.load("isa", "features")
    return {int(word) * 32 + int(bit): name for word, row in spec["words"].items() for bit, name in row.items()}


@cache
def numbers() -> dict[str, int]:
    """Feature names to bit numbers, those included whose bit later got another meaning."""
    moved: dict[str, int] = facts.load("isa", "features")["numbers"]
    return moved | {name: number for number, name in _names().items()}


def feature_name(number: int) -> str:
    """The name of a feature bit; ``word*32+bit`` for the synthetic words, whose bits move between versions."""
    return _names().get(number) or f"{number >> 5}*32+{number & 31}"
