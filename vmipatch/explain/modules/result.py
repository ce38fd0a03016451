"""What the explanation of a kernel's modules says: for each the causes of its bytes, and what could not be told.

Imports its sisters in ``explain/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vmipatch.explain.result import Proved, Unexplained


class Note(NamedTuple):
    """Something about modules that is no run of bytes.

    ``id`` is stable: ``module-list``, ``module-no-file``, ``module-other-build``, ``module-damaged-file``,
    ``module-not-in-dump``, ``module-symbols``, ``region-unknown`` …  ``finding`` says whether it counts as one
    (exit status 1); ``address`` is a virtual one of the running kernel, None where there is none.
    """

    id: str
    message: str
    finding: bool
    module: str | None = None
    address: int | None = None


@dataclass
class ModuleExplained:
    """One loaded module; addresses are virtual ones of the running kernel.

    ``address`` is where its executable memory begins (of its ``struct module`` where nothing tells); ``file`` the path
    of the file that it is held against, None without one.  ``by_cause`` counts rewritten bytes; ``runs`` is how many
    unexplained runs there are, of which ``unexplained`` has the first.
    """

    name: str
    address: int
    state: str
    file: str | None = None
    total: int = 0
    unexplained_bytes: int = 0
    by_cause: dict[str, int] = field(default_factory=dict)
    states: dict[str, dict[str, int]] = field(default_factory=dict)
    unexplained: list[Unexplained] = field(default_factory=list)
    runs: int = 0
    proved: list[Proved] = field(default_factory=list)
    freed: tuple[str, ...] = ()

    @property
    def explained(self) -> int:
        """Bytes that were rewritten, and why is known."""
        return sum(self.by_cause.values())

    @property
    def pristine(self) -> int:
        """Bytes that are the file's own and should be, and what the loader leaves between sections."""
        return self.total - self.explained - self.unexplained_bytes


class Area(NamedTuple):
    """Executable memory of a running kernel, and what it is, in one line for a person.

    ``kind`` is stable: ``kernel``, ``module``, ``bpf``, ``ftrace``, ``kprobe``, ``its`` …, ``unknown``.
    """

    address: int
    size: int
    kind: str
    what: str

    @property
    def known(self) -> bool:
        """Whether it belongs to something."""
        return self.kind != "unknown"


@dataclass
class Modules:
    """All modules of a running kernel, in the order of its list, its executable areas, and what else is to be said."""

    folder: str
    modules: list[ModuleExplained] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every byte has a cause and nothing is unknown."""
        return not any(m.unexplained_bytes for m in self.modules) and not any(n.finding for n in self.notes)
