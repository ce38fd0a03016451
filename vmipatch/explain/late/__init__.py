"""The families that a running kernel rewrites after its boot, one module each.

Imports annotate, patch, isa and its sisters in ``explain/``.
"""

from collections.abc import Mapping

from vmipatch.explain.late.contract import Data, LateFamily, Live, Move, State, Tally
from vmipatch.explain.late.jumplabels import JumpLabels
from vmipatch.explain.late.mcount import McountCalls
from vmipatch.explain.late.runtimeconsts import RuntimeConsts
from vmipatch.explain.late.staticcalls import StaticCalls

LATE: Mapping[str, LateFamily] = {
    one.family: one for one in (McountCalls(), JumpLabels(), StaticCalls(), RuntimeConsts())
}

__all__ = ["LATE", "Data", "LateFamily", "Live", "Move", "State", "Tally"]
