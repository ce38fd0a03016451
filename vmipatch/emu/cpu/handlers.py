"""The engine uncompiled: its parts as ordinary modules, and the handlers made as they are first needed.

May import every part of the engine and forms.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from vmipatch.emu.cpu.flow import HANDLERS
from vmipatch.emu.cpu.forms import engine

PARTS = (
    "words", "state", "flags", "alu", "faults", "access", "stack", "operands", "inout", "flow", "transfer",
    "strings", "general", "system", "identity", "x87_memory", "x87",
)  # fmt: skip


def install() -> None:
    """Fill the table of handlers."""
    made = engine()
    namespace: dict[str, Any] = {}
    for part in PARTS:
        namespace.update(vars(importlib.import_module(f"vmipatch.emu.cpu.{part}")))

    def define(name: str) -> None:
        source = made.sources[name]
        exec(source, namespace)
        for other in re.findall(r"return (h_\w+)\(c, p\)", source):  # a fast handler's slow one
            if other not in namespace:
                define(other)

    def maker(number: int, name: str) -> Callable[[Any, int], int]:
        def first(c: Any, p: int) -> int:
            define(name)
            handler: Callable[[Any, int], int] = namespace[name]
            HANDLERS[number] = handler
            return handler(c, p)

        return first

    HANDLERS[:] = [
        maker(number, name) if name in made.sources else namespace[name] for number, name in enumerate(made.names)
    ]
