"""A running kernel as one of its modules sees it: the same memory, and addresses that are those of the running kernel.

What explains a kernel's own text works with addresses as linked; a module is linked when it is loaded, so
that both are one.  Imports its sisters.
"""

from __future__ import annotations

from functools import cached_property

from vmipatch.explain.modules.placement import Kernel, PlacedModule
from vmipatch.explain.running import Running


class Inside(Running):
    """The memory around a placed module; ``slide`` is 0 whatever the kernel was moved by."""

    def __init__(self, kernel: Kernel, image: PlacedModule) -> None:
        super().__init__(image, kernel.running.memory, 0, kernel.running.shift, kernel.running.how)
        self._kernel = kernel

    def read(self, address: int, length: int) -> bytes | None:
        """Bytes at a running address; None where the dump lacks any of them."""
        return self.read_running(address, length)

    def read_running(self, address: int, length: int) -> bytes | None:
        """See :meth:`read`."""
        return b"" if length <= 0 else self._kernel.view.read(address, length)

    def virtual_of(self, offset: int) -> int | None:
        """See :meth:`Running.virtual_of`."""
        return self._kernel.running.virtual_of(offset)

    @cached_property
    def direct_map(self) -> int | None:
        """See :attr:`Running.direct_map`."""
        return self._kernel.running.direct_map
