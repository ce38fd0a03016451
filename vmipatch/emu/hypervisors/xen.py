"""Xen 3.0 paravirtual: hypercalls by ``int 0x82``, a trap table, shared_info.

May import base, decode, layout and violation.  Numbers are those of ``specs/hypervisors/xen.toml``; structures and
error numbers here are those of Xen's public headers (xen.h, arch-x86/xen.h, sched.h, physdev.h), and
tests/real/test_headers.py holds both against the headers themselves.  A wrong argument gives the negative error
number that Xen gives; a pointer or a frame of the hypervisor's is a :class:`Violation`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from vmipatch.emu.hypervisors import decode
from vmipatch.emu.hypervisors.base import Base
from vmipatch.emu.hypervisors.layout import PAGE, is_host
from vmipatch.emu.hypervisors.violation import Violation

TRAP_INFO = struct.Struct("<BBHI")  # vector, flags, cs, address
MMU_UPDATE = struct.Struct("<QQ")  # ptr (its two lowest bits: the command), val
MMUEXT_OP = struct.Struct("<III")  # cmd, arg1, arg2
SET_IOPL = struct.Struct("<I")
SHUTDOWN = struct.Struct("<I")
TRAP_DPL, TRAP_MASKS_EVENTS = 3, 4
MMU_NORMAL = 0
EPERM, EFAULT, EINVAL, ENOSYS = 1, 14, 22, 38
CPUID_PREFIX = bytes.fromhex("0f0b78656e")
VERSION = 3 << 16  # 3.0
MOST = 4096  # elements of one call: Xen has no limit, but interrupts its work
TIME_INFO = struct.Struct("<IIQQIbBH")  # version, pad, tsc, system time in ns, multiplier, shift, flags, pad
GATE_PRESENT, INTERRUPT_GATE, TRAP_GATE = 0x8000, 0xE00, 0xF00


class BadArgument(Exception):
    """The hypercall ends with this error number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Arguments(NamedTuple):
    """The registers that a hypercall's arguments are in."""

    ebx: int
    ecx: int
    edx: int
    esi: int


