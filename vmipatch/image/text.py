"""Names out of a file, made fit for messages and terminals.  Imports nothing of the package."""

from __future__ import annotations


def printable(raw: bytes) -> str:
    """The text of a name; what is no UTF-8 or does not print (line ends, escapes) becomes ``?`` or U+FFFD."""
    text = raw.decode("utf-8", "replace")
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
