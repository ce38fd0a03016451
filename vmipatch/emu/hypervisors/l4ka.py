"""L4Ka: one software interrupt, 0x30, with the gate's frame in EBX; the flags word holds the virtual flag."""

from __future__ import annotations

from vmipatch.emu.hypervisors.base import Base
from vmipatch.emu.hypervisors.violation import Violation


class Personality(Base):
    """The in-place monitor of the afterburner's ROM, as docs/abis.md has it."""

    name = "l4ka"
    own_vectors = frozenset((0x30,))

    def hypercall(self, vector: int) -> None:
        """INT 0x30 with EAX 0x564D."""
        cpu = self.machine.cpu
        if cpu.get("eax") != self.spec.constants["GATE"]:
            raise Violation("bad-call", f"int 0x30 with EAX = {cpu.get('eax'):#x}", cpu.get("eip"))
        self.hypercalls["gate"] += 1
        self.gate(cpu.get("ebx"))
