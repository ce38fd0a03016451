"""What a kernel would write over its own text, and writing it: plan, apply, journal, restore.

Imports annotate, image, isa, facts and errors; a ROM's answers come in as data.
"""

from typing import TYPE_CHECKING

from vmipatch.lazily import attributes

if TYPE_CHECKING:
    from vmipatch.patch.cpu import Cpu, from_features, from_spec
    from vmipatch.patch.patch import Cause, Patch, Plan
    from vmipatch.patch.planner import plan
    from vmipatch.patch.target import Native, OnRom
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

# Who asks for an era's rules plans nothing, and who plans writes nothing.
__getattr__ = attributes(
    __name__,
    {
        **dict.fromkeys(("Cpu", "from_features", "from_spec"), "vmipatch.patch.cpu"),
        **dict.fromkeys(("Cause", "Patch", "Plan"), "vmipatch.patch.patch"),
        "plan": "vmipatch.patch.planner",
        **dict.fromkeys(("Native", "OnRom"), "vmipatch.patch.target"),
        **dict.fromkeys(("apply", "restore"), "vmipatch.patch.writer"),
    },
)
