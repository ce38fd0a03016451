"""Writing a plan into a file and taking it back: only bytes that change, whole or not at all."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from vmipatch.errors import PatchError
from vmipatch.image import Image
from vmipatch.image.repack import repack as repack_image
from vmipatch.patch import journal, slide
from vmipatch.patch.files import Staged, write_all
from vmipatch.patch.journal import Change, Journal
from vmipatch.patch.patch import Plan


def changes_of(image: Image, plan: Plan) -> list[Change]:
    """The bytes that a plan changes, in runs, by offset in the image's data."""
    runs: list[Change] = []
    old, new = bytearray(), bytearray()
    start = previous = -2
    first = None
    for address, (was, becomes, patch) in [*sorted(plan.changes().items()), (None, (0, 0, None))]:
        if first is not None and (address != previous + 1 or patch is not first):
            cause = first.cause
            runs.append(
                Change(image.offset_of(start), start, old.hex(), new.hex(), cause.family, cause.op, cause.reason)
            )
            old, new, first = bytearray(), bytearray(), None
        if address is None or patch is None:
            break
        if first is None:
            start, first = address, patch
        old.append(was)
        new.append(becomes)
        previous = address
    return runs


def apply(
    image: Image,
    plan: Plan,
    output: str | PathLike[str],
    *,
    target: Mapping[str, Any] | None = None,
    sealed: bool = False,
    repack: bool = False,
) -> Journal:
    """Write the patched image to ``output`` and its journal beside it.

    A bzImage becomes the unpacked ELF, or with ``repack`` a bzImage again, its
    relocation table corrected.  ``output`` may be the image's own file;
    ``target`` is what the journal says of the plan's target.

    Raises :class:`PatchError` where the file's bytes are neither the old nor the
    new ones, where they could not be written, and for a module (its relocations
    would be applied over the patched bytes when it is loaded).
    """
    if image.container == "module":
        raise PatchError("a module is patched by the kernel that loads it, after its relocations", file=image.path)
    output = Path(output)
    changes = changes_of(image, plan)
    source = Path(image.path)
    same_file = image.compression is None
    if output.exists() and source.exists() and output.samefile(source):
        _refuse_second(output, image)
    packed = _packed(image, plan, changes, source) if repack else None
    with memoryview(image.data) as data:
        before = sha256(data).hexdigest()
        patched = _patched_sum(data, changes) if packed is None else sha256(packed).hexdigest()
    done = Journal(
        file=image.path,
        container=image.container,
        original=before if same_file else image.sha256(),
        patched=patched,
        changes=changes,
        target=dict(target or {}),
        sealed=sealed,
        container_data="" if same_file else journal.keep(source.read_bytes()),
    )
    with (
        Staged(output, lambda fd: _write(fd, image, changes, output, packed), like=os.stat(source)) as staged,
        journal.stage(done, output) as staged_journal,
    ):
        # The journal first: if the machine stops between the two, the file is still the old one, whole.
        staged_journal.commit()
        staged.commit()
    return done


def _refuse_second(output: Path, image: Image) -> None:
    if journal.path_of(output).exists() and journal.read(output).patched == image.sha256():
        raise PatchError("already patched; restore it first, its journal holds the original", file=output)


def _patched_sum(data: memoryview, changes: list[Change]) -> str:
    digest, position = sha256(), 0
    for change in changes:
        digest.update(data[position : change.offset])
        digest.update(bytes.fromhex(change.new))
        position = change.offset + len(change.new) // 2
    digest.update(data[position:])
    return digest.hexdigest()


def _packed(image: Image, plan: Plan, changes: list[Change], source: Path) -> bytes:
    data = bytearray(image.data)
    for change in changes:
        new = bytes.fromhex(change.new)
        data[change.offset : change.offset + len(new)] = new
    slide.adjusted(image, plan, data)
    return repack_image(image, source.read_bytes(), bytes(data))


def _write(descriptor: int, image: Image, changes: list[Change], output: Path, packed: bytes | None) -> None:
    if packed is not None:
        write_all(descriptor, packed)
        return
    with memoryview(image.data) as data:
        write_all(descriptor, data)
    if not changes:
        return
    with mmap.mmap(descriptor, 0) as memory:
        rewrite(memory, changes, output)
        memory.flush()


def rewrite(memory: mmap.mmap, changes: list[Change], file: Path) -> None:
    """Make the changes in mapped memory and read each back.

    A place that already holds the new bytes is left; one that holds neither the
    old nor the new raises :class:`PatchError`.
    """
    for change in changes:
        old, new = bytes.fromhex(change.old), bytes.fromhex(change.new)
        place = slice(change.offset, change.offset + len(old))
        found = memory[place]
        if found == new:
            continue
        if found != old:
            raise PatchError(
                f"found {found.hex(' ')}, which is neither the old {old.hex(' ')} nor the new {new.hex(' ')}",
                file=file, offset=change.offset, address=change.address,
            )  # fmt: skip
        memory[place] = new
        if memory[place] != new:
            raise PatchError("read back what was not written", file=file, offset=change.offset)


def restore(patched: str | PathLike[str], output: str | PathLike[str] | None = None) -> Path:
    """Give back what went in, byte for byte, from the journal beside ``patched``.

    Without ``output`` the patched file itself is replaced, and its journal
    removed.  Raises :class:`PatchError` if the file is not the one that the
    journal describes, or its bytes are not those that were written.
    """
    patched = Path(patched)
    record = journal.read(patched)
    try:
        current = patched.read_bytes()
    except OSError as error:
        raise PatchError(f"cannot read: {error.strerror}", file=patched) from error
    found = sha256(current).hexdigest()
    if found not in (record.patched, record.original):
        raise PatchError("changed since it was patched: the journal describes another file", file=patched)
    if record.container_data:
        original = record.container_bytes()
    else:
        memory = bytearray(current)
        for change in record.changes:
            old = bytes.fromhex(change.old)
            memory[change.offset : change.offset + len(old)] = old
        original = bytes(memory)
    if sha256(original).hexdigest() != record.original:
        raise PatchError("the journal does not give the original back: its sum differs", file=patched)
    goal = patched if output is None else Path(output)
    with Staged(goal, lambda fd: write_all(fd, original), like=os.stat(patched)) as staged:
        staged.commit()
    if output is None:
        journal.path_of(patched).unlink(missing_ok=True)
    return goal
