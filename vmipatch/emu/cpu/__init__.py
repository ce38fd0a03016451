"""The processor: ``Cpu``, ``Memory``, ``Exit``, and ``COMPILED``, which says whether the engine is machine code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmipatch.emu.cpu.cpu import COMPILED, Cpu, Exit, Memory

__all__ = ["COMPILED", "Cpu", "Exit", "Memory"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vmipatch.emu.cpu import cpu

    return getattr(cpu, name)
