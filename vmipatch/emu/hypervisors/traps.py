"""Privileged instructions that the guest executes outside the interface: done for it, and counted.

May import decode, hole, interrupts and violation.  At CPL 1 they fault with #GP (Intel SDM 2, each
instruction's protected-mode exceptions); a real hypervisor of the kind decodes and emulates them just so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmipatch.emu.hypervisors import decode, hole
from vmipatch.emu.hypervisors.decode import REGISTERS, Prefixed
from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

GP, SS = 13, 12
VM = 0x20000
WRITE_PROTECT = 0x10000  # CR0.WP
CALLED = -1  # not a trap: the guest called its hypervisor, EIP is set


class Traps:
    """The emulator of privileged instructions of one virtual processor."""

    def __init__(self, owner: Base) -> None:
        self._owner = owner
        self._machine, self._cpu = owner.machine, owner.machine.cpu
        self._kernel: dict[int, tuple[str, Callable[[Prefixed, bytes], int | None]]] = {
            0xF4: ("hlt", self._hlt),
            0xCF: ("iret", self._iret),
            0xCB: ("retf", self._far_return),
            0xCA: ("retf", self._far_return),
            0x0F00: ("lldt, ltr", self._group6),
            0x0F01: ("lgdt, lidt, lmsw, invlpg", self._group7),
            0x0F06: ("clts", self._clts),
            0x0F08: ("invd", self._cache),
            0x0F09: ("wbinvd", self._cache),
            0x0F20: ("mov from cr", self._from_cr),
            0x0F21: ("mov from dr", self._from_dr),
            0x0F22: ("mov to cr", self._to_cr),
            0x0F23: ("mov to dr", self._to_dr),
            0x0F30: ("wrmsr", self._wrmsr),
            0x0F31: ("rdtsc", self._rdtsc),
            0x0F32: ("rdmsr", self._rdmsr),
            0x0F33: ("rdpmc", self._rdpmc),
            0x0F35: ("sysexit", self._sysexit),
        }
        self._anyone: dict[int, tuple[str, Callable[[Prefixed, bytes], int | None]]] = {
            0xFA: ("cli", self._cli),
            0xFB: ("sti", self._sti),
            0x0F34: ("sysenter", self._sysenter),
            **dict.fromkeys((228, 229, 236, 237), ("in", self._in)),
            **dict.fromkeys((230, 231, 238, 239), ("out", self._out)),
            **dict.fromkeys((108, 109, 110, 111), ("ins, outs", self._string)),
        }

    def general_protection(self, error: int) -> bool:
        """#GP at CS:EIP: True if the instruction was done for the guest, False if the guest is to have its fault."""
        cpu = self._cpu
        code = decode.fetch(cpu)
        user = cpu.get("cpl") == 3
        virtual = bool(cpu.eflags & VM)
        found = decode.prefixes(code, cpu.code_is_32_bit())
        if found is None:
            return False
        entry = self._anyone.get(found.opcode)
        if entry is None and not user:
            entry = self._kernel.get(found.opcode)
        if entry is not None and not (virtual and found.opcode in (0xFA, 0xFB, 0x0F34)):
            name, action = entry
            length = action(found, code)
            if length is not None:
                if length != CALLED:
                    self._owner.traps[name] += 1
                if length > 0:
                    self._owner.skip(length)
                return True
        if not user:
            self.check_hole(code)
        return False

    def check_hole(self, code: bytes | None = None) -> None:
        """Raises :class:`Violation` ``hole-write`` if the instruction at CS:EIP writes into the hole."""
        at = hole.written(self._cpu, decode.fetch(self._cpu) if code is None else code, self._owner.hole)
        if at is not None:
            raise Violation("hole-write", "the kernel writes to the hypervisor's memory", at)

    # --- ports ------------------------------------------------------------------------

    def _may(self, port: int, size: int) -> bool:
        """Whether the guest itself lets its ring 3 use a port (SDM 1, 18.5)."""
        if self._cpu.get("cpl") < 3 or (self._owner.iopl == 0x3000 and not self._cpu.eflags & VM):
            return True
        self._owner.tables.follow_task()
        task = self._owner.tables.task_base
        if not task or not self._owner.guest.reaches(task, 104):
            return False
        at = task + struct.unpack("<H", self._owner.guest.read(task + 102, 2))[0] + (port >> 3)
        limit = task + self._owner.tables.task_limit()
        if at + 1 > limit or not self._owner.guest.reaches(at, 2):
            return False
        bits = int.from_bytes(self._owner.guest.read(at, 2), "little") >> (port & 7)
        return not bits & ((1 << size) - 1)

    def _in(self, found: Prefixed, code: bytes) -> int | None:
        size = 1 if not found.opcode & 1 else 4 if found.wide else 2
        length, port = self._port(found, code)
        if port is None or not self._may(port, size):
            return None
        if self._owner.port_exit(port, size, found.length):
            return CALLED
        value = self._machine.bus.port_read(port, size)
        mask = (1 << 8 * size) - 1
        self._cpu.set("eax", self._cpu.get("eax") & ~mask | value & mask)
        return length

    def _out(self, found: Prefixed, code: bytes) -> int | None:
        size = 1 if not found.opcode & 1 else 4 if found.wide else 2
        length, port = self._port(found, code)
        if port is None or not self._may(port, size):
            return None
        self._machine.bus.port_write(port, size, self._cpu.get("eax") & ((1 << 8 * size) - 1))
        return length

    def _port(self, found: Prefixed, code: bytes) -> tuple[int, int | None]:
        if found.opcode & 8:
            return found.length, self._cpu.get("edx") & 0xFFFF
        if found.length >= len(code):
            return 0, None
        return found.length + 1, code[found.length]

    def _string(self, found: Prefixed, code: bytes) -> int | None:
        cpu = self._cpu
        port = cpu.get("edx") & 0xFFFF
        size = 1 if not found.opcode & 1 else 4 if found.wide else 2
        if not self._may(port, size):
            return None
        mask = 0xFFFF_FFFF if found.wide_address else 0xFFFF
        index = "esi" if found.opcode & 2 else "edi"
        base = cpu.get(f"{(found.segment or 'ds') if index == 'esi' else 'es'}_base")
        step = -size if cpu.eflags & 0x400 else size
        # One element a turn: in the middle of a REP the guest may take interrupts, as on the bare machine.
        if found.repeat and cpu.get("ecx") & mask == 0:
            return found.length
        at = base + (cpu.get(index) & mask) & 0xFFFF_FFFF
        for end in (at, at + size - 1):
            error = self._refused(end, write=index == "edi")
            if error is not None:
                self._owner.page_fault(end, error)
                return 0
        if index == "edi":
            value = self._machine.bus.port_read(port, size)
            self._owner.guest.write(at, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"), "INS")
        else:
            value = int.from_bytes(self._owner.guest.read(at, size, "OUTS"), "little")
            self._machine.bus.port_write(port, size, value)
        cpu.set(index, cpu.get(index) & ~mask | cpu.get(index) + step & mask)
        if not found.repeat:
            return found.length
        left = cpu.get("ecx") - 1 & mask
        cpu.set("ecx", cpu.get("ecx") & ~mask | left)
        return found.length if left == 0 else 0

    def _refused(self, linear: int, *, write: bool) -> int | None:
        """The page fault's error code where the guest itself could not do this access; None where it could."""
        user = self._cpu.get("cpl") == 3
        is_memory = self._cpu.translate(linear & 0xFFFF_FFFF) >= 0
        rights = self._owner.paging.rights(linear & 0xFFFF_FFFF) if is_memory else 0
        needs_write = write and (user or bool(self._cpu.get("cr0") & WRITE_PROTECT))
        if rights & 1 and (rights & 4 or not user) and (rights & 2 or not needs_write):
            return None
        return rights & 1 | (2 if write else 0) | (4 if user else 0)

    # --- interrupts -------------------------------------------------------------------

    def _cli(self, found: Prefixed, code: bytes) -> int | None:
        if self._cpu.get("cpl") == 3 and self._owner.iopl != 0x3000:
            return None
        self._owner.virtual_if = False
        return found.length

    def _sti(self, found: Prefixed, code: bytes) -> int | None:
        if self._cpu.get("cpl") == 3 and self._owner.iopl != 0x3000:
            return None
        self._owner.virtual_if = True
        return found.length

    def _hlt(self, found: Prefixed, code: bytes) -> int | None:
        if not self._owner.virtual_if:
            self._machine.stop("halt")
            return found.length
        self._owner.skip(found.length)
        self._owner.interrupts.halt()
        return 0

    def _iret(self, found: Prefixed, code: bytes) -> int | None:
        cpu = self._cpu
        if cpu.code_is_32_bit():
            at = cpu.get("ss_base") + cpu.get("esp") & 0xFFFF_FFFF
            cs = self._owner.guest.read32(at + 4, "IRET frame")
            if cs & 3 == 0 and cs & 0xFFFC:
                raise Violation("ring-0", "IRET to ring 0", cpu.get("eip"))
        return None

    def _far_return(self, found: Prefixed, code: bytes) -> int | None:
        at = self._cpu.get("ss_base") + self._cpu.get("esp") & 0xFFFF_FFFF
        cs = self._owner.guest.read32(at + 4, "far return")
        if cs & 3 == 0 and cs & 0xFFFC:
            raise Violation("ring-0", "far return to ring 0", self._cpu.get("eip"))
        return None

    # --- system registers ---------------------------------------------------------------

    def _group6(self, found: Prefixed, code: bytes) -> int | None:
        operand = decode.operand(self._cpu, code, found)
        if operand is None or operand.reg not in (2, 3):
            return None
        selector = self._value16(operand)
        if operand.reg == 2:
            self._owner.tables.load_ldt(selector)
        else:
            self._owner.tables.load_task(selector)
        return operand.length

    def _group7(self, found: Prefixed, code: bytes) -> int | None:
        operand = decode.operand(self._cpu, code, found)
        if operand is None:
            return None
        if operand.reg in (2, 3) and not operand.is_register:
            raw = self._owner.guest.read(self._linear(operand), 6, "descriptor table register")
            limit, base = struct.unpack("<HI", raw)
            if not found.wide:
                base &= 0xFF_FFFF
            self._owner.load_table("gdt" if operand.reg == 2 else "idt", base, limit)
        elif operand.reg == 6:
            value = self._value16(operand)
            cr0 = self._owner.control.get(0)
            self._owner.control.set_cr0(cr0 & ~0xE | value & 0xF | cr0 & 1)
        elif operand.reg == 7 and not operand.is_register:
            self._owner.paging.invalidate(self._linear(operand))
        else:
            return None
        return operand.length

    def _linear(self, operand: decode.Operand) -> int:
        return self._cpu.get(f"{operand.segment}_base") + operand.offset & 0xFFFF_FFFF

    def _value16(self, operand: decode.Operand) -> int:
        if operand.is_register:
            return self._cpu.get(REGISTERS[operand.rm]) & 0xFFFF
        return int.from_bytes(self._owner.guest.read(self._linear(operand), 2), "little")

    def _clts(self, found: Prefixed, code: bytes) -> int | None:
        self._owner.control.set_ts(False)
        return found.length

    def _cache(self, found: Prefixed, code: bytes) -> int | None:
        return found.length

    def _registers(self, found: Prefixed, code: bytes) -> tuple[int, str] | None:
        if found.length >= len(code):
            return None
        modrm = code[found.length]
        return modrm >> 3 & 7, REGISTERS[modrm & 7]

    def _from_cr(self, found: Prefixed, code: bytes) -> int | None:
        pair = self._registers(found, code)
        if pair is None or pair[0] not in (0, 2, 3, 4):
            return None
        self._cpu.set(pair[1], self._owner.control.get(pair[0]))
        return found.length + 1

    def _to_cr(self, found: Prefixed, code: bytes) -> int | None:
        pair = self._registers(found, code)
        if pair is None:
            return None
        control, value = self._owner.control, self._cpu.get(pair[1])
        if pair[0] == 0:
            control.set_cr0(value)
        elif pair[0] == 2:
            self._owner.state.put("cr2", value)
        elif pair[0] == 3:
            control.set_cr3(value)
        elif pair[0] != 4 or not control.set_cr4(value):
            return None
        return found.length + 1

    def _from_dr(self, found: Prefixed, code: bytes) -> int | None:
        pair = self._registers(found, code)
        if pair is None:
            return None
        self._cpu.set(pair[1], self._owner.control.get_dr(pair[0]))
        return found.length + 1

    def _to_dr(self, found: Prefixed, code: bytes) -> int | None:
        pair = self._registers(found, code)
        if pair is None:
            return None
        self._owner.control.set_dr(pair[0], self._cpu.get(pair[1]))
        return found.length + 1

    def _rdmsr(self, found: Prefixed, code: bytes) -> int | None:
        value = self._owner.control.read_msr(self._cpu.get("ecx"))
        return None if value is None else self._wide_result(found, value)

    def _wide_result(self, found: Prefixed, value: int) -> int:
        self._cpu.set("eax", value & 0xFFFF_FFFF)
        self._cpu.set("edx", value >> 32 & 0xFFFF_FFFF)
        return found.length

    def _wrmsr(self, found: Prefixed, code: bytes) -> int | None:
        cpu = self._cpu
        done = self._owner.control.write_msr(cpu.get("ecx"), cpu.get("eax") | cpu.get("edx") << 32)
        return found.length if done else None

    def _rdtsc(self, found: Prefixed, code: bytes) -> int | None:
        return self._wide_result(found, self._cpu.time_stamp())

    def _rdpmc(self, found: Prefixed, code: bytes) -> int | None:
        return self._wide_result(found, 0) if self._cpu.get("ecx") < 2 else None

    def _sysenter(self, found: Prefixed, code: bytes) -> int | None:
        """Into the kernel at ring 1 (SDM 2, SYSENTER; the MSRs are the guest's)."""
        cpu, msr = self._cpu, self._owner.control.sysenter
        selector = msr["sysenter_cs"]
        if selector & 0xFFFC == 0:
            return None
        cpu.set("eflags", cpu.eflags & ~VM)
        self._owner.virtual_if = False
        cpu.set("cs", selector & 0xFFFC | 1)
        cpu.set("ss", (selector & 0xFFFC) + 8 | 1)
        cpu.set("esp", msr["sysenter_esp"])
        cpu.set("eip", msr["sysenter_eip"])
        return 0

    def _sysexit(self, found: Prefixed, code: bytes) -> int | None:
        """To user code outside the interface."""
        cpu, selector = self._cpu, self._owner.control.sysenter["sysenter_cs"]
        if selector & 0xFFFC == 0:
            return None
        user = (selector & 0xFFFC) + 16 | 3
        stack = (cpu.get("ecx"), user + 8)
        flags = cpu.eflags & ~0x200 | (0x200 if self._owner.virtual_if else 0)
        if self._owner.interrupts.resume(cpu.get("edx"), user, flags, stack):
            return None
        return 0
