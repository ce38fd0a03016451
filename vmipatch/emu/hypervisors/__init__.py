"""One personality a hypervisor: the host side of what its ROM speaks.

A hypervisor is one module of this package with a class ``Personality``; what several need is in the modules
that are named for it.  May import the machine, ``vmipatch.rombuild``'s readers of specs and ROMs, and facts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vmipatch.errors import UsageError

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base


def create(name: str) -> Base:
    """The personality of that hypervisor, not yet attached to a machine; raises :class:`UsageError`."""
    from vmipatch.rombuild.hypervisor import names

    if name not in names():
        raise UsageError(f"no hypervisor named {name!r}; there are: {', '.join(names())}")
    module = import_module(f"{__name__}.{name}")
    made: Base = module.Personality()
    return made
