"""Builds EFI programs with named sections, for tests: the headers of the PE format, as its specification has them.

Shares no code with the reader.
"""

from __future__ import annotations

import struct

ALIGN = 0x200


def program(sections: dict[str, bytes], *, machine: int = 0x8664, stub: int = 0x80) -> bytes:
    """A PE32+ file; each section's bytes are padded to 512 in the file, as linkers do."""
    optional = 112
    headers = stub + 4 + 20 + optional + 40 * len(sections)
    at = -(-headers // ALIGN) * ALIGN
    out = bytearray(b"MZ" + bytes(0x3A) + struct.pack("<I", stub))
    out += bytes(stub - len(out)) + b"PE\0\0"
    out += struct.pack("<HHIIIHH", machine, len(sections), 0, 0, 0, optional, 0x22E)
    out += struct.pack("<H", 0x20B) + bytes(optional - 2)
    body = b""
    for name, data in sections.items():
        size = -(-len(data) // ALIGN) * ALIGN
        place = (len(data), 0x1000 + at + len(body), size, at + len(body))
        out += struct.pack("<8sIIII12xI", name.encode(), *place, 0x60000020)
        body += data + bytes(size - len(data))
    return bytes(out) + bytes(at - len(out)) + body
