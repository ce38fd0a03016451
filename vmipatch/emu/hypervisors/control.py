"""Control, debug and model-specific registers as the guest sees them, and as the processor has them.

May import violation.  What the guest sees of CR0 to CR4 stands in the state page; the processor's own CR3 is
the paging's, its SYSENTER_CS is 0 so that SYSENTER faults and the host takes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

PE, TS, ET, PG = 1, 8, 0x10, 0x8000_0000
PSE, PAE, PGE = 0x10, 0x20, 0x80
CR0_KNOWN = 0xE005_003F
MSR_TSC, MSR_APIC_BASE, MSR_EFER = 0x10, 0x1B, 0xC000_0080
SYSENTER = {0x174: "sysenter_cs", 0x175: "sysenter_esp", 0x176: "sysenter_eip"}
GENERAL_DETECT = 0x2000


class Control:
    """One virtual processor's system registers."""

    def __init__(self, owner: Base) -> None:
        self._owner = owner
        self._cpu = owner.machine.cpu
        self.sysenter = dict.fromkeys(SYSENTER.values(), 0)

    def begin(self) -> None:
        """Take over what the guest has set on the bare machine."""
        cpu, state = self._cpu, self._owner.state
        for name in ("cr0", "cr2", "cr3", "cr4"):
            state.put(name, cpu.get(name))
        for name in self.sysenter:
            self.sysenter[name] = cpu.get(name)
        cpu.set("sysenter_cs", 0)
        cpu.set("cr4", (cpu.get("cr4") | PSE | PGE) & cpu.cr4_allowed)

    # --- control registers --------------------------------------------------------------

    def set_cr0(self, value: int) -> None:
        """MOV CR0: everything but protection and paging themselves."""
        if value & (PE | PG) != PE | PG:
            raise Violation("paging-off", f"CR0 = {value:#x} turns protection or paging off")
        value = value & CR0_KNOWN | ET
        self._owner.state.put("cr0", value)
        if value != self._cpu.get("cr0"):
            self._cpu.set("cr0", value)

    def set_ts(self, on: bool) -> None:
        """CLTS, or the TS bit alone."""
        self.set_cr0(self._owner.state.get("cr0") & ~TS | (TS if on else 0))

    def set_cr3(self, value: int) -> None:
        """MOV CR3: another address space; every translation is forgotten."""
        self._owner.paging.switch(value)
        self._owner.state.put("cr3", value)

    def set_cr4(self, value: int) -> bool:
        """MOV CR4; False where the processor would fault."""
        if value & ~self._cpu.cr4_allowed:
            return False
        if bool(value & PAE) != self._owner.paging.pae:
            self._owner.paging.change_form(bool(value & PAE))
        self._owner.state.put("cr4", value)
        self._cpu.set("cr4", (value | PSE | PGE) & self._cpu.cr4_allowed)
        self._owner.paging.flush()
        return True

    def get(self, which: int) -> int:
        """CR0, CR2, CR3 or CR4 as the guest sees it."""
        return self._owner.state.get(f"cr{which}")

    # --- debug registers ----------------------------------------------------------------

    def set_dr(self, which: int, value: int) -> None:
        """A debug register; 4 and 5 are 6 and 7, and general detect stays off."""
        which = which & 7 | 2 if which & 7 in (4, 5) else which & 7
        if which == 6:
            value = value & 0xE00F | 0xFFFF_0FF0
        elif which == 7:
            value = value & 0xFFFF_0BFF & ~GENERAL_DETECT | 0x400
        self._cpu.set(f"dr{which}", value)

    def get_dr(self, which: int) -> int:
        """A debug register."""
        which = which & 7 | 2 if which & 7 in (4, 5) else which & 7
        return self._cpu.get(f"dr{which}")

    # --- model-specific registers ---------------------------------------------------------

    def read_msr(self, index: int) -> int | None:
        """RDMSR; None where the processor would fault."""
        cpu = self._cpu
        if index in SYSENTER:
            return self.sysenter[SYSENTER[index]]
        if index == MSR_TSC:
            return cpu.time_stamp()
        if index == MSR_EFER:
            return 0x800 * cpu.efer_nx if cpu.has_nx else None
        msrs: dict[int, int] = cpu.msrs  # type: ignore[assignment]
        return msrs.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        """WRMSR; False where the processor would fault."""
        cpu = self._cpu
        msrs: dict[int, int] = cpu.msrs  # type: ignore[assignment]
        if index in SYSENTER:
            name = SYSENTER[index]
            self.sysenter[name] = value & (0xFFFF if name == "sysenter_cs" else 0xFFFF_FFFF)
        elif index == MSR_TSC:
            now = cpu.time_stamp()
            cpu.tsc_adjust = _signed(value - now + cpu.tsc_adjust)
        elif index == MSR_EFER and cpu.has_nx:
            if value & ~0x800:
                return False
            cpu.efer_nx = value >> 11 & 1
        elif index in msrs:
            msrs[index] = value
            if index == MSR_APIC_BASE:
                self._owner.machine.bus.write_apic_base(value)
        else:
            return False
        return True

    def save(self) -> Any:
        """What is neither in the state page nor in the processor."""
        return dict(self.sysenter)

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned."""
        self.sysenter = dict(saved)


def _signed(value: int) -> int:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value
