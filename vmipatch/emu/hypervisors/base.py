"""What all personalities are made of: the switch at VMI_Init, the exits, the parts of a virtual processor.

May import the other modules of this package, the machine and the readers of ROMs and specs.  This class knows
no hypervisor's name: a heir says how its guest calls it (``own_vectors``, :meth:`hypercall`,
:meth:`port_exit`), and what of the state page is peculiar to it.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

from vmipatch.emu.hypervisors import calls, decode, layout, reach
from vmipatch.emu.hypervisors.control import Control
from vmipatch.emu.hypervisors.descriptors import Tables
from vmipatch.emu.hypervisors.guest import DeviceMemory, GuestMemory
from vmipatch.emu.hypervisors.interrupts import EXCEPTION, HARD, IF, IOPL, SOFT, VM, Interrupts
from vmipatch.emu.hypervisors.layout import HostMemory
from vmipatch.emu.hypervisors.paging import Paging
from vmipatch.emu.hypervisors.state import StatePage
from vmipatch.emu.hypervisors.timing import Alarms
from vmipatch.emu.hypervisors.traps import Traps
from vmipatch.emu.hypervisors.violation import NotMapped, Violation

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine
    from vmipatch.rombuild.abi import Abi
    from vmipatch.rombuild.hypervisor import Hypervisor

OK, NO_ROM, OTHER_ROM, NOT_READY = 0, 1, 2, 3
"""What the init call returns in EAX."""
DB, UD, NP, STACK, GP, PF = 1, 6, 11, 12, 13, 14
IRET = 0xCF
APIC = 0xFEE0_0000

CONTROL = ("cr0", "cr2", "cr3", "cr4")
SHOWN = (*CONTROL, "gdt", "idt", "ldt", "tr")
"""Fields of the state page that are what the guest sees."""
OF_THE_PROCESSOR = (
    "gdtr_base", "gdtr_limit", "idtr_base", "idtr_limit", "ldtr", "tr", "sysenter_cs", "sysenter_esp", "sysenter_eip",
)  # fmt: skip


class Base:
    """One hypervisor under one machine; a heir is called ``Personality``.

    ``calls``: VMI calls that the host performed · ``hypercalls``: how often the guest called, by the name of
    the hypercall · ``traps``: privileged instructions outside the interface · ``violation``: the rule that
    stopped the guest, if one did.
    """

    name = ""
    own_vectors: frozenset[int] = frozenset()
    watched_tables: frozenset[str] = frozenset(("gdt", "ldt", "idt"))
    """Descriptor tables whose pages are guarded, so that a write without a call counts too."""
    told_of_tables = True
    """Whether AllocatePage and ReleasePage reach the host."""

    def __init__(self) -> None:
        from vmipatch.rombuild import hypervisor

        self.spec: Hypervisor = hypervisor.load(self.name)
        self.virtual_top = self.spec.virtual_top
        self.hole = self.virtual_top + layout.PAGE
        self.active = False
        self.rom = (0, 0)
        """Linear address and length of the ROM that called."""
        self.calls: Counter[str] = Counter()
        self.hypercalls: Counter[str] = Counter()
        self.traps: Counter[str] = Counter()
        self.violation: Violation | None = None
        self.iopl = 0
        self.lazy_mode = 0
        self.op = ""
        self.processors: dict[int, bytes] = {}

    # --- attaching --------------------------------------------------------------------

    def attach(self, machine: Machine, *, found: bool = True) -> None:
        """Stand by under a machine whose guest runs natively; unless ``found`` is false it finds us by CPUID."""
        self.machine = machine
        machine.personality = self
        machine.vmi_calls = self.calls
        self.host = HostMemory(machine)
        self.guest = GuestMemory(self)
        self.paging = Paging(machine, self.host, self.virtual_top)
        self.tables = Tables(self, self.host)
        self.control = Control(self)
        self.interrupts = Interrupts(self)
        self.emulator = Traps(self)
        self.alarms = Alarms(machine)
        self._state_page = self.host.page()
        self.host.guard(self._state_page)
        self.state = StatePage(self.host, self._state_page, ())
        self.abi: Abi = _first_abi(self.spec)
        self._hooked: frozenset[int] = frozenset()
        signature = str(self.spec.detect["signature"]).encode("latin-1")
        self._leaves = self.leaves(self.spec.detect["leaf"], struct.unpack("<3I", signature)) if found else {}
        self._show_leaves(True)
        cpu, exit_ = machine.cpu, machine.exit
        cpu.hook_port(self.spec.constants["INIT_PORT"])
        machine.hooks[exit_.PORT] = self._on_port
        machine.hooks[exit_.VECTOR] = self._on_vector
        machine.hooks[exit_.HYPERCALL] = self._on_vmcall
        machine.hooks[exit_.PAGE_WRITE] = self._on_page_write
        machine.board.filter_interrupt = self.interrupts.board_line
        machine.board.fw_cfg.memory = DeviceMemory(self)
        machine.board.system.holds_a20 = lambda: self.active
        self._blank = self.save()

    def leaves(self, leaf: int, signature: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
        """What CPUID answers, by leaf: the hypervisor's signature in EBX, ECX, EDX; EAX: the highest such leaf."""
        return {leaf: (leaf, *signature)}

    def _show_leaves(self, shown: bool) -> None:
        """Answer CPUID with the signature, or no more: after the init call VMI is the one interface.

        A kernel that speaks the hypervisor's own as well would put that over VMI's otherwise (Linux 2.6.25 to
        2.6.36, arch/x86/kernel/kvm.c, kvm_guest_init: by the signature alone).
        """
        found: dict[int, tuple[int, ...]] = self.machine.cpu.leaves  # type: ignore[assignment]
        for leaf, values in self._leaves.items():
            if shown:
                found[leaf] = values
            else:
                found.pop(leaf, None)

    # --- the switch -------------------------------------------------------------------

    def start(self, rom: int) -> int:
        """The init call for the ROM at linear ``rom``: OK, or why not, with nothing changed.

        The guest must be at CPL 0 in protected mode with paging. Afterwards it is at CPL 1 at the same
        instruction, its virtual flag as its real one was. Raises :class:`Violation` for tables that cannot be
        taken over.
        """
        from vmipatch.rombuild import abi as abis
        from vmipatch.rombuild import inspect

        cpu = self.machine.cpu
        if not self.machine.board.system.is_a20():
            return NOT_READY
        if self.active or cpu.get("cpl") or cpu.eflags & VM or cpu.get("cr0") & 0x8000_0001 != 0x8000_0001:
            return NOT_READY
        head = cpu.read_linear(rom, 3)
        image = cpu.read_linear(rom, head[2] * 512) if head and head[:2] == b"\x55\xaa" else None
        found = inspect.images(image) if image else []
        vmi = found[0].vmi if found else None
        if vmi is None or vmi.block is None or vmi.block.abi is None:
            return NO_ROM
        if not self.speaks(vmi.block.hypervisor or "") or vmi.virtual_top != self.virtual_top:
            return OTHER_ROM
        # The ROM is the guest's word: its state page must be a page and have all fields, its ABI one that there is.
        named = {field.name for field in vmi.state}
        if vmi.block.abi not in abis.names() or not named.issuperset(self.spec.state):
            return OTHER_ROM
        if any(field.offset + field.size > layout.PAGE for field in vmi.state):
            return OTHER_ROM
        self.abi = abis.load(vmi.block.abi)
        self.rom = rom, len(image or b"")
        self.state = StatePage(self.host, self._state_page, vmi.state)
        self._capture()
        self._show_leaves(False)
        return OK

    def speaks(self, name: str) -> bool:
        """Whether a ROM made for the hypervisor of that name is ours."""
        return name == self.name

    def _capture(self) -> None:
        cpu, machine = self.machine.cpu, self.machine
        gdt = cpu.get("gdtr_base"), cpu.get("gdtr_limit")
        idt = cpu.get("idtr_base"), cpu.get("idtr_limit")
        ldt, task, flags = cpu.get("ldtr"), cpu.get("tr"), cpu.eflags
        selectors = {name: cpu.get(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")}
        line = machine.board.interrupt_level()
        self.control.begin()
        self.state.put("cycle_frequency", self.alarms.frequency)
        hole = [(layout.STATE, self._state_page), *self.tables.hole_pages()]
        self.paging.begin(cpu.get("cr3"), bool(cpu.get("cr4") & 0x20), hole)
        self.state.put_table("gdt", *gdt)
        self.state.put_table("idt", *idt)
        self.tables.load_gdt(*gdt)
        self.tables.load_idt(*idt)
        self.tables.load_ldt(ldt)
        self.tables.load_task(task)
        self.tables.begin()
        for name, selector in selectors.items():
            if selector & 0xFFFC:
                cpu.set(name, selector if selector & 3 else selector | 1)
        self.iopl = flags & IOPL
        cpu.set("eflags", flags & ~IOPL | IF)
        self.set_hooks(frozenset(range(256)) - self.tables.direct)
        self.active = True
        self.virtual_if = bool(flags & IF)
        self.interrupts.line = line
        self.interrupts.update()

    def set_hooks(self, vectors: frozenset[int]) -> None:
        """These vectors leave the processor, and no others."""
        for vector in vectors ^ self._hooked:
            self.machine.cpu.hook_vector(vector, vector in vectors)
        self._hooked = vectors

    def hook_vector(self, vector: int, hooked: bool) -> None:
        """Make a vector exit, or let the processor deliver it by itself."""
        if self.active:
            self.set_hooks(self._hooked | {vector} if hooked else self._hooked - {vector})

    # --- the state page's peculiar fields ---------------------------------------------

    @property
    def virtual_if(self) -> bool:
        """The virtual interrupt flag."""
        return bool(self.state.get("vif") & IF)

    @virtual_if.setter
    def virtual_if(self, on: bool) -> None:
        value = self.state.get("vif")
        if bool(value & IF) != on:
            self.state.put("vif", value ^ IF)

    def set_pending(self, waits: bool) -> None:
        """Whether an interrupt waits for the virtual flag."""
        if bool(self.state.get("pending")) != waits:
            self.state.put("pending", int(waits))

    # --- exits ------------------------------------------------------------------------

    def skip(self, length: int) -> None:
        """Go on behind an instruction that was done for the guest."""
        cpu = self.machine.cpu
        cpu.set("eip", cpu.get("eip") + length)

    def fault(self, vector: int, error: int = 0) -> None:
        """Give the guest an exception at CS:EIP."""
        self.interrupts.deliver(vector, EXCEPTION, error)

    def page_fault(self, linear: int, error: int) -> None:
        """Give the guest a page fault."""
        self.state.put("cr2", linear)
        self.fault(PF, error)

    def gate(self, frame: int) -> None:
        """The call gate: ``frame`` is the linear address of its frame; EIP is behind the exit."""
        found = calls.Frame(self, frame)
        if found.number != self.spec.constants["DELIVER"]:
            calls.perform(self, found)

    def hypercall(self, vector: int) -> None:
        """The guest called by its hypervisor's own instruction; EIP is behind it. A heir answers."""
        raise NotImplementedError

    def port_exit(self, port: int, size: int, length: int) -> bool:
        """The guest reads a port at CPL 1: True if that was a call of the hypervisor, done, EIP behind it."""
        return False

    def undefined(self) -> bool:
        """#UD at CS:EIP: True if that was a call of the hypervisor, done."""
        return False

    def load_table(self, name: str, base: int, limit: int) -> None:
        """LGDT or LIDT (``gdt``, ``idt``)."""
        if name == "gdt":
            self.tables.load_gdt(base, limit)
        else:
            self.tables.load_idt(base, limit)
        self.state.put_table(name, base, limit)

    def apic_register(self, where: int) -> int:
        """The physical address of a local APIC register: 3.0 gives its offset, 13.0 the mapped address."""
        return APIC + (where & 0xFFC)

    def _guarded(self, action: Any, *arguments: Any) -> bool:
        eip = self.machine.cpu.get("eip")
        try:
            try:
                action(*arguments)
            except NotMapped as table:
                if not self.active:
                    raise
                self.machine.cpu.set("eip", eip)
                self.page_fault(table.linear, 0)
        except Violation as violation:
            self.violation = violation
            self.machine.stop("violation")
        if self.active:
            self.interrupts.update()
        return True

    def _on_port(self, machine: Machine) -> bool:
        return self._guarded(self._port)

    def _port(self) -> None:
        """The init port on the bare machine; other uses of it get what the bus says."""
        cpu = self.machine.cpu
        found = decode.prefixes(decode.fetch(cpu), cpu.code_is_32_bit())
        length = found.length if found else 1
        if not cpu.exit_write and cpu.exit_size == 4 and cpu.get("eax") == self.spec.constants["VMI_SIGNATURE"]:
            result = self.start(cpu.get("ebx"))
            cpu.set("eax", result)
            self.hypercalls["init"] += 1
        elif cpu.exit_write:
            self.machine.bus.port_write(cpu.exit_address, cpu.exit_size, cpu.exit_value)
        else:
            mask = (1 << 8 * cpu.exit_size) - 1
            value = self.machine.bus.port_read(cpu.exit_address, cpu.exit_size)
            cpu.set("eax", cpu.get("eax") & ~mask | value & mask)
        self.skip(length)

    def _on_vector(self, machine: Machine) -> bool:
        cpu = machine.cpu
        return self._guarded(self._vector, cpu.exit_vector, cpu.exit_kind, cpu.exit_error)

    def _vector(self, vector: int, kind: int, error: int) -> None:
        cpu = self.machine.cpu
        if kind == HARD:
            self.interrupts.deliver(vector, HARD)
        elif kind == SOFT:
            self._software(vector)
        elif vector == GP:
            if not self.emulator.general_protection(error):
                self._selector_fault(GP, error)
        elif vector == PF:
            self.page_fault(cpu.get("cr2"), error)
        elif vector == UD:
            if not self.undefined():
                self.fault(UD)
        else:
            if vector == STACK and cpu.get("cpl") < 3:
                self.emulator.check_hole()
            self._selector_fault(vector, error)

    def _selector_fault(self, vector: int, error: int) -> None:
        """A fault as it comes, but for an IRET's own of the ROM's, and for segments that reach round."""
        if vector == GP and error == 0 and not self.machine.cpu.eflags & VM and reach.other_part(self):
            self.traps["segment limit"] += 1
            return
        frame = self._return_frame() if vector in (NP, STACK, GP) else ()
        if frame:
            self.interrupts.fault_of_return(vector, error, frame)
        else:
            self.fault(vector, error)

    def _return_frame(self) -> tuple[int, ...]:
        """The frame of the IRET to ring 3 in the ROM that CS:EIP is at; nothing if it is at none."""
        cpu = self.machine.cpu
        start, length = self.rom
        if (
            cpu.get("cpl") != 1
            or not start <= cpu.linear_eip < start + length
            or decode.fetch(cpu)[:1] != bytes((IRET,))
        ):
            return ()
        at = cpu.get("ss_base") + cpu.get("esp") & 0xFFFF_FFFF
        if not self.guest.reaches(at, 20):
            return ()
        frame = struct.unpack("<5I", self.guest.read(at, 20, "IRET frame"))
        return frame if frame[1] & 3 == 3 and not frame[2] & VM else ()

    def _software(self, vector: int) -> None:
        cpu = self.machine.cpu
        found = decode.prefixes(decode.fetch(cpu), cpu.code_is_32_bit())
        length = found.length + (found.opcode == 0xCD) if found else 1
        if vector in self.own_vectors and cpu.get("cpl") == 1:
            self.skip(length)
            self.hypercall(vector)
        elif self.tables.gates[vector][1] >> 13 & 3 < cpu.get("cpl") and not self._is_kernel():
            self.fault(GP, vector * 8 + 2)
        else:
            self.skip(length)
            self.interrupts.deliver(vector, SOFT)

    def _is_kernel(self) -> bool:
        """Ring 1 is the guest's ring 0: gates of privilege 0 are open to it."""
        return bool(self.machine.cpu.get("cpl") == 1)

    def _on_vmcall(self, machine: Machine) -> bool:
        return self._guarded(self._vmcall)

    def _vmcall(self) -> None:
        self.fault(UD)

    def _on_page_write(self, machine: Machine) -> bool:
        self.traps["guarded write"] += 1
        reasons: list[int] = []
        self._guarded(lambda: reasons.append(self.paging.page_write()))
        if reasons and reasons[0] != machine.exit.LIMIT:
            machine.left(reasons[0])
        return True

    # --- what the guest sees ------------------------------------------------------------

    def view(self) -> dict[str, int]:
        """The system state as the guest sees it, by the names of :func:`native_view`; selectors with their RPL."""
        cpu = self.machine.cpu
        if not self.active:
            return native_view(cpu)
        shown = self.state.values(SHOWN)
        values = {name: shown[name] for name in CONTROL}
        values |= debug_registers(cpu)
        for name in ("gdt", "idt"):
            values[f"{name}r_base"], values[f"{name}r_limit"] = shown[name] >> 16, shown[name] & 0xFFFF
        values["ldtr"], values["tr"] = shown["ldt"], shown["tr"]
        values["if"], values["iopl"] = int(self.virtual_if), self.iopl >> 12
        values |= self.control.sysenter
        values["efer"] = self.control.read_msr(0xC000_0080) or 0
        values["stack_ss"], values["stack_esp"] = self.tables.stack
        return values

    def counts(self) -> dict[str, dict[str, int]]:
        """How often the guest called, and what it did outside the interface."""
        return {"hypercalls": dict(self.hypercalls), "traps": dict(self.traps)}

    # --- snapshots ----------------------------------------------------------------------

    def save(self) -> Any:
        """All state that is neither in memory nor in the processor."""
        return (
            self.active,
            self.rom,
            self.abi,
            self.state,
            self._hooked,
            self.iopl,
            self.lazy_mode,
            self.violation,
            self.interrupts.line,
            dict(self.processors),
            self.paging.save(),
            self.tables.save(),
            self.control.save(),
            self.alarms.save(),
        )

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned; None: never started. The counters go on."""
        saved = self._blank if saved is None else saved
        was = self.active
        self.active, self.rom, self.abi, self.state, hooked, self.iopl, self.lazy_mode, self.violation = saved[:8]
        self.interrupts.line, processors, paging, tables, control, alarms = saved[8:]
        if was != self.active:
            self._show_leaves(not self.active)
        self.processors = dict(processors)
        if hooked != self._hooked:
            self.set_hooks(hooked)
        self.paging.restore(paging)
        self.tables.restore(tables)
        self.control.restore(control)
        self.alarms.restore(alarms)


def debug_registers(cpu: Any) -> dict[str, int]:
    """DR0 to DR3, DR6 and DR7 by name."""
    held = cpu.dr
    return {f"dr{n}": held[n] for n in (0, 1, 2, 3, 6, 7)}


def native_view(cpu: Any) -> dict[str, int]:
    """The system state of a guest that runs on the bare machine, by name."""
    held = cpu.cr
    values = {f"cr{n}": held[n] for n in (0, 2, 3, 4)} | debug_registers(cpu)
    values |= {name: cpu.get(name) for name in OF_THE_PROCESSOR}
    flags = cpu.eflags
    values["if"], values["iopl"] = int(bool(flags & IF)), (flags & IOPL) >> 12
    values["efer"] = 0x800 * cpu.efer_nx
    base, limit = cpu.get("tr_base"), cpu.get("tr_limit")
    raw = cpu.read_linear(base + 4, 8) if limit >= 12 and cpu.get("tr") & 0xFFFC else None
    values["stack_esp"], values["stack_ss"] = struct.unpack("<II", raw) if raw else (0, 0)
    values["stack_ss"] &= 0xFFFF
    return values


def _first_abi(spec: Hypervisor) -> Abi:
    from vmipatch.rombuild import abi as abis

    return next(a for a in map(abis.load, abis.names()) if spec.supports(a) is None)
