"""JSON that every reader takes.

Python keeps bytes of a file name that are no UTF-8 as half surrogate pairs, and ``json`` writes them out as
such; readers in most other languages refuse that (RFC 8259, section 8.2).  Imports nothing of the package.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(record: Any, indent: int | None = None) -> str:
    """One JSON document as ASCII text; bytes that are no UTF-8 as ``\\xNN``, numbers always finite."""
    return _dumps(record, indent, None)


def compact(record: Any) -> str:
    """What :func:`dumps` gives, without white space."""
    return _dumps(record, None, (",", ":"))


def _dumps(record: Any, indent: int | None, separators: tuple[str, str] | None) -> str:
    text = json.dumps(record, indent=indent, separators=separators, allow_nan=False)
    if "\\ud" in text:
        text = json.dumps(_whole(record), indent=indent, separators=separators, allow_nan=False)
    return text


def addressed(key: str, value: int) -> dict[str, Any]:
    """An address twice: as an integer, and as a string for readers whose numbers end at 2^53."""
    return {key: value, f"{key}_hex": f"{value:#x}"}


def whole(text: str) -> str:
    """A string without half surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raw = text.encode("utf-8", "backslashreplace")
        return raw.decode("utf-8", "backslashreplace")
    return text


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {_whole(k): _whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(v) for v in value]
    return value
