"""A snapshot of a whole machine, and the way back that touches only what changed.

Imports nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that decides what a machine does next.

    ``memory`` is the whole backing (RAM, ROMs, machine-owned pages); the other
    fields are opaque to all but the parts that made them.
    """

    memory: bytes = field(repr=False)
    processor: Any = field(repr=False)
    board: Any = field(repr=False)
    personality: Any = field(repr=False)
    instructions: int
    serial_length: int
    debug_length: int
