"""What a kernel would write over its own text, and writing it: plan, apply, journal, restore.

Imports annotate, image, isa, facts and errors; a ROM's answers come in as data.
"""

from vmipatch.patch.apply import apply, restore
from vmipatch.patch.patch import Cause, Patch, Plan
from vmipatch.patch.plan import plan
from vmipatch.patch.target import Native, OnRom

__all__ = ["Cause", "Native", "OnRom", "Patch", "Plan", "apply", "plan", "restore"]
