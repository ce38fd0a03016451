"""From a file to an :class:`Image`: what container it is, decided by its content and never by its name.

Imports errors and its sisters in ``image/``.
"""

from __future__ import annotations

import os
import stat
from mmap import ACCESS_READ, mmap
from os import PathLike, fspath

from vmipatch.errors import ImageError
from vmipatch.image import elf
from vmipatch.image.image import Image


def open_image(path: str | PathLike[str]) -> Image:
    """Open a kernel image.

    Raises :class:`ImageError` when the file cannot be read or is none of these.
    """
    name = fspath(path)
    file = _map(name)
    headers = elf.parse(file, name)
    return Image(
        path=name,
        container="elf",
        bits=headers.bits,
        data=file,
        file=file,
        sections=headers.sections,
        segments=headers.segments,
    )


def _map(path: str) -> mmap:
    try:
        # O_NONBLOCK: a pipe must be refused below, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file", file=path)
            if status.st_size == 0:
                raise ImageError("the file is empty", file=path, offset=0)
            return mmap(descriptor, 0, access=ACCESS_READ)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"cannot read the file: {getattr(error, 'strerror', None) or error}", file=path
        ) from error
