"""Site by site: every subject from many states, natively and patched, and a verdict on each.

May import the other parts of this package.  For each base all native runs come first, for going from one form of
the machine to the other costs a copy of its memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vmipatch.validate.compare import Difference, differs
from vmipatch.validate.stand import Stand
from vmipatch.validate.states import Maker, State, look_around
from vmipatch.validate.subject import Subject
from vmipatch.validate.trial import Result, Trial

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Failure:
    """A state in which the two runs differ: number of the base and of the state, and both runs' ends."""

    base: int
    state: int
    origin: str
    difference: Difference
    native: Result
    patched: Result
    start: State


@dataclass
class SiteVerdict:
    """What was found out about one subject; ``rejected`` counts states whose native run faults and which the
    patched one cannot be held to, by the fault."""

    subject: Subject
    states: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None
    failures: int = 0
    instructions: tuple[int, int] = (0, 0)

    @property
    def verdict(self) -> str:
        """``pass``, ``fail``, or ``not shown`` where no state counted."""
        if self.failure is not None:
            return "fail"
        return "pass" if self.states else "not shown"


@dataclass
class SiteRun:
    """All verdicts, and what they took."""

    verdicts: list[SiteVerdict]
    states: int = 0
    seconds: float = 0.0
    bases: int = 0


def validate_sites(
    stand: Stand,
    subjects: Sequence[Subject],
    states: int = 8,
    *,
    first: int = 0,
    only: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> SiteRun:
    """Try each subject from ``states`` states on each base of the stand, beginning with the number ``first``.

    ``only``: one base and one state, to try again what failed.
    """
    trial = Trial(stand)
    verdicts = {subject: SiteVerdict(subject) for subject in subjects}
    begun = time.perf_counter()
    run = SiteRun(list(verdicts.values()), bases=len(stand.bases))
    numbers = range(first, first + states) if only is None else [only[1]]
    total = len(stand.bases) * len(subjects)
    for index, base in enumerate(stand.bases):
        if only is not None and index != only[0]:
            continue
        stand.machine.restore(base.native)
        around = look_around(stand.machine, stand.page_offset)
        if len(around.spare) < 4:
            continue
        maker = Maker(around)
        natives: list[tuple[SiteVerdict, int, State, Result]] = []
        for subject in subjects:
            for number in numbers:
                state = maker.make(subject, number, stand.seen.get(subject.address, []))
                if state.possible:
                    natives.append((verdicts[subject], number, state, trial.native(subject, state, base.native)))
        before = None
        for done, (verdict, number, state, native) in enumerate(natives):
            patched = trial.lowered(verdict.subject, state, base.lowered)
            run.states += 1
            difference = differs(verdict.subject, state, around, native, patched, base.native.memory)
            if difference is not None and native.end == "fault":
                verdict.rejected[native.detail] += 1
                continue
            verdict.states += 1
            counted = verdict.instructions
            verdict.instructions = counted[0] + native.instructions, counted[1] + patched.instructions
            if difference is not None:
                verdict.failures += 1
                if verdict.failure is None:
                    verdict.failure = Failure(index, number, state.origin, difference, native, patched, state)
            if progress is not None and verdict is not before:
                before = verdict
                progress(index * len(subjects) + done * len(subjects) // len(natives), total)
    run.seconds = time.perf_counter() - begun
    return run
