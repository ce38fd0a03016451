"""How one kernel patches itself: the era of ``specs/kernels/`` that its version and its tables point at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmipatch import facts
from vmipatch.annotate import TableInfo
from vmipatch.errors import PatchError, UsageError
from vmipatch.isa import nops
from vmipatch.patch.cpu import Cpu

Version = tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """One era; ``spec`` is its file, whose keys ``specs/kernels/README.md`` explains."""

    name: str
    since: Version
    spec: dict[str, Any]

    @property
    def passes(self) -> tuple[str, ...]:
        """Families in the order in which this kernel patches them."""
        return tuple(self.spec["passes"])

    @property
    def boot(self) -> tuple[str, ...]:
        """The passes with those between them that are not for writing into an image: returns, retpolines, ENDBR."""
        return tuple(self.spec.get("boot", self.passes))

    def section(self, name: str) -> dict[str, Any]:
        """One table of the spec; empty where this era has none."""
        found: dict[str, Any] = self.spec.get(name, {})
        return found

    def feature_words(self) -> tuple[int, int]:
        """The fewest and the most words of x86_capability in this era."""
        least, most = self.spec["feature_words"]
        return least, most

    def nop_table(self, cpu: Cpu, bits: int) -> nops.NopTable:
        """The padding this kernel chooses on that CPU."""
        for row in self.spec["nops"]:
            if _holds(row, cpu, bits):
                return nops.table(row["table"])
        raise PatchError(f"specs/kernels/{self.name}.toml chooses no nop table for {bits}-bit kernels")

    def nops_need_identity(self, bits: int) -> bool:
        """Whether the choice of padding depends on who made the CPU, which feature words do not say."""
        return any("vendor" in row for row in self.spec["nops"] if row.get("bits", bits) == bits)


def _holds(row: dict[str, Any], cpu: Cpu, bits: int) -> bool:
    from vmipatch.annotate.features import numbers

    if row.get("bits", bits) != bits or row.get("vendor", cpu.vendor) != cpu.vendor:
        return False
    if "feature" in row and not cpu.has(numbers()[row["feature"]]):
        return False
    if not _within(row.get("family"), cpu.family) or not _within(row.get("model"), cpu.model):
        return False
    return cpu.model not in row.get("except_model", ())


def _within(wanted: int | list[int] | None, value: int | None) -> bool:
    if wanted is None:
        return True
    if value is None:
        return False
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    return least <= value <= most


def parse_version(text: str) -> Version:
    """``6.1.50`` to ``(6, 1, 50)``; :class:`UsageError` for anything else."""
    try:
        return tuple(int(part) for part in text.split("-")[0].split("."))
    except ValueError:
        raise UsageError(f"{text!r} is no kernel version; write it like 6.1 or 2.6.32") from None


@cache
def eras() -> tuple[Rules, ...]:
    """Every era, oldest first."""
    found = []
    for name in facts.names("kernels"):
        spec = _whole(name)
        found.append(Rules(name, parse_version(spec["since"]), spec))
    return tuple(sorted(found, key=lambda r: r.since))


def _whole(name: str) -> dict[str, Any]:
    """A spec with what it takes over from the one that it is ``like``."""
    spec = facts.load("kernels", name)
    return _over(_whole(spec["like"]), spec) if "like" in spec else spec


def _over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two tables as one, key by key; of anything but tables the new one holds."""
    both = old.keys() & new.keys()
    tables = {k: _over(old[k], new[k]) for k in both if isinstance(old[k], dict) and isinstance(new[k], dict)}
    return {**old, **new, **tables}


def choose(version: Version | None, tables: Iterable[TableInfo], file: str) -> tuple[Rules, list[str]]:
    """The era for a kernel version, corrected by the layouts that its tables really have.

    Stable kernels get newer patchers backported, and their tables show it: the
    nearest era that knows every layout found is taken, with a warning.  Raises
    :class:`PatchError` when there is no version to start from, or no such era.
    """
    all_eras = eras()
    # Tables that have had one layout since they exist tell nothing: no era names them.
    telling = {family for era in all_eras for family in era.spec["layouts"]}
    layouts = {t.family: t.layout for t in tables if t.family in telling and t.layout is not None and not t.sealed}
    if version is None:
        raise PatchError("no Linux version banner in the image: name the version with --kernel", file=file)
    at = max((i for i, era in enumerate(all_eras) if era.since <= version), default=None)
    if at is None:
        raise PatchError(f"Linux {'.'.join(map(str, version))} is older than any patcher we know", file=file)

    def knows(era: Rules) -> bool:
        known = era.spec["layouts"]
        return all(layout in known.get(family, ()) for family, layout in layouts.items())

    fitting = [i for i, era in enumerate(all_eras) if knows(era)]
    if not fitting:
        found = ", ".join(f"{family} {layout}" for family, layout in layouts.items())
        raise PatchError(f"no era of the kernel's patcher has tables of these layouts: {found}", file=file)
    best = min(fitting, key=lambda i: (abs(i - at), -i))
    warnings = []
    if best != at:
        era = all_eras[best]
        text = f"the tables are those of {era.name}, not of {all_eras[at].name} as the version says"
        warnings.append(f"{text}: a backport; {era.name}'s rules are used")
    return all_eras[best], warnings
