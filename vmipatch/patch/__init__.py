"""What a kernel would write over its own text, and writing it: plan, apply, journal, restore.

Imports annotate, image, isa, facts and errors; a ROM's answers come in as data.
"""

from typing import TYPE_CHECKING

from vmipatch.lazily import attributes
from vmipatch.patch.cpu import Cpu, from_features, from_spec
from vmipatch.patch.patch import Cause, Patch, Plan
from vmipatch.patch.planner import plan
from vmipatch.patch.target import Native, OnRom

if TYPE_CHECKING:
    from vmipatch.patch.writer import apply, restore

__all__ = [
    "Cause",
    "Cpu",
    "Native",
    "OnRom",
    "Patch",
    "Plan",
    "apply",
    "from_features",
    "from_spec",
    "plan",
    "restore",
]

# Who only plans writes nothing.
__getattr__ = attributes(__name__, dict.fromkeys(("apply", "restore"), "vmipatch.patch.writer"))
