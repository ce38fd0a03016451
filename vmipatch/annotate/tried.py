"""Whether a kernel is newer than all that the rules of ``specs/kernels/`` were tried on.  Imports facts."""

from __future__ import annotations

from functools import cache

from vmipatch import facts

Version = tuple[int, ...]


@cache
def newest() -> Version:
    """The last release that was tried: what the newest era says, found by its file's name (``linux-7.0``)."""
    name = max(facts.names("kernels"), key=lambda name: _version(name.removeprefix("linux-")))
    return _version(facts.whole("kernels", name)["tried"])


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def newer(version: Version | None) -> str:
    """What to say of a kernel that is newer than all that the rules were tried on; empty for any other."""
    tried = newest()
    if version is None or version[: len(tried)] <= tried:
        return ""
    return (
        f"Linux {'.'.join(map(str, version))} is newer than any that was tried ({'.'.join(map(str, tried))}): "
        f"where its image does not tell, it is taken to be like that"
    )
