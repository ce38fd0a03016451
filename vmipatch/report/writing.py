"""Report files: whole or not there.  Imports patch.files and errors."""

from __future__ import annotations

import os
from pathlib import Path

from vmipatch.errors import UsageError
from vmipatch.patch.files import Staged, write_all


def write_text(target: Path, text: str) -> None:
    """Write a text file, UTF-8, in one step: readers see the old file or the new one, never a part.

    A symbolic link keeps pointing where it points; what is no regular file (a pipe, ``/dev/stdout``) is
    written to as it is.  Raises :class:`VmipatchError` for what the system refuses.
    """
    data = text.encode("utf-8", "backslashreplace")
    real = Path(os.path.realpath(target))
    if real.exists() and not real.is_file():
        try:
            with target.open("wb") as file:
                file.write(data)
        except OSError as error:
            raise UsageError(f"cannot write: {error.strerror}", file=target) from error
        return
    like = real.stat() if real.exists() else None
    with Staged(real, lambda descriptor: write_all(descriptor, data), like=like) as staged:
        staged.commit()
