"""A guest that breaks the rules of its hypervisor.  Imports nothing of the package."""

from __future__ import annotations


class Violation(Exception):
    """Raised while the host works for the guest: the guest is stopped, and this is the reason.

    ``rule`` is a stable name: ``hole-write``, ``forged-page-table``, ``bad-pointer``, ``ring-0``,
    ``bad-call``, ``bad-descriptor``, ``paging-off``.  ``address`` is a linear address, or None.
    """

    def __init__(self, rule: str, message: str, address: int | None = None) -> None:
        super().__init__(message)
        self.rule = rule
        self.message = message
        self.address = address

    def __str__(self) -> str:
        place = "" if self.address is None else f" (address {self.address:#x})"
        return f"{self.rule}: {self.message}{place}"

    def to_json(self) -> dict[str, str | int | None]:
        """As in the documents of ``run`` and ``validate``: rule, message, address."""
        shown = None if self.address is None else f"{self.address:#x}"
        return {"rule": self.rule, "message": self.message, "address": self.address, "address_hex": shown}


class NotMapped(Violation):
    """A table of the guest's that the processor would read when it is used, at an address that is not mapped.

    While the guest runs under the hypervisor it is no violation: the guest gets a page fault, and the call is made
    again. Linux maps vmalloc's memory, where large LDTs are, address space by address space in its fault handler.
    """

    def __init__(self, what: str, address: int) -> None:
        super().__init__("bad-pointer", f"{what}: not mapped", address)
        self.linear = address