class Personality(Base):
    """The guest executes INT 0x82 at ring 1."""

    name = "xen"
    own_vectors = frozenset((0x82,))
    watched_tables = frozenset(("gdt", "ldt"))  # of the IDT only the trap table counts

    def __init__(self) -> None:
        super().__init__()
        handlers: dict[str, Callable[[Arguments], int]] = {
            "set_trap_table": self._set_trap_table,
            "mmu_update": self._mmu_update,
            "set_gdt": self._set_gdt,
            "stack_switch": self._stack_switch,
            "fpu_taskswitch": self._fpu_taskswitch,
            "set_debugreg": self._set_debugreg,
            "get_debugreg": self._get_debugreg,
            "update_descriptor": self._update_descriptor,
            "xen_version": self._xen_version,
            "mmuext_op": self._mmuext_op,
            "sched_op": self._sched_op,
            "physdev_op": self._physdev_op,
        }
        numbers = self.spec.constants
        self._handlers = {numbers[name]: (name, handler) for name, handler in handlers.items()}
        self._mmuext = {numbers[name]: name for name in numbers if name.startswith("MMUEXT_")}

    # --- the state page ---------------------------------------------------------------

    @property
    def virtual_if(self) -> bool:
        """evtchn_upcall_mask, which is 1 where events are off."""
        return not self.state.get("vif") & 0xFF

    @virtual_if.setter
    def virtual_if(self, on: bool) -> None:
        self.state.put("vif", int(not on))

    def _capture(self) -> None:
        super()._capture()
        now = self.machine.clock.now
        shift, multiplier = _scale(self.alarms.frequency)
        info = TIME_INFO.pack(2, 0, self.machine.cpu.time_stamp(), now, multiplier, shift, 0, 0)
        self.state.put("vcpu_time", int.from_bytes(info, "little"))
        self.state.put("evtchn_mask", -1)
        born = self.alarms.wallclock() - now
        wallclock = struct.pack("<III", 2, born // 1_000_000_000 & 0xFFFF_FFFF, born % 1_000_000_000)
        self.state.put("wallclock", int.from_bytes(wallclock, "little"))

    def _frame_of(self, linear: int) -> int:
        return self.machine.cpu.translate(linear & 0xFFFF_FFFF) // PAGE

    # --- exits ------------------------------------------------------------------------

    def hypercall(self, vector: int) -> None:
        """INT 0x82: the number in EAX; what comes back in EAX is a result or a negative error."""
        cpu, numbers = self.machine.cpu, self.spec.constants
        number = cpu.get("eax")
        if number == numbers["GATE"]:
            self.hypercalls["gate"] += 1
            self.gate(cpu.get("ebx"))
        elif number == numbers["iret"]:
            self.hypercalls["iret"] += 1
            self._iret()
        else:
            name, handler = self._handlers.get(number, ("", None))
            if handler is None:
                cpu.set("eax", -ENOSYS)
                return
            self.hypercalls[name] += 1
            try:
                result = handler(Arguments(*(cpu.get(register) for register in Arguments._fields)))
            except BadArgument as bad:
                result = -bad.number
            cpu.set("eax", result)

    def undefined(self) -> bool:
        """The prefix with which a guest asks for Xen's CPUID; the processor's own has Xen's answers here."""
        if not decode.fetch(self.machine.cpu).startswith(CPUID_PREFIX + b"\x0f\xa2"):
            return False
        self.hypercalls["cpuid"] += 1
        self.skip(len(CPUID_PREFIX))
        return True

    # --- pointers ---------------------------------------------------------------------

    def _read(self, at: int, shape: struct.Struct, what: str) -> tuple[Any, ...]:
        if at + shape.size <= self.hole and not self.guest.reaches(at, shape.size):
            raise BadArgument(EFAULT)
        return shape.unpack(self.guest.read(at, shape.size, what))

    # --- traps ------------------------------------------------------------------------

    def _set_trap_table(self, args: Arguments) -> int:
        if args.ebx == 0:
            self.calls["SetIDT"] += 1
            for vector in range(256):
                self.tables.put_gate(vector, 0, 0)
            return 0
        at = args.ebx
        for _ in range(256):
            vector, flags, cs, address = self._read(at, TRAP_INFO, "trap table")
            if address == 0:
                break
            kind = INTERRUPT_GATE if flags & TRAP_MASKS_EVENTS else TRAP_GATE
            high = address & 0xFFFF_0000 | GATE_PRESENT | (flags & TRAP_DPL) << 13 | kind
            self.calls["WriteIDTEntry"] += 1
            self.tables.put_gate(vector, _kernels(cs) << 16 | address & 0xFFFF, high)
            at = at + TRAP_INFO.size & 0xFFFF_FFFF
        return 0

    def _iret(self) -> None:
        """EAX, then what IRET takes, on the stack; the frame's IF becomes the mask."""
        cpu = self.machine.cpu
        at = cpu.get("ss_base") + cpu.get("esp") & 0xFFFF_FFFF
        eax, eip, cs, flags = struct.unpack("<4I", self.guest.read(at, 16, "iret frame"))
        more = 6 if flags & 0x20000 else 2 if cs & 3 == 3 else 0
        stack = struct.unpack(f"<{more}I", self.guest.read(at + 16, 4 * more, "iret frame")) if more else ()
        self.calls["IRET"] += 1
        cpu.set("eax", eax)
        cpu.set("esp", cpu.get("esp") + 16)
        fault = self.interrupts.resume(eip, cs, flags, stack)
        if fault and cs & 3 == 3:
            self.interrupts.fault_of_return(*fault, (eip, cs, flags, *stack))
        elif fault:
            cpu.set("esp", cpu.get("esp") - 12)
            self.fault(*fault)

    # --- page tables ------------------------------------------------------------------

    def _each(self, args: Arguments, shape: struct.Struct, action: Callable[..., None], what: str) -> int:
        """Do the elements of an array up to the first that fails; how many is written where the guest wants it."""
        at, count, done_at, domain = args
        if domain & 0xFFFF != self.spec.constants["DOMID_SELF"]:
            return -EPERM
        if count > MOST:
            return -EINVAL
        done = result = 0
        for _ in range(count):
            try:
                action(*self._read(at, shape, what))
            except BadArgument as bad:
                result = -bad.number
                break
            at = at + shape.size & 0xFFFF_FFFF
            done += 1
        if done_at:
            if done_at + 4 <= self.hole and not self.guest.reaches(done_at, 4):
                return -EFAULT
            self.guest.write32(done_at, done, what)
        return result

    def _mmu_update(self, args: Arguments) -> int:
        return self._each(args, MMU_UPDATE, self._update, "mmu_update")

    def _update(self, pointer: int, value: int) -> None:
        size = 8 if self.paging.pae else 4
        if pointer & 3 != MMU_NORMAL:
            raise BadArgument(ENOSYS)
        self.calls["SetPxELong" if size == 8 else "SetPxE"] += 1
        data = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if pointer & (size - 1) or not self._store(pointer, data):
            raise BadArgument(EINVAL)

    def _store(self, physical: int, data: bytes) -> bool:
        """Write at a machine address; False where the guest has no memory."""
        if is_host(physical):
            raise Violation("bad-pointer", "a machine address of the hypervisor's", physical)
        return physical < self.machine.options.ram_bytes and self.paging.store_physical(physical, data)

    def _mmuext_op(self, args: Arguments) -> int:
        return self._each(args, MMUEXT_OP, self._extended, "mmuext_op")

    def _extended(self, command: int, first: int, second: int) -> None:
        name = self._mmuext.get(command, "")
        if name.startswith("MMUEXT_PIN"):
            self.calls["AllocatePage"] += 1
            self._need_frame(first)
            self.paging.allocate(first, name == "MMUEXT_PIN_L1_TABLE")
        elif name == "MMUEXT_UNPIN_TABLE":
            self.calls["ReleasePage"] += 1
            self._need_frame(first)
            self.paging.release(first)
        elif name == "MMUEXT_NEW_BASEPTR":
            self.calls["SetCR3"] += 1
            self._need_frame(first)
            # The operation names a page only; the stub has put the whole register into the state page.
            whole = self.state.get("cr3")
            self.control.set_cr3(whole if whole >> 12 == first else first << 12)
        elif name == "MMUEXT_TLB_FLUSH_LOCAL":
            self.calls["FlushTLB"] += 1
            self.paging.flush()
        elif name == "MMUEXT_INVLPG_LOCAL":
            self.calls["InvalPage"] += 1
            self.paging.invalidate(first)
        elif name == "MMUEXT_FLUSH_CACHE":
            self.calls["WBINVD"] += 1
        elif name == "MMUEXT_SET_LDT":
            self._set_ldt(first, second)
        else:
            raise BadArgument(ENOSYS)

    def _need_frame(self, frame: int) -> None:
        if frame >= self.machine.options.ram_bytes // PAGE:
            if is_host(frame << 12):
                raise Violation("forged-page-table", "a frame of the hypervisor's", frame << 12)
            raise BadArgument(EINVAL)

    # --- descriptors ------------------------------------------------------------------

    def _set_gdt(self, args: Arguments) -> int:
        """Frames and entries; where the table is in linear memory the stub has put into the state page."""
        entries = args.ecx
        if entries > self.spec.constants["MAX_GDT_FRAMES"] * PAGE // 8:
            return -EINVAL
        count = (8 * entries + PAGE - 1) // PAGE
        frames = self._read(args.ebx, struct.Struct(f"<{count}I"), "set_gdt") if count else ()
        for frame in frames:
            self._need_frame(frame)
        base, limit = self.state.get_table("gdt")
        there = tuple(self._frame_of(base + n * PAGE) for n in range(count))
        if there != frames or limit + 1 >> 3 != entries:
            return -EINVAL
        self.calls["SetGDT"] += 1
        self.tables.load_gdt(base, limit)
        return 0

    def _update_descriptor(self, args: Arguments) -> int:
        address = args.ebx | args.ecx << 32
        if address & 7:
            return -EINVAL
        if not self._store(address, struct.pack("<II", args.edx, args.esi)):
            return -EINVAL
        self.calls[self._follow(address, args.edx, args.esi)] += 1
        return 0

    def _follow(self, address: int, low: int, high: int) -> str:
        """The processor's copy of a table follows what was written at a machine address; the call it was."""
        tables = self.tables
        name = "WriteGDTEntry"
        for base, limit, put in ((*tables.gdt, tables.put_gdt), (*tables.ldt[1:], tables.put_ldt)):
            first = base & ~0xFFF
            for page in range(first, base + limit + 1 if limit else first, PAGE):
                index, odd = divmod(page + address % PAGE - base, 8)
                if self._frame_of(page) == address // PAGE and not odd and 0 <= index <= limit >> 3:
                    put(index, (low, high))
                    name = "WriteLDTEntry" if put == tables.put_ldt else name
        return name

    def _set_ldt(self, linear: int, entries: int) -> None:
        if entries > 8192:
            raise BadArgument(EINVAL)
        self.tables.place_ldt(self.state.get("ldt") & 0xFFFF, linear, max(0, 8 * entries - 1))
        self.calls["SetLDT"] += 1

    # --- registers, scheduling, devices -------------------------------------------------

    def _stack_switch(self, args: Arguments) -> int:
        self.calls["UpdateKernelStack"] += 1
        self.tables.set_stack(_kernels(args.ebx & 0xFFFF), args.ecx)
        return 0

    def _fpu_taskswitch(self, args: Arguments) -> int:
        self.calls["SetCR0" if args.ebx else "CLTS"] += 1
        self.control.set_ts(bool(args.ebx))
        return 0

    def _set_debugreg(self, args: Arguments) -> int:
        number, value = args.ebx, args.ecx
        if number not in (0, 1, 2, 3, 6, 7):
            return -EINVAL
        if number < 4 and value >= self.hole:
            return -EPERM
        self.calls["SetDR"] += 1
        self.control.set_dr(number, value)
        return 0

    def _get_debugreg(self, args: Arguments) -> int:
        if args.ebx not in (0, 1, 2, 3, 6, 7):
            return -EINVAL
        self.calls["GetDR"] += 1
        return self.control.get_dr(args.ebx)

    def _xen_version(self, args: Arguments) -> int:
        return VERSION if args.ebx == 0 else -ENOSYS

    def _sched_op(self, args: Arguments) -> int:
        numbers = self.spec.constants
        if args.ebx == numbers["SCHEDOP_yield"]:
            self.calls["Pause"] += 1
        elif args.ebx == numbers["SCHEDOP_block"]:
            self.calls["Halt"] += 1
            self.interrupts.halt()
        elif args.ebx == numbers["SCHEDOP_shutdown"]:
            (reason,) = self._read(args.ecx, SHUTDOWN, "sched_op")
            reboot = reason == numbers["SHUTDOWN_reboot"]
            self.calls["Reboot" if reboot else "Shutdown"] += 1
            self.machine.stop("reset" if reboot else "poweroff")
        else:
            return -ENOSYS
        return 0

    def _physdev_op(self, args: Arguments) -> int:
        if args.ebx != self.spec.constants["PHYSDEVOP_SET_IOPL"]:
            return -ENOSYS
        (level,) = self._read(args.ecx, SET_IOPL, "physdev_op")
        if level > 3:
            return -EINVAL
        self.calls["SetIOPLMask"] += 1
        self.iopl = level << 12
        return 0


def _kernels(selector: int) -> int:
    """The selector with ring 0 turned into ring 1."""
    return selector if selector & 3 else selector | 1


def _scale(frequency: int) -> tuple[int, int]:
    """Shift and 32-bit multiplier that turn cycles into nanoseconds (vcpu_time_info, public/xen.h)."""
    shift = 0
    while frequency << shift <= 1_000_000_000:
        shift += 1
    return shift, (1_000_000_000 << 32) // (frequency << shift)
