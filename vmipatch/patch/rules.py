"""How one kernel patches itself: the era of ``specs/kernels/`` that its version and its tables point at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmipatch import facts
from vmipatch.annotate import TableInfo
from vmipatch.annotate.family import AT_BOOT, FAMILIES
from vmipatch.annotate.features import numbers
from vmipatch.annotate.tried import newer
from vmipatch.errors import PatchError, SpecError, UsageError
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
        """The passes, by their families, that this kernel takes twice: its tables may stay behind them."""
        return tuple(self.spec["passes"])

    @property
    def boot(self) -> tuple[str, ...]:
        """All passes of the boot, by their families, in the order in which this kernel makes them."""
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

    def nop_tables(self, bits: int) -> list[nops.NopTable]:
        """Every table that this kernel may choose, on whatever CPU."""
        names = [row["table"] for row in self.spec["nops"] if row.get("bits", bits) == bits]
        return [nops.table(name) for name in dict.fromkeys(names)]

    def bit(self, feature: str) -> int | None:
        """The number of a feature bit in this kernel; None where nothing tells it."""
        found: int | None = self.spec.get("bits", numbers()).get(feature)
        return found

    def nops_need_identity(self, bits: int) -> bool:
        """Whether the choice of padding depends on who made the CPU, which feature words do not say."""
        return any("vendor" in row for row in self.spec["nops"] if row.get("bits", bits) == bits)


def _holds(row: dict[str, Any], cpu: Cpu, bits: int) -> bool:
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


_ANY: frozenset[str] = frozenset()
"""Tables whose keys are names of the kernel's and not words of ours."""

_WORDS: Mapping[str, frozenset[str] | None] = {
    **dict.fromkeys(("since", "like", "tried", "feature_words", "passes", "boot")),
    "layouts": frozenset(FAMILIES),
    "nops": frozenset(("vendor", "family", "model", "except_model", "feature", "bits", "table")),
    "alternatives": frozenset(("displacement", "padding", "optimise", "nested", "once", "nops", "null", "nop")),
    "retpolines": frozenset(("int3", "form")),
    "returns": frozenset(("thunks",)),
    "endbr": frozenset(("poison",)),
    "mcount": frozenset(("jumps",)),
    "callthunks": frozenset(("most", "templates", "skip", "skip_ranges")),
    "locks": frozenset(("byte", "bounds")),
    "paravirt": frozenset((
        "mode", "default", "clobbers", "null", "nop", "nothing", "identity32", "identity64", "jump",
        "inline32", "inline64", "only",
    )),
    "paravirt.inline32": _ANY,
    "paravirt.inline64": _ANY,
    "paravirt.only": _ANY,
}  # fmt: skip
"""The words of an era's file, and of each table in it (None: a value)."""


def check(spec: Mapping[str, Any], file: str) -> None:
    """Raise :class:`SpecError` for the first word of an era's file that nobody reads."""
    _check_table(spec, "", frozenset(k for k in _WORDS if "." not in k), file)
    for family in (*spec.get("passes", ()), *spec.get("boot", ())):
        if family not in AT_BOOT:
            raise SpecError(f"no family of the boot is named {family!r}", file=file)


def _check_table(table: Mapping[str, Any], prefix: str, words: frozenset[str], file: str) -> None:
    for key, value in table.items():
        if words is not _ANY and key not in words:
            raise SpecError(f"a word that nothing reads: {prefix}{key}", file=file, section=prefix.rstrip(".") or None)
        inner = _WORDS.get(prefix + key)
        for row in value if isinstance(value, list) else (value,):
            if isinstance(row, dict):
                _check_table(row, f"{prefix}{key}.", _ANY if inner is None else inner, file)


@cache
def eras() -> tuple[Rules, ...]:
    """Every era, oldest first."""
    found = []
    for name in facts.names("kernels"):
        check(facts.load("kernels", name), f"specs/kernels/{name}.toml")
        spec = facts.whole("kernels", name)
        found.append(Rules(name, parse_version(spec["since"]), spec))
    return tuple(sorted(found, key=lambda r: r.since))


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
    warnings = [said] if (said := newer(version)) else []
    if best != at:
        era = all_eras[best]
        text = f"the tables are those of {era.name}, not of {all_eras[at].name} as the version says"
        warnings.append(f"{text}: a backport; {era.name}'s rules are used")
    return all_eras[best], warnings
