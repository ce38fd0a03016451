"""A running kernel's text against its image: the cause of every byte that differs.

Imports patch, annotate, image, isa, facts and errors.
"""

from vmipatch.explain.engine import explain
from vmipatch.explain.late import State
from vmipatch.explain.legal import ANYWHERE, DOMAINS, Legal, legal
from vmipatch.explain.memory import Memory
from vmipatch.explain.result import Explanation, Proved, Unexplained

__all__ = [
    "ANYWHERE", "DOMAINS", "Explanation", "Legal", "Memory", "Proved", "State", "Unexplained", "explain", "legal",
]  # fmt: skip
