"""The engine, compiled if it was built and uncompiled if not; the same names either way.

May import every part.  ``VMIPATCH_UNCOMPILED=1`` in the environment chooses the
uncompiled one, for debugging and for comparing the two.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__all__ = ["COMPILED", "Core", "Memory", "api"]

api: Any
COMPILED = False
if TYPE_CHECKING or os.environ.get("VMIPATCH_UNCOMPILED"):
    from vmipatch.emu.cpu import api
    from vmipatch.emu.cpu.memory import Memory
    from vmipatch.emu.cpu.state import Core
else:
    try:
        from vmipatch.emu.cpu import _core as api
        from vmipatch.emu.cpu._core import Core, Memory

        COMPILED = True
    except ImportError:
        from vmipatch.emu.cpu import api
        from vmipatch.emu.cpu.memory import Memory
        from vmipatch.emu.cpu.state import Core

if not COMPILED:
    from vmipatch.emu.cpu.handlers import install

    install()
