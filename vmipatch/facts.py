"""The one reader of ``specs/``: facts about ABIs, hypervisors, CPUs and kernels.

A spec is a TOML file, named by its folder and stem: ``load("abi", "vmi-3.0")``.
In a wheel the files lie in ``vmipatch/specs``; in a checkout (run in place or
installed editable) they lie beside the package, and both are found.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from vmipatch.errors import SpecError, UsageError

Spec = dict[str, Any]


@cache
def root() -> Traversable:
    """The folder that holds the spec folders."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "specs").is_dir():
        return checkout / "specs"
    return files("vmipatch") / "specs"


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all specs of a kind (``abi``, ``hypervisors``, ``cpus``, ``kernels``)."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in (root() / kind).iterdir() if f.name.endswith(".toml")))


@cache
def load(kind: str, name: str) -> Spec:
    """The parsed spec; callers must not change it.

    Raises :class:`UsageError` when there is no spec of that name, and
    :class:`SpecError` when its TOML does not parse.
    """
    if name not in names(kind):
        raise UsageError(f"no {kind} spec named {name!r}; there are: {', '.join(names(kind))}")
    return parse((root() / kind / f"{name}.toml").read_text("utf-8"), f"specs/{kind}/{name}.toml")


@cache
def whole(kind: str, name: str) -> Spec:
    """The spec with all that it takes over from the one that it is ``like``, tables merged key by key.

    Callers must not change it.  Raises as :func:`load` does.
    """
    spec = load(kind, name)
    return _over(whole(kind, spec["like"]), spec) if "like" in spec else spec


def _over(old: Spec, new: Spec) -> Spec:
    """Two tables as one, key by key; of anything but tables the new one holds."""
    both = old.keys() & new.keys()
    tables = {k: _over(old[k], new[k]) for k in both if isinstance(old[k], dict) and isinstance(new[k], dict)}
    return {**old, **new, **tables}


def load_path(path: Path) -> Spec:
    """A user's own spec file; raises :class:`SpecError` if it cannot be read."""
    try:
        return parse(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the spec: {error}", file=path) from error


def parse(text: str, file: str) -> Spec:
    """TOML text to a mapping; ``file`` is the name that errors carry."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"not valid TOML: {error}", file=file) from error
