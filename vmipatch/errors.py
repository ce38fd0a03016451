"""Every error that a user can meet, each with the place where it happened.

Imports nothing of the package.  The command line prints ``str(error)`` as one
line and exits with :attr:`VmipatchError.exit_status`; a library caller reads
the attributes.
"""

from __future__ import annotations

from os import PathLike, fspath


class VmipatchError(Exception):
    """Unusable input or wrong use; the base of every error of ours.

    ``file`` is a path as the user gave it, ``section`` the name of an ELF
    section (or a table of a spec), ``offset`` a file offset in bytes,
    ``address`` a virtual address, ``line`` a line number from 1.
    """

    exit_status = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        section: str | None = None,
        offset: int | None = None,
        address: int | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else fspath(file)
        self.section = section
        self.offset = offset
        self.address = address
        self.line = line

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        parts = [place] if place else []
        if self.section is not None:
            parts.append(self.section)
        if self.offset is not None:
            parts.append(f"offset {self.offset:#x}")
        if self.address is not None:
            parts.append(f"address {self.address:#x}")
        text = " ".join(self.message.split())
        return f"{', '.join(parts)}: {text}" if parts else text

    def at(
        self,
        *,
        file: str | PathLike[str] | None = None,
        section: str | None = None,
    ) -> VmipatchError:
        """Fill in a place that the raiser could not know; returns ``self``."""
        if self.file is None and file is not None:
            self.file = fspath(file)
        if self.section is None:
            self.section = section
        return self


class UsageError(VmipatchError):
    """Options that contradict each other, or a name that does not exist."""


class ImageError(VmipatchError):
    """A file that is not a kernel image we can read, or is damaged."""


class AddressError(ImageError):
    """An address or an offset that the image does not hold."""


class TableError(VmipatchError):
    """An annotation table that fits no layout, or one of its entries."""


class PatchError(VmipatchError):
    """A site that cannot be patched, or a patch that was refused."""


class AssemblyError(VmipatchError):
    """Assembly text that does not assemble to what it says."""


class SpecError(VmipatchError):
    """A file of ``specs/`` (or a user's own) that is wrong."""


class RomError(VmipatchError):
    """An option ROM that is damaged, does not fit or cannot be used here."""


class EmulatorError(VmipatchError):
    """A machine that cannot be set up, or an engine used wrongly."""
