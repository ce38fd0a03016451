"""A bzImage: its setup header, where its payload is, and the payload unpacked.

Header fields: Documentation/arch/x86/boot.rst.  Imports errors and
image.decompress.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap

from vmipatch.errors import ImageError
from vmipatch.image import decompress
from vmipatch.image.search import find_all

_SETUP_SECTS, _BOOT_FLAG, _HDRS, _VERSION, _PAYLOAD_OFFSET = 0x1F1, 0x1FE, 0x202, 0x206, 0x248
_SECTOR = 512
_DEFAULT_SETUP_SECTS = 4
# In a bzImage without payload_offset: how many places are tried for each format, and how large
# a kernel of that age can be.
_MAX_TRIES = 6
_MAX_OLD = 1 << 25


@dataclass(frozen=True, slots=True)
class Payload:
    """Where in the bzImage the compressed kernel is.

    ``offset`` and ``length`` are bytes of the file, the size suffix included;
    ``length`` is None where the header does not say it.  ``protocol`` is the
    boot protocol's version (0x020F is 2.15).  ``begin`` and ``end`` are where the
    bzImage itself lies in the file: all of it (``end`` is None) but in a unified kernel image.
    ``container`` is which of the two it is: ``bzimage`` or ``uki``.
    """

    offset: int
    length: int | None
    compression: str
    protocol: int
    begin: int = 0
    end: int | None = None
    container: str = "bzimage"


def is_bzimage(data: bytes | mmap) -> bool:
    """Whether a file starts with the setup code of a Linux boot protocol 2.00 or later."""
    return data[_BOOT_FLAG : _BOOT_FLAG + 2] == b"\x55\xaa" and data[_HDRS : _HDRS + 4] == b"HdrS"


def unpack(data: bytes | mmap, path: str) -> tuple[Payload, bytes]:
    """The payload and what it unpacks to.

    Raises :class:`ImageError` if the header points outside the file, the
    format is unknown, or the payload is damaged, cut short or not of the size
    that its last four bytes say.
    """
    head = data[: _PAYLOAD_OFFSET + 8]
    if len(head) < _VERSION + 2:
        raise ImageError("cut short in the setup header", file=path, offset=len(data))
    protocol = int.from_bytes(head[_VERSION : _VERSION + 2], "little")
    code = ((head[_SETUP_SECTS] or _DEFAULT_SETUP_SECTS) + 1) * _SECTOR
    if code >= len(data):
        raise ImageError("cut short before the protected-mode code", file=path, offset=len(data))
    if protocol >= 0x208 and len(head) == _PAYLOAD_OFFSET + 8:
        offset, length = struct.unpack_from("<II", head, _PAYLOAD_OFFSET)
        if length:
            return _declared(data, path, protocol, code + offset, length)
    return _searched(data, path, protocol, code)


def _declared(data: bytes | mmap, path: str, protocol: int, offset: int, length: int) -> tuple[Payload, bytes]:
    if offset + length > len(data):
        raise ImageError(
            f"the payload of {length} bytes reaches past the end of the file ({len(data)} bytes)",
            file=path, offset=offset,
        )  # fmt: skip
    packed = data[offset : offset + length]
    format = decompress.sniff(packed[:16])
    if format is None:
        raise ImageError(f"a payload of unknown format ({packed[:6].hex(' ')})", file=path, offset=offset)
    declared = int.from_bytes(packed[-4:], "little")
    if declared > decompress.MAX_UNPACKED:
        raise ImageError(f"a payload of {declared} bytes is more than any kernel", file=path, offset=offset)
    # gzip's own last four bytes are the size; the other formats end before theirs.
    stream = packed if format == "gzip" else packed[:-4]
    unpacked = decompress.unpack(stream, format, file=path, offset=offset, limit=declared)
    if len(unpacked) != declared:
        raise ImageError(
            f"the payload unpacks to {len(unpacked)} bytes, its size suffix says {declared}",
            file=path, offset=offset,
        )  # fmt: skip
    return Payload(offset, length, format, protocol), unpacked


def _searched(data: bytes | mmap, path: str, protocol: int, code: int) -> tuple[Payload, bytes]:
    """The payload where no header says its place: protocol before 2.08, Linux before 2.6.26."""
    last: ImageError | None = None
    # Those kernels are gzip or, with patches of the time, one of the others.
    for format in ("gzip", "bzip2", "lzma"):
        for offset in find_all(data, decompress.MAGICS[format], code, len(data), limit=_MAX_TRIES):
            packed = data[offset:]
            try:
                unpacked = decompress.unpack(packed, format, file=path, offset=offset, limit=_MAX_OLD)
            except ImageError as error:
                last = error
                continue
            # A kernel of less than this is a magic number that stood there by chance.
            if len(unpacked) >= 1 << 16:
                return Payload(offset, None, format, protocol), unpacked
    raise ImageError("no payload is found in this bzImage", file=path, offset=code) from last
