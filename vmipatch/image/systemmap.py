"""System.map: one line a symbol, address, kind letter and name, as ``nm`` prints them.  Imports errors."""

from __future__ import annotations

import os
import re
from itertools import islice
from os import PathLike

from vmipatch.errors import ImageError
from vmipatch.image.text import printable

_LINE = re.compile(rb"^([0-9a-fA-F]{8,16}) ([A-Za-z?]) ([^\s]{1,512})(?:\t\[[^\]\n]*\])?\r?$", re.MULTILINE)
# A kernel with all its static data has a quarter of a million symbols, in 10 MB of text.
_MAX_SIZE = 1 << 25
_MAX_SYMBOLS = 1 << 19


def read(path: str | PathLike[str]) -> list[tuple[int, int, str, str]]:
    """Virtual address, rank, kind letter and name of every symbol in the file.

    Raises :class:`ImageError` for a file that cannot be read or names nothing,
    as the placeholder does that distributions install instead of the map.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_SIZE:
                raise ImageError(f"more than {_MAX_SIZE} bytes are no System.map", file=path)
            text = file.read(_MAX_SIZE)
    except OSError as error:
        raise ImageError(f"cannot read the System.map: {error.strerror}", file=path) from error
    matches = [match.groups() for match in islice(_LINE.finditer(text), _MAX_SYMBOLS + 1)]
    if not matches:
        raise ImageError("no line of it is a symbol: not a System.map, or a placeholder for one", file=path)
    if len(matches) > _MAX_SYMBOLS:
        raise ImageError(f"more than {_MAX_SYMBOLS} symbols are no System.map", file=path)
    return [
        (int(address, 16), 0 if letter.isupper() else 1, letter.decode(), printable(name))
        for address, letter, name in matches
    ]
