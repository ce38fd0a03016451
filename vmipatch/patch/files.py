"""Files that are whole or not there: written unnamed beside their target, synced, then renamed over it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vmipatch.errors import PatchError


class Staged:
    """A new file for ``target``, written and synced but not yet in its place.

    The file has no name until :meth:`commit` (Linux ``O_TMPFILE``; elsewhere a
    hidden one), so that a process that is killed while it writes leaves nothing.
    ``fill`` gets a descriptor open for reading and writing; ``like`` gives mode and
    owner.  A context manager: what was not committed is gone at its end.  Raises
    :class:`PatchError` for what the system refuses (read-only target, full disk).
    """

    def __init__(self, target: Path, fill: Callable[[int], None], *, like: os.stat_result | None = None) -> None:
        self.target = target
        self._temporary = target.parent / f".{target.name}.{os.getpid()}.new"
        self._descriptor = -1
        self._named = False
        try:
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(13, os.strerror(13))
            self._open()
            fill(self._descriptor)
            if like is not None:
                os.fchmod(self._descriptor, like.st_mode & 0o7777)
                with suppress(PermissionError):
                    os.fchown(self._descriptor, like.st_uid, like.st_gid)
            os.fsync(self._descriptor)
        except OSError as error:
            self.close()
            raise PatchError(f"cannot write: {error.strerror}", file=target) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        folder = self.target.parent
        if os.path.exists("/proc/self/fd") and hasattr(os, "O_TMPFILE"):
            with suppress(OSError):
                self._descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
                return
        self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._named = True

    def commit(self) -> None:
        """Put the file in its place, over whatever is there."""
        try:
            if not self._named:
                self._temporary.unlink(missing_ok=True)
                # Naming a folder makes Python call linkat(2), which alone follows the link in /proc.
                source = f"/proc/self/fd/{self._descriptor}"
                os.link(source, self._temporary, src_dir_fd=self._descriptor, follow_symlinks=True)
                self._named = True
            os.replace(self._temporary, self.target)
            self._named = False
            folder = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise PatchError(f"cannot write: {error.strerror}", file=self.target) from error

    def close(self) -> None:
        """Drop the file if it is not in its place."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._named:
            self._temporary.unlink(missing_ok=True)
            self._named = False

    def __enter__(self) -> Staged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte (one call may write fewer)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
