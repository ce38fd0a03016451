"""The passes of a kernel's boot, one module each, by the name of their family.

Imports annotate, image, isa and its sisters in ``patch/``.
"""

from collections.abc import Mapping

from vmipatch.patch.passes.alternatives import Alternatives
from vmipatch.patch.passes.callthunks import CallThunks
from vmipatch.patch.passes.contract import NO_FEATURES, Boot, Checks, Choice, Pass
from vmipatch.patch.passes.endbr import EndbrSeal
from vmipatch.patch.passes.fineibt import FineIbt
from vmipatch.patch.passes.locks import Locks
from vmipatch.patch.passes.paravirt import ParavirtCalls
from vmipatch.patch.passes.retpolines import Retpolines
from vmipatch.patch.passes.returns import Returns

PASSES: Mapping[str, Pass] = {
    one.family: one
    for one in (
        ParavirtCalls(), Alternatives(), Locks(), FineIbt(), Retpolines(), Returns(), CallThunks(), EndbrSeal(),
    )
}  # fmt: skip

__all__ = ["NO_FEATURES", "PASSES", "Boot", "Checks", "Choice", "Pass"]
