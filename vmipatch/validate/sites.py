"""Site by site: every subject from many states, natively and patched, and a verdict on each.

May import the other parts of this package.  For some subjects at a time all native runs come first: going from one
form of the machine to the other costs more than going back to the same, and results that wait for their other half
cost memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vmipatch.validate.compare import Difference, differs
from vmipatch.validate.stand import Stand
from vmipatch.validate.states import Maker, State, look_around
from vmipatch.validate.subject import Subject, names_of
from vmipatch.validate.trial import Result, Trial

Progress = Callable[[int, int], None]
TOGETHER = 64
"""Subjects whose native runs wait for their patched ones."""


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


@dataclass(frozen=True)
class FailedCall:
    """A VMI call that fails: by itself, at sites that make it, or both; ``verdicts`` with the call itself first."""

    call: str
    slots: tuple[str, ...]
    stub: int
    """The linear address of the ROM's stub; 0 if it has none."""
    verdicts: tuple[SiteVerdict, ...]

    @property
    def alone(self) -> bool:
        """Whether the call fails by itself, too."""
        return self.verdicts[0].subject.is_call

    @property
    def sites(self) -> int:
        """How many sites fail."""
        return len(self.verdicts) - self.alone

    @property
    def title(self) -> str:
        """For a person: the call by all its names."""
        return names_of((self.call,), self.slots, (self.stub,) if self.stub else ())


@dataclass
class SiteRun:
    """All verdicts, and what they took."""

    verdicts: list[SiteVerdict]
    states: int = 0
    seconds: float = 0.0
    bases: int = 0

    def failed_calls(self) -> list[FailedCall]:
        """What fails, by call: first those that fail by themselves too, then those with the most sites.

        A site that makes several calls counts for the one that fails by itself, else for its first.
        """
        failed = [v for v in self.verdicts if v.failure is not None]
        alone = {v.subject.op for v in failed if v.subject.is_call}
        groups: dict[str, list[SiteVerdict]] = {}
        for verdict in failed:
            made = verdict.subject.call_names
            groups.setdefault(next((name for name in made if name in alone), made[0]), []).append(verdict)
        found = []
        for call, verdicts in groups.items():
            verdicts.sort(key=lambda v: not v.subject.is_call)
            stubs = [dict(zip(v.subject.call_names, v.subject.stubs, strict=False)).get(call, 0) for v in verdicts]
            slots = tuple(dict.fromkeys(slot for v in verdicts for slot in v.subject.slots))
            found.append(FailedCall(call, slots, max(stubs), tuple(verdicts)))
        return sorted(found, key=lambda f: (not f.alone, -f.sites))


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
        for begin in range(0, len(subjects), TOGETHER):
            natives: list[tuple[SiteVerdict, int, State, Result]] = []
            for subject in subjects[begin : begin + TOGETHER]:
                for number in numbers:
                    state = maker.make(subject, number, stand.seen.get(subject.address, []))
                    if state.possible:
                        natives.append((verdicts[subject], number, state, trial.native(subject, state, base.native)))
            for verdict, number, state, native in natives:
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
            if progress is not None:
                progress(index * len(subjects) + min(begin + TOGETHER, len(subjects)), total)
    run.seconds = time.perf_counter() - begun
    return run
