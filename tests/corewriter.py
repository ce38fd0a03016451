"""Dumps: ELF cores, from the System V gABI, chapter 5; compressed kdumps, from makedumpfile's IMPLEMENTATION."""

from __future__ import annotations

import struct
import zlib
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


PAGE = 4096
ZLIB, LZO, ZSTD = 1, 2, 0x20


def packed(page: bytes, how: int) -> bytes:
    if how == ZLIB:
        return zlib.compress(page)
    if how == ZSTD:
        import zstandard

        return zstandard.ZstdCompressor().compress(page)
    return page


def kdump(
    pages: dict[int, bytes], info: bytes = b"", notes: bytes = b"", *, bits: int = 64, how: int = ZLIB, bitmaps: int = 2
) -> bytes:
    """A compressed kdump of pages by frame number; pages of zeros share one descriptor's data."""
    most = max(pages) + 1
    bitmap = bytearray(-(-most // 8 // PAGE) * PAGE)
    for frame in pages:
        bitmap[frame // 8] |= 1 << frame % 8
    # struct disk_dump_header: signature, version, utsname of 6 * 65 bytes, a time, status, block_size, sub_hdr_size,
    # bitmap_blocks, max_mapnr.
    head = b"KDUMP   " + struct.pack("<i", 6) + bytes(390)
    head = head.ljust(408, b"\0") + bytes(16) if bits == 64 else head.ljust(404, b"\0") + bytes(8)
    head += struct.pack("<5I", 0, PAGE, 1, bitmaps * len(bitmap) // PAGE, most)
    # kdump_sub_header: phys_base, dump_level, split, two frame numbers, then VMCOREINFO and the notes.
    at = PAGE + 512
    if bits == 64:
        sub = struct.pack("<QIIQQ", 0, 31, 0, 0, 0) + struct.pack("<QQQQ", at, len(info), at + len(info), len(notes))
        sub = sub.ljust(96, b"\0") + struct.pack("<Q", most)
    else:
        sub = struct.pack("<IIIII", 0, 31, 0, 0, 0) + struct.pack("<QIQI", at, len(info), at + len(info), len(notes))
        sub = sub.ljust(72, b"\0") + struct.pack("<Q", most)
    start = 2 * PAGE + bitmaps * len(bitmap) + 24 * len(pages)
    table, data = b"", b""
    zero = None
    for frame in sorted(pages):
        page = pages[frame]
        if not any(page) and zero is not None:
            table += zero
            continue
        body = packed(page, how)
        smaller = len(body) < PAGE or how == LZO
        body = body if smaller else page
        row = struct.pack("<QIIQ", start + len(data), len(body), how if smaller else 0, 0)
        zero = row if not any(page) else zero
        table, data = table + row, data + body
    parts = head.ljust(PAGE, b"\0") + (sub.ljust(512, b"\0") + info + notes).ljust(PAGE, b"\0")
    return parts + bytes(bitmap) * bitmaps + table + data


def flattened(data: bytes, piece: int = 5000) -> bytes:
    """The same as a list of pieces, out of order, the first of them written twice; pieces of zeros are left out."""
    starts = list(range(0, len(data), piece))
    order = [0, *reversed(starts)]
    out = b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)
    out = out.ljust(PAGE, b"\0")
    for number, at in enumerate(order):
        body = data[at : at + piece] if number else bytes(piece)
        if number and not any(body):
            continue
        out += struct.pack(">qq", at, len(body)) + body
    return out + struct.pack(">qq", -1, -1)
