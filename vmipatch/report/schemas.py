"""The published JSON schemas of what the commands print, one a document type (``specs/schemas/``).

Imports facts and errors.
"""

from __future__ import annotations

from vmipatch import facts
from vmipatch.errors import UsageError

_SUFFIX = ".json"


def names() -> tuple[str, ...]:
    """The document types that have a schema."""
    found = (f.name for f in (facts.root() / "schemas").iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def schema(name: str) -> str:
    """The schema (JSON Schema, draft 2020-12) of a document type, as text; ``vmipatch.scan/1`` is ``scan``.

    Raises :class:`UsageError` for a type that has none.
    """
    known = names()
    if name not in known:
        raise UsageError(f"no schema named {name!r}; there are: {', '.join(known)}")
    return (facts.root() / "schemas" / f"{name}{_SUFFIX}").read_text("utf-8")
