"""A guest behind VMI_Init as a mainline kernel is, for the tests of what such kernels demand.

May import pagedguest. SetLinearMapping is told as vmi_bringup tells it.
"""

from __future__ import annotations

import pytest
from pagedguest import BASE, DEPRIVILEGED, PagedGuest

ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
PT, PD, PDP, PAE, CLONE, ZEROED = 1, 2, 4, 0x10, 0x20, 0x40  # VMI_PAGE_* (2.6.32, asm/vmi.h)
FREE = 0x300000  # physical pages that nothing uses
GP, PF = 13, 14


def started(hypervisor: str, *, pae: bool = False, interrupts: bool = False) -> PagedGuest:
    guest = PagedGuest(hypervisor, pae=pae)
    guest.cpu.set("eflags", 0x202 if interrupts else 2)
    begin(guest)
    return guest


def begin(guest: PagedGuest) -> None:
    """VMI_Init, and the direct map."""
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x1000)


def called(guest: PagedGuest, name: str, *stack: int, **registers: int) -> None:
    """A call of the ROM that comes back."""
    outcome = guest.call(name, *stack, **registers)
    assert outcome.reason == "breakpoint", (outcome, guest.personality.violation)


def ran(guest: PagedGuest, text: str | bytes, limit: int = 2000, **registers: int) -> None:
    """Code of the kernel's that comes to its end."""
    outcome = guest.run(text, limit=limit, **registers)
    assert outcome.reason == "breakpoint", (outcome, guest.personality.violation)
