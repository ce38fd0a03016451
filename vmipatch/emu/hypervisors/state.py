"""The state page at ``virtual_top``, which guest and hypervisor share: fields by the names of the ROM.

May import layout.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmipatch.emu.hypervisors.layout import PAGE, HostMemory
from vmipatch.rombuild.inspect import Field


class StatePage:
    """One virtual processor's page; every field is a little-endian number."""

    def __init__(self, memory: HostMemory, physical: int, fields: Iterable[Field]) -> None:
        self._memory = memory
        self.physical = physical
        self._fields = {field.name: (physical + field.offset, field.size) for field in fields}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def get(self, name: str) -> int:
        """The field's value; 0 where the ROM has no such field."""
        place, size = self._fields.get(name, (0, 0))
        return int.from_bytes(self._memory.read(place, size), "little") if size else 0

    def values(self, names: Iterable[str]) -> dict[str, int]:
        """Several fields at once, each as :meth:`get` gives it."""
        page, first, found = self._memory.read(self.physical, PAGE), self.physical, {}
        for name in names:
            place, size = self._fields.get(name, (first, 0))
            found[name] = int.from_bytes(page[place - first : place - first + size], "little")
        return found

    def put(self, name: str, value: int) -> None:
        """Set a field; nothing happens where the ROM has none of that name."""
        place, size = self._fields.get(name, (0, 0))
        if size:
            self._memory.write(place, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))

    def get_table(self, name: str) -> tuple[int, int]:
        """A descriptor table register field: base, limit."""
        value = self.get(name)
        return value >> 16, value & 0xFFFF

    def put_table(self, name: str, base: int, limit: int) -> None:
        """Set a descriptor table register field."""
        self.put(name, limit & 0xFFFF | base << 16)
