"""KVM: hypercalls by VMCALL, number in EAX, arguments in EBX, ECX, EDX (Linux 2.6.32, asm/kvm_para.h, kvm_para.h).

The gate, number 0x564D, is this project's.
"""

from __future__ import annotations

import struct

from vmipatch.emu.hypervisors.base import UD, Base

KVM_ENOSYS = 1000
FEATURES = 3
FEATURE_LEAF = 0x4000_0001
FEATURE_BITS = 0b110  # no I/O delay, MMU_OP


class Personality(Base):
    """The guest executes VMCALL at CPL 1."""

    name = "kvm"

    def leaves(self, leaf: int, signature: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
        """The signature, and the leaf of features behind it."""
        return {leaf: (FEATURE_LEAF, *signature), FEATURE_LEAF: (FEATURE_BITS, 0, 0, 0)}

    def _vmcall(self) -> None:
        cpu, constants = self.machine.cpu, self.spec.constants
        if not self.active or cpu.get("cpl") != 1:
            self.fault(UD)
            return
        self.skip(cpu.exit_length)
        number, first, second, third = (cpu.get(name) for name in ("eax", "ebx", "ecx", "edx"))
        if number == constants["GATE"]:
            self.hypercalls["gate"] += 1
            self.gate(first)
            return
        if number == constants["KVM_HC_VAPIC_POLL_IRQ"]:
            self.hypercalls["VAPIC_POLL_IRQ"] += 1
            result = 0
        elif number == constants["KVM_HC_MMU_OP"]:
            self.hypercalls["MMU_OP"] += 1
            result = self._mmu_op(first, second | third << 32)
        elif number == FEATURES:
            self.hypercalls["FEATURES"] += 1
            result = FEATURE_BITS
        else:
            result = -KVM_ENOSYS
        cpu.set("eax", result)

    def _mmu_op(self, length: int, physical: int) -> int:
        """MMU_OP: a buffer of records at a physical address; how many bytes were done, or a negative error."""
        end = self.machine.options.ram_bytes
        if length > 512 or physical + length > end:
            return -KVM_ENOSYS
        data = self.machine.memory.read(physical, length)
        constants = self.spec.constants
        at = 0
        while at + 8 <= length:
            operation = struct.unpack_from("<I", data, at)[0]
            if operation == constants["KVM_MMU_OP_WRITE_PTE"] and at + 24 <= length:
                where, value = struct.unpack_from("<QQ", data, at + 8)
                size = 8 if self.paging.pae else 4
                self.calls["SetPxELong" if self.paging.pae else "SetPxE"] += 1
                if not self.paging.store_physical(where, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")):
                    return -KVM_ENOSYS
                at += 24
            elif operation == constants["KVM_MMU_OP_FLUSH_TLB"]:
                self.calls["FlushTLB"] += 1
                self.paging.flush()
                at += 8
            elif operation == constants["KVM_MMU_OP_RELEASE_PT"] and at + 16 <= length:
                self.calls["ReleasePage"] += 1
                self.paging.release(struct.unpack_from("<Q", data, at + 8)[0] >> 12)
                at += 16
            else:
                return -KVM_ENOSYS
        return at
