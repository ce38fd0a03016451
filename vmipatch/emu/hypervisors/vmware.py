"""VMware: everything through the backdoor port (Linux 2.6.32, arch/x86/include/asm/vmware.h).

The gate behind command 0x564D is this project's; GETVERSION and GETHZ are VMware's.
"""

from __future__ import annotations

from vmipatch.emu.hypervisors.base import Base

GETVERSION, GETHZ = 10, 45
PRODUCT_VERSION = 6


class Personality(Base):
    """The guest reads port 0x5658 with the magic number in EAX and a command in CX."""

    name = "vmware"

    def port_exit(self, port: int, size: int, length: int) -> bool:
        """The backdoor, for a kernel's 32-bit IN with the magic number."""
        cpu, constants = self.machine.cpu, self.spec.constants
        if port != constants["BACKDOOR_PORT"] or size != 4 or cpu.get("eax") != constants["BACKDOOR_MAGIC"]:
            return False
        command = cpu.get("ecx") & 0xFFFF
        self.skip(length)
        if command == constants["GATE"] and cpu.get("cpl") == 1:
            self.hypercalls["gate"] += 1
            self.gate(cpu.get("ebx"))
        elif command == GETVERSION:
            self.hypercalls["get version"] += 1
            cpu.set("eax", PRODUCT_VERSION)
            cpu.set("ebx", constants["BACKDOOR_MAGIC"])
            cpu.set("ecx", PRODUCT_VERSION)
        elif command == GETHZ:
            self.hypercalls["get hz"] += 1
            cpu.set("eax", self.alarms.frequency & 0xFFFF_FFFF)
            cpu.set("ebx", self.alarms.frequency >> 32)
        else:
            cpu.set("eax", 0xFFFF_FFFF)
        return True
