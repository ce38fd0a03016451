"""Report files: whole or not there.  Imports patch.files and errors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vmipatch.errors import UsageError
from vmipatch.patch.files import Staged, write_all


def write_text(target: Path, text: str | Iterable[str]) -> None:
    """Write a text file, UTF-8, in one step: readers see the old file or the new one, never a part.

    ``text`` may come in pieces.  A symbolic link keeps pointing where it points; what is no regular file (a pipe,
    ``/dev/stdout``) is written to as it is.  Raises :class:`VmipatchError` for what the system refuses.
    """
    pieces = (text,) if isinstance(text, str) else text
    data = (piece.encode("utf-8", "backslashreplace") for piece in pieces)
    real = Path(os.path.realpath(target))
    if real.exists() and not real.is_file():
        try:
            with target.open("wb") as file:
                file.writelines(data)
        except OSError as error:
            raise UsageError(f"cannot write: {error.strerror}", file=target) from error
        return

    def fill(descriptor: int) -> None:
        for piece in data:
            write_all(descriptor, piece)

    like = real.stat() if real.exists() else None
    with Staged(real, fill, like=like) as staged:
        staged.commit()
