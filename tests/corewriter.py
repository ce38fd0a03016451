"""ELF core files, written from the System V gABI, chapter 5."""

from __future__ import annotations

import struct
from collections.abc import Sequence

LOAD, NOTE = 1, 4


def note(name: bytes, kind: int, body: bytes) -> bytes:
    padded = name + b"\0"
    return (
        struct.pack("<III", len(padded), len(body), kind)
        + padded.ljust(len(padded) + 3 & ~3, b"\0")
        + body.ljust(len(body) + 3 & ~3, b"\0")
    )


def core(
    loads: Sequence[tuple[int, int, bytes | memoryview]],
    notes: bytes = b"",
    *,
    bits: int = 64,
    kind: int = 4,
    machine: int | None = None,
) -> bytes:
    """An ELF core: virtual address, physical address and bytes of each segment."""
    number = machine if machine is not None else 62 if bits == 64 else 3
    header, entry = (64, 56) if bits == 64 else (52, 32)
    at = header + entry * (len(loads) + 1)
    table = []
    for kind_of, virtual, physical, body in [(NOTE, 0, 0, notes), *((LOAD, *x) for x in loads)]:
        if bits == 64:
            table.append(struct.pack("<IIQQQQQQ", kind_of, 0, at, virtual, physical, len(body), len(body), 0))
        else:
            table.append(struct.pack("<8I", kind_of, at, virtual, physical, len(body), len(body), 0, 0))
        at += len(body)
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    form = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    head = struct.pack(form, kind, number, 1, 0, header, 0, 0, header, entry, len(table), 0, 0, 0)
    return ident + head + b"".join(table) + notes + b"".join(bytes(x[2]) for x in loads)
