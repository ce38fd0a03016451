"""The bare machine: nothing stands under the guest, and its ROM's stubs do what the processor does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmipatch.emu.hypervisors.base import OK, Base, native_view

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine


class Personality(Base):
    """No hypervisor at all, with the interface of one."""

    name = "native"

    def attach(self, machine: Machine, *, found: bool = True) -> None:
        """Stand by; there is nothing to do."""
        self.machine = machine
        self._hooked = frozenset()
        machine.personality = self

    def start(self, rom: int) -> int:
        """The native ROM's VMI_Init changes nothing."""
        return OK

    def view(self) -> dict[str, int]:
        """The system state of the processor."""
        return native_view(self.machine.cpu)

    def save(self) -> Any:
        """Nothing but the hooks."""
        return self._hooked

    def restore(self, saved: Any) -> None:
        """Nothing but the hooks."""
        hooked = frozenset() if saved is None else saved
        if hooked != self._hooked:
            self.set_hooks(hooked)
