"""Lays out kallsyms tables as each era's scripts/kallsyms.c does, for tests; shares no code with the reader.

``era`` is the kernel version from which a layout holds: ``2.6`` (markers of one
long, one-byte lengths), ``4.20`` (32-bit markers), ``6.2`` (symbol numbers by
name behind the markers), ``6.4`` (addresses and those numbers at the end), ``7.0``
(every part aligned to 4 bytes).  ``addresses`` is ``absolute``, ``relative``,
``percpu`` (relative with absolute per-cpu symbols) or ``self`` (32-bit
distances from each entry's own place, of 7.0).
"""

from __future__ import annotations

import itertools
import random
import struct
from collections import Counter

Symbol = tuple[int, str, str]


def symbols(count: int, base: int, *, seed: int = 0, percpu: int = 0, long_every: int = 0) -> list[Symbol]:
    """``count`` made-up symbols (address, kind, name) from ``base`` on, ``percpu`` of them from address 0."""
    dice = random.Random(seed)
    words = [
        "do",
        "sys_",
        "native_",
        "irq",
        "page",
        "init",
        "_free",
        "tcp",
        "mutex0",
        "lock1",
        "x86",
        "23",
        "45",
        "67",
        "89",
        "Read",
        "__",
        ".part",
    ]
    found = [(i * 64, "A", f"percpu_{i}") for i in range(percpu)]
    address = base
    for i in range(count - percpu):
        name = "".join(dice.choice(words) for _ in range(dice.randint(1, 6))) + f"_{i}"
        if long_every and i % long_every == 0:
            name += "".join(dice.choice("ghijkGHIJK") for _ in range(400))
        found.append((address, dice.choice("tTdDbBrRwW"), name))
        address += dice.choice((0, 16, 48, 4096))
    return found


def build(rows: list[Symbol], *, bits: int, addresses: str, era: str, place: int = 0) -> bytes:
    """The bytes of all tables in their order; to be placed at a multiple of 8, which ``place`` is the address of."""
    long = bits // 8
    version = tuple(map(int, era.split(".")))
    names, tokens = _compress([kind + name for _, kind, name in rows])

    where = _addresses([address for address, _, _ in rows], bits, addresses)
    blob = bytearray()
    markers = []
    for i, name in enumerate(names):
        if i % 256 == 0:
            markers.append(len(blob))
        if len(name) < 0x80:
            blob.append(len(name))
        else:
            assert version >= (4, 20), "longer names came with two-byte lengths"
            blob += bytes([len(name) & 0x7F | 0x80, len(name) >> 7])
        blob += name
    code = "Q" if long == 8 and version < (4, 20) else "I"
    by_name = sorted(range(len(rows)), key=lambda i: rows[i][2])
    parts = {
        "count": struct.pack("<I", len(rows)),
        "names": bytes(blob),
        "markers": struct.pack(f"<{len(markers)}{code}", *markers),
        "tokens": b"".join(t.encode() + b"\0" for t in tokens),
        "index": b"",
        "numbers": b"".join(i.to_bytes(3, "big") for i in by_name),
    }
    offsets = [sum(len(t) + 1 for t in tokens[:i]) for i in range(256)]
    parts["index"] = struct.pack("<256H", *offsets)
    order = ["count", "names", "markers", "numbers", "tokens", "index"]
    if version < (6, 2):
        order.remove("numbers")
    if version >= (6, 4):
        order.remove("numbers")
        pieces = [parts[p] for p in order] + where + [parts["numbers"]]
    else:
        pieces = where + [parts[p] for p in order]
    out = bytearray()
    for piece in pieces:
        out += bytes(-len(out) % (4 if version >= (7, 0) else long))
        if addresses == "self" and piece is where[0]:
            here = place + len(out)
            piece = struct.pack(f"<{len(rows)}i", *(a - here - 4 * i for i, (a, _, _) in enumerate(rows)))
        out += piece
    return bytes(out)


def _addresses(values: list[int], bits: int, kind: str) -> list[bytes]:
    code = "Q" if bits == 64 else "I"
    if kind == "self":
        return [b""]  # filled in where its own place is known
    if kind == "absolute":
        return [struct.pack(f"<{len(values)}{code}", *values)]
    absolute = [v for v in values if v < 0x40000000] if kind == "percpu" else []
    relative = values[len(absolute) :]
    base = relative[0]
    numbers = absolute + [base - v - 1 for v in relative] if kind == "percpu" else [v - base for v in relative]
    return [struct.pack(f"<{len(numbers)}i", *numbers), struct.pack(f"<{code}", base)]


def _compress(texts: list[str]) -> tuple[list[bytes], list[str]]:
    """Byte pairs that are met most become tokens, again and again, until the 40th."""
    coded = [list(t.encode()) for t in texts]
    tokens = [""] * 256
    for code in sorted({c for name in coded for c in name} | set(b"0123456789")):
        tokens[code] = chr(code)
    # The lowest codes too, which are also the second bytes of long lengths.
    free = [i for i in (*range(20), *range(255, 127, -1)) if not tokens[i]]
    for new in free[:40]:
        pairs = Counter(pair for name in coded for pair in itertools.pairwise(name))
        if not pairs:
            break
        first, second = pairs.most_common(1)[0][0]
        tokens[new] = tokens[first] + tokens[second]
        for name in coded:
            i = 0
            while i < len(name) - 1:
                if name[i] == first and name[i + 1] == second:
                    name[i : i + 2] = [new]
                i += 1
    return [bytes(name) for name in coded], tokens
