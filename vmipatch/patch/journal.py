"""The journal beside a patched file: every byte that changed, and what is needed to give the original back."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmipatch.errors import PatchError
from vmipatch.patch.files import Staged, write_all

SCHEMA = "vmipatch.journal/1"


@dataclass(frozen=True, slots=True)
class Change:
    """A run of changed bytes: ``offset`` into the patched file, ``address`` virtual, the cause of its first byte."""

    offset: int
    address: int
    old: str
    new: str
    family: str
    op: str
    reason: str


@dataclass(frozen=True, slots=True)
class Journal:
    """What was done to a file.

    ``original`` and ``patched`` are SHA-256 sums; ``container`` what went in
    (``elf``, ``bzimage``, ``raw``) and ``container_data`` its bytes in base64 where the
    patched file is not the same file with some bytes changed.  ``target`` is what
    it was patched for; ``sealed`` whether the kernel will not patch again.
    """

    file: str
    container: str
    original: str
    patched: str
    changes: list[Change]
    target: dict[str, Any] = field(default_factory=dict)
    sealed: bool = False
    container_data: str = ""

    def container_bytes(self) -> bytes:
        """The container that went in, where it was kept."""
        return b64decode(self.container_data)


def path_of(patched: Path) -> Path:
    """``OUT`` to ``OUT.journal.json``."""
    return patched.with_name(patched.name + ".journal.json")


def keep(data: bytes) -> str:
    """Bytes as the journal holds them."""
    return b64encode(data).decode("ascii")


def stage(journal: Journal, patched: Path) -> Staged:
    """The journal of a patched file, written and not yet in its place beside it."""
    record = {name: getattr(journal, name) for name in Journal.__slots__}
    # Half surrogate pairs, which stand for bytes that are no UTF-8, are JSON that many readers refuse.
    record["file"] = os.fsencode(journal.file).decode("utf-8", "backslashreplace")
    record["changes"] = [
        {**{name: getattr(change, name) for name in Change.__slots__}, "address_hex": f"{change.address:#x}"}
        for change in journal.changes
    ]
    text = json.dumps({"schema": SCHEMA, **record})
    return Staged(path_of(patched), lambda fd: write_all(fd, text.encode()))


def read(patched: Path) -> Journal:
    """The journal of a patched file; :class:`PatchError` if there is none or it is damaged."""
    path = path_of(patched)
    try:
        raw = json.loads(path.read_text("utf-8"))
        if raw.pop("schema") != SCHEMA:
            raise PatchError("not a journal of a version that we know", file=path)
        changes = [Change(**{k: v for k, v in row.items() if k != "address_hex"}) for row in raw.pop("changes")]
        for change in changes:
            if len(bytes.fromhex(change.old)) != len(bytes.fromhex(change.new)) or change.offset < 0:
                raise ValueError("a change whose sides differ in length")
        journal = Journal(changes=changes, **raw)
        journal.container_bytes()
        return journal
    except FileNotFoundError:
        raise PatchError("no journal beside the file: it was not patched by vmipatch", file=path) from None
    except (
        OSError,
        UnicodeDecodeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        Base64Error,
    ) as error:
        raise PatchError(f"the journal is damaged: {error}", file=path) from error
