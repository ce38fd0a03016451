"""The chain from spec to verdict for the example guest, over hypervisors and forms.

May import the rest of this package and rombuild's writer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from vmipatch.errors import UsageError
from vmipatch.rombuild.build import build
from vmipatch.rombuild.hypervisor import names
from vmipatch.validate.validation import Request, validate

FORMS = {"rfc-v1": "vmi-13.0", "v2": "vmi-3.0", "mainline": "vmi-3.0"}
MOMENTS = 3
MEMORY_MIB = 32


def guest(form: str) -> Path:
    """The bundled kernel of a form: in a checkout that of ``examples/``, else the one installed with the package."""
    checkout = Path(__file__).parents[2] / "examples" / "vmi-guest" / f"vmi-guest-{form}.elf"
    if checkout.is_file():
        return checkout
    installed = files("vmipatch.guests") / f"vmi-guest-{form}.elf"
    with as_file(installed) as path:
        return Path(path)


@dataclass(frozen=True)
class Row:
    """One form of the guest on one hypervisor; ``problems`` are lines for a person, empty where all passed."""

    hypervisor: str
    abi: str
    form: str
    sites: int
    calls: int
    more_calls: bool
    traps: int
    instructions: int
    states: int
    verdict: str
    problems: tuple[str, ...]


def demonstrate(hypervisors: Sequence[str] | None, forms: Sequence[str] | None, states: int) -> Iterator[Row]:
    """Each form of the guest on each hypervisor, in that order; raises :class:`UsageError` for a wrong name.

    The pairs are independent of each other, so every processor of this machine takes some.
    """
    wanted = list(hypervisors or names())
    kinds = list(forms or FORMS)
    for name in wanted:
        if name not in names():
            raise UsageError(f"no hypervisor named {name!r}; there are: {', '.join(names())}")
    for kind in kinds:
        if kind not in FORMS:
            raise UsageError(f"no form named {kind!r}; there are: {', '.join(FORMS)}")
    pairs = [(name, kind, states) for name in wanted for kind in kinds]
    workers = min(len(pairs), os.cpu_count() or 1)
    if workers == 1:
        yield from map(one, pairs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(one, pairs)


def one(pair: tuple[str, str, int]) -> Row:
    """The chain for one hypervisor and one form: spec, ROM, patches, boots, sites."""
    name, kind, states = pair
    with tempfile.TemporaryDirectory(prefix="vmipatch-") as folder:
        rom = Path(folder) / f"{name}-{FORMS[kind]}.rom"
        rom.write_bytes(build(name, FORMS[kind]).data)
        found = validate(Request(guest(kind), rom, memory_mib=MEMORY_MIB, states=states, moments=MOMENTS))
    static = next((b for b in found.boots if b.kind == "static"), None)
    problems = [f"{b.kind} boot: {text}" for b in found.boots for text in b.problems]
    if found.sites is not None:
        failed = [v for v in found.sites.verdicts if v.failure is not None]
        problems += [f"{v.subject.title}: {v.failure.difference}" for v in failed if v.failure]
    return Row(
        hypervisor=name,
        abi=found.abi,
        form=kind,
        sites=found.patched_sites,
        calls=sum(static.calls.values()) if static else 0,
        more_calls=static is not None and static.more_calls,
        traps=sum(static.traps.values()) if static else 0,
        instructions=static.instructions if static else 0,
        states=found.sites.states if found.sites else 0,
        verdict=found.verdict,
        problems=tuple(problems),
    )
