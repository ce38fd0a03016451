"""The kernel's text while it is being patched: the image with what earlier patches wrote laid over it."""

from __future__ import annotations

from vmipatch.image import Image


class Text:
    """Reads the image's bytes through the patches made so far."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.written: dict[int, int] = {}

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a virtual address as they are now; :class:`AddressError` outside the image."""
        data = self.image.read(address, length)
        written = self.written
        if not written:
            return data
        if length == 1:
            return bytes((written.get(address, data[0]),))
        touched = [i for i in range(length) if address + i in written]
        if not touched:
            return data
        changed = bytearray(data)
        for i in touched:
            changed[i] = written[address + i]
        return bytes(changed)

    def write(self, address: int, new: bytes) -> None:
        """Lay bytes over the image at a virtual address."""
        for i, byte in enumerate(new):
            self.written[address + i] = byte
