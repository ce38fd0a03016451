"""What two boots print, compared line by line but for what their back ends and clocks say by nature.

May import facts.  Those lines are data, for each release (specs/guests/consoles.toml).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from vmipatch import facts

NATIVE, ROM = "native", "rom"
MASK = b"\xe2\x80\xa6"  # an ellipsis in UTF-8
NATURES = ("rom", "native", "any", "both")


@dataclass(frozen=True)
class Line:
    """One kind of line: ``where`` is rom, native, any or both; of one in both, the groups are not compared."""

    match: re.Pattern[bytes]
    where: str
    of: str


@dataclass(frozen=True)
class Known:
    """The lines that one kernel is known to print otherwise: its printk's time stamp, and the kinds."""

    stamp: re.Pattern[bytes]
    lines: tuple[Line, ...]

    def reduce(self, console: bytes, boot: str) -> list[bytes]:
        """What is to be compared of a console, of a boot that is ``native`` or on a ``rom``."""
        found = []
        for raw in console.removesuffix(b"\n").split(b"\n") if console else ():
            stamp = self.stamp.match(raw)
            text = (raw[stamp.end() :] if stamp else raw).rstrip()
            compared = self._reduced(text, boot)
            if compared is not None:
                found.append(compared)
        return found

    def _reduced(self, text: bytes, boot: str) -> bytes | None:
        for line in self.lines:
            found = line.match.fullmatch(text)
            if found is None:
                continue
            if line.where == "both":
                for group in range(found.re.groups, 0, -1):
                    begin, end = found.span(group)
                    if begin >= 0:
                        text = text[:begin] + MASK + text[end:]
                return text
            return None if line.where in ("any", boot) else text
        return text


def known(release: Sequence[int] | None) -> Known:
    """What is known of a kernel of that release; None: of a guest that does not say."""
    spec = facts.load("guests", "consoles")
    lines = []
    for row in spec["line"]:
        if "since" in row and not _among(release, row["since"], row["until"]):
            continue
        lines.append(Line(re.compile(row["match"].encode()), row["where"], row["of"]))
    return Known(re.compile(spec["stamp"].encode()), tuple(lines))


def _among(release: Sequence[int] | None, since: str, until: str) -> bool:
    if release is None:
        return False
    low, high = (tuple(int(part) for part in text.split(".")) for text in (since, until))
    return low <= tuple(release) < high


def first_difference(native: bytes, other: bytes, of: Known) -> str:
    """The first line that differs, in words; empty if none does. ``other`` is the console of a boot on a ROM."""
    a, b = of.reduce(native, NATIVE), of.reduce(other, ROM)
    for number, (left, right) in enumerate(zip_longest(a, b), 1):
        if left is None or right is None:
            alone, extra = ("native", left) if right is None else ("patched", right)
            return f"the {alone} console alone goes on: {_text(extra or b'')!r}"
        if left != right:
            return f"console line {number}: {_text(left)!r} natively, {_text(right)!r} here"
    return ""


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
