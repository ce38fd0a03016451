"""The processor as Python code sees it: registers by name, run, hooks, save and restore.

May import engine, forms, table and ``vmipatch.facts``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from vmipatch import facts
from vmipatch.emu.cpu import state
from vmipatch.emu.cpu.engine import COMPILED, Core, Memory, api
from vmipatch.emu.cpu.forms import decoder_tables
from vmipatch.emu.cpu.table import CLASSES
from vmipatch.errors import UsageError

__all__ = ["COMPILED", "Cpu", "Exit", "Memory"]

GENERAL = {name: i for i, name in enumerate(("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"))}
SEGMENTS = {name: i for i, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs", "tr", "ldtr"))}
CONTROL = {"cr0": 0, "cr2": 2, "cr3": 3, "cr4": 4}
DEBUG = {f"dr{i}": i for i in range(8)}
FIELDS = {
    "gdtr_base": "gdt_base",
    "gdtr_limit": "gdt_limit",
    "idtr_base": "idt_base",
    "idtr_limit": "idt_limit",
    "sysenter_cs": "sysenter_cs",
    "sysenter_esp": "sysenter_esp",
    "sysenter_eip": "sysenter_eip",
    "fctrl": "fpu_control",
    "fstat": "fpu_status",
    "ftag": "fpu_tag",
    "mxcsr": "mxcsr",
}
LONGEST_RUN = 1 << 50
# The state that save() keeps: scalars, and short arrays, of the fields of state.Core.
SAVED = (
    "eip", "flags", "res", "aux", "cs_top", "stack_mask", "cpl", "vm", "protected", "key", "user_set",
    "gdt_base", "gdt_limit", "idt_base", "idt_limit", "sysenter_cs", "sysenter_esp", "sysenter_eip",
    "efer_nx", "has_nx", "a20_mask", "cr4_allowed", "tsc_offset", "tsc_adjust", "until", "remaining",
    "shadow", "halted", "shut_down", "interrupt_pin", "nmi_pending", "nmi_blocked", "stop", "pending_trap",
    "debug_active", "watchpoints", "fpu_control", "fpu_status", "fpu_tag", "fpu_opcode", "fpu_ip", "fpu_cs",
    "fpu_dp", "fpu_ds", "mxcsr", "ferr", "reg", "sel", "base", "limit", "attr", "read_top", "write_top",
    "cr", "dr", "pdpte", "mm_low", "mm_high",
)  # fmt: skip


class Exit:
    """Why :meth:`Cpu.run` returned."""

    LIMIT = state.EXIT_LIMIT
    HALT = state.EXIT_HALT
    SHUTDOWN = state.EXIT_SHUTDOWN
    BREAKPOINT = state.EXIT_BREAKPOINT
    WATCHPOINT = state.EXIT_WATCHPOINT
    HYPERCALL = state.EXIT_HYPERCALL
    VECTOR = state.EXIT_VECTOR
    INSTRUCTION = state.EXIT_INSTRUCTION
    PORT = state.EXIT_PORT
    PAGE_WRITE = state.EXIT_PAGE_WRITE
    REQUESTED = state.EXIT_REQUESTED


@cache
def _tables() -> list[int]:
    return decoder_tables()


class Cpu(Core):  # type: ignore[misc,unused-ignore]
    """One processor.

    After :meth:`run` returned for a hook (VECTOR, INSTRUCTION, PORT,
    PAGE_WRITE, HYPERCALL) the guest is at the instruction, which is not done:
    ``exit_vector``, ``exit_error``, ``exit_kind`` (1 INT n, 2 hardware, 3
    exception), ``exit_class`` (an index of ``table.CLASSES``, plus 1),
    ``exit_length`` (bytes of the instruction), ``exit_address`` (port or linear
    address), ``exit_physical`` (backing offset of a PAGE_WRITE), ``exit_size``,
    ``exit_write`` and ``exit_value`` say what it wanted.
    """

    def __init__(self, memory: Memory, bus: object, model: str = "pentium3") -> None:
        """A processor of ``specs/processors/<model>.toml`` after RESET."""
        super().__init__(memory, bus)
        api.load_decoder(self, _tables())
        self.model = model
        self._spec = facts.load("processors", model)
        self._breakpoints: list[int] = []
        self._watchpoints: list[tuple[int, int, bool, bool]] = []
        memory.cores.append(self)  # type: ignore[attr-defined]
        self.reset()

    def reset(self) -> None:
        """The state after the RESET pin (SDM 3A, table 9-1); instructions keep counting."""
        spec = self._spec
        for r in range(8):
            api.put_reg(self, r, 0)
        api.put_reg(self, 2, spec["signature"])
        self.leaves = {int(leaf, 0): tuple(values) for leaf, values in spec["cpuid"].items()}
        self.msrs = {int(index, 0): value for index, value in spec["msrs"].items()}
        self.cr4_allowed = spec["cr4"]
        self.has_nx = int(spec["nx"])
        for name in ("efer_nx", "sysenter_cs", "sysenter_esp", "sysenter_eip", "tsc_adjust", "shadow"):
            setattr(self, name, 0)
        for name in ("halted", "shut_down", "nmi_pending", "nmi_blocked", "pending_trap", "stop", "watch_hit"):
            setattr(self, name, 0)
        api.put_eflags(self, 2)
        for which, value in ((0, 0x60000010), (2, 0), (3, 0), (4, 0)):
            api.put_control(self, which, value)
        for which, value in ((0, 0), (1, 0), (2, 0), (3, 0), (6, 0xFFFF0FF0), (7, 0x400)):
            api.put_debug(self, which, value)
        api.put_cpl(self, 0)
        for s in range(6):
            api.put_segment(self, s, 0, 0, 0xFFFF, 0x93)
        api.put_segment(self, state.CS, 0xF000, 0xFFFF0000, 0xFFFF, 0x93)
        api.put_segment(self, state.TR, 0, 0, 0xFFFF, 0x8B)
        api.put_segment(self, state.LDTR, 0, 0, 0xFFFF, 0x82)
        self.gdt_base = self.idt_base = 0
        self.gdt_limit = self.idt_limit = 0xFFFF
        self.eip = 0xFFF0
        api.reset_fpu(self)

    # --- running ---------------------------------------------------------------

    def run(self, until: int) -> int:
        """Execute until ``instructions >= until`` or something needs the host; an ``Exit`` reason.

        Raises whatever a device raised in a call of the bus.
        """
        budget = until - self.instructions
        if budget <= 0:
            return Exit.LIMIT
        at = self.linear_eip
        self.skip_break = int(at in self._breakpoints and self._left_at == at)
        reason: int = api.run_engine(self, min(budget, LONGEST_RUN), self.instructions)
        self._left_at = self.linear_eip if reason == Exit.BREAKPOINT else -1
        if self.host_error is not None:
            error, self.host_error = self.host_error, None
            raise error  # type: ignore[misc]
        return reason

    _left_at = -1

    def step(self) -> int:
        """Execute one instruction, breakpoints or not; an ``Exit`` reason (LIMIT: done)."""
        self._left_at = self.linear_eip
        return self.run(self.instructions + 1)

    @property
    def instructions(self) -> int:
        """Instructions retired since the processor was made."""
        return int(api.instruction_count(self))

    @instructions.setter
    def instructions(self, value: int) -> None:
        self.until = value
        self.remaining = 0

    @property
    def interrupt_line(self) -> bool:
        """The INTR pin."""
        return bool(self.interrupt_pin)

    @interrupt_line.setter
    def interrupt_line(self, level: bool) -> None:
        self.interrupt_pin = int(level)
        if level:
            api.stop_engine(self)

    def time_stamp(self) -> int:
        """What RDTSC reads at this instruction boundary."""
        return (self.instructions + self.tsc_offset + self.tsc_adjust) & 0xFFFFFFFF_FFFFFFFF

    def nmi(self) -> None:
        """Latch a non-maskable interrupt."""
        self.nmi_pending = 1
        api.stop_engine(self)

    def request_exit(self) -> None:
        """Make :meth:`run` return REQUESTED at the next instruction boundary."""
        self.host_stop = 1
        api.stop_engine(self)

    def set_a20(self, enabled: bool) -> None:
        """The A20M# pin."""
        mask = 0xFFFFFFFF if enabled else 0xFFEFFFFF
        if mask != self.a20_mask:
            self.a20_mask = mask
            api.drop_translations(self)

    # --- registers by name -----------------------------------------------------

    def get(self, name: str) -> int:
        """A register: general, ``eip``, ``eflags``, selectors, ``<seg>_base``/``_limit``/``_access``,
        ``cr*``, ``dr*``, ``gdtr_base`` and the like, ``cpl``, ``st0``..``st7`` (80-bit integers)."""
        if name in GENERAL:
            return int(self.reg[GENERAL[name]])
        if name == "eip":
            return int(api.current_eip(self))
        if name == "eflags":
            return int(api.read_eflags(self))
        if name in SEGMENTS:
            return int(self.sel[SEGMENTS[name]])
        if name in CONTROL:
            return int(self.cr[CONTROL[name]])
        if name in DEBUG:
            return int(self.dr[DEBUG[name]])
        if name in FIELDS:
            return int(getattr(self, FIELDS[name]))
        if name == "cpl":
            return int(self.cpl)
        segment, _, part = name.partition("_")
        if segment in SEGMENTS and part in ("base", "limit", "access"):
            return int(getattr(self, "attr" if part == "access" else part)[SEGMENTS[segment]])
        if len(name) == 3 and name.startswith("st") and name[2] in "01234567":
            return int(api.get_st(self, int(name[2])))
        raise UsageError(f"no register is called {name!r}")

    def general(self) -> tuple[int, ...]:
        """The eight general registers, in the order of their encoding."""
        return tuple(self.reg[:8])

    def selectors(self, names: Iterable[str]) -> tuple[int, ...]:
        """Segment registers by name."""
        held = self.sel
        return tuple([held[SEGMENTS[name]] for name in names])

    def set(self, name: str, value: int) -> None:
        """Set a register by name; a selector takes its hidden part along as real or V86 mode would,
        or from the descriptor table in protected mode."""
        value &= 0xFFFFFFFF if not name.startswith("st") or name == "str" else (1 << 80) - 1
        if name in GENERAL:
            api.put_reg(self, GENERAL[name], value)
        elif name == "eip":
            self.eip = value
        elif name == "eflags":
            api.put_eflags(self, value)
        elif name in SEGMENTS:
            self._set_selector(SEGMENTS[name], value & 0xFFFF)
        elif name in CONTROL:
            api.put_control(self, CONTROL[name], value)
        elif name in DEBUG:
            api.put_debug(self, DEBUG[name], value)
        elif name in FIELDS:
            setattr(self, FIELDS[name], value)
        elif name == "cpl":
            api.put_cpl(self, value & 3)
        elif len(name) == 3 and name.startswith("st") and name[2] in "01234567":
            api.put_st(self, int(name[2]), value)
        else:
            raise UsageError(f"no register is called {name!r}")

    def _set_selector(self, s: int, selector: int) -> None:
        if not self.cr[0] & 1:
            api.put_segment(self, s, selector, selector << 4, 0xFFFF, 0x93)
        elif self.vm:
            api.put_segment(self, s, selector, selector << 4, 0xFFFF, 0xF3)
        else:
            low, high = self._descriptor(selector)
            limit = low & 0xFFFF | high & 0xF0000
            limit = limit << 12 | 0xFFF if high & 0x800000 else limit
            base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
            api.put_segment(self, s, selector, base, limit, high >> 8 & 0xF0FF)
            if s == state.CS:
                api.put_cpl(self, selector & 3)

    def _descriptor(self, selector: int) -> tuple[int, int]:
        base = self.base[state.LDTR] if selector & 4 else self.gdt_base
        limit = self.limit[state.LDTR] if selector & 4 else self.gdt_limit
        if selector & 0xFFFC == 0 or selector | 7 > limit:
            return 0, 0
        at = base + (selector & 0xFFF8) & 0xFFFFFFFF
        low, high = api.peek_linear(self, at, 4), api.peek_linear(self, at + 4 & 0xFFFFFFFF, 4)
        return (0, 0) if low < 0 or high < 0 else (low, high)

    def set_segment(self, name: str, selector: int, base: int, limit: int, access: int) -> None:
        """Load a segment register and its hidden part: ``access`` is bits 40..55 of a descriptor (its
        limit bits do not count), ``limit`` is in bytes.  Loading CS sets CPL from the selector."""
        s = SEGMENTS[name]
        api.put_segment(self, s, selector, base & 0xFFFFFFFF, limit & 0xFFFFFFFF, access & 0xF0FF)
        if s == state.CS:
            api.put_cpl(self, selector & 3 if self.cr[0] & 1 else 0)

    @property
    def eflags(self) -> int:
        """EFLAGS."""
        return int(api.read_eflags(self))

    @property
    def linear_eip(self) -> int:
        """The linear address of the next instruction."""
        return int(api.current_eip(self)) + self.base[state.CS] & 0xFFFFFFFF

    def code_is_32_bit(self) -> bool:
        """CS.D."""
        return bool(self.key & 1)

    @property
    def mode(self) -> str:
        """``real``, ``protected`` or ``v86``."""
        if not self.cr[0] & 1:
            return "real"
        return "v86" if self.vm else "protected"

    # --- memory through the guest's paging --------------------------------------

    def translate(self, linear: int) -> int:
        """The backing offset behind a linear address, without side effects visible to the guest's
        program; -1 if it is not mapped or not memory."""
        saved = self.cr[2]
        place: int = api.place_of(self, linear & 0xFFFFFFFF, 0)
        if self.cr[2] != saved:
            api.put_cr2(self, saved)
        return place if place >= 0 else -1

    def read_linear(self, linear: int, length: int) -> bytes | None:
        """Bytes at a linear address; None where a page is not mapped or not memory."""
        result = bytearray()
        while length > 0:
            size = min(length, 4096 - linear % 4096)
            place = self.translate(linear)
            if place < 0:
                return None
            result += self.memory.read_backing(place, size)
            linear, length = linear + size & 0xFFFFFFFF, length - size
        return bytes(result)

    def peek(self, linear: int) -> int:
        """A word as the kernel's own load would find it, through the TLB; -1 where it is not mapped."""
        return int(api.peek_linear(self, linear & 0xFFFFFFFF, 4))

    def write_linear(self, linear: int, data: bytes) -> bool:
        """Store at a linear address, read-only pages included; False (and nothing stored in the
        page that is missing) where a page is not mapped."""
        done = 0
        while done < len(data):
            at = linear + done & 0xFFFFFFFF
            size = min(len(data) - done, 4096 - at % 4096)
            place = self.translate(at)
            if place < 0:
                return False
            self.memory.write_backing(place, data[done : done + size])
            done += size
        return True

    # --- hooks -------------------------------------------------------------------

    def add_breakpoint(self, linear: int) -> None:
        """Leave with BREAKPOINT before the instruction at a linear address."""
        if linear not in self._breakpoints:
            self._breakpoints.append(linear)
        self._arm()

    def remove_breakpoint(self, linear: int) -> None:
        """Take a breakpoint away."""
        if linear in self._breakpoints:
            self._breakpoints.remove(linear)
        self._arm()

    def _arm(self) -> None:
        if len(self._breakpoints) > 1024:
            raise UsageError("more than 1024 breakpoints")
        for index, linear in enumerate(self._breakpoints):
            api.put_break(self, index, linear & 0xFFFFFFFF)
        self.breakpoints = len(self._breakpoints)

    def add_watchpoint(self, linear: int, length: int, *, read: bool = False, write: bool = True) -> None:
        """Leave with WATCHPOINT after an instruction that touched these bytes."""
        self._watchpoints.append((linear, length, read, write))
        self._watch()

    def remove_watchpoint(self, linear: int, length: int, *, read: bool = False, write: bool = True) -> None:
        """Take a watchpoint away."""
        if (linear, length, read, write) in self._watchpoints:
            self._watchpoints.remove((linear, length, read, write))
        self._watch()

    def _watch(self) -> None:
        if len(self._watchpoints) > 16:
            self._watchpoints.pop()
            raise UsageError("more than 16 watchpoints")
        for index in range(16):
            if index < len(self._watchpoints):
                linear, length, read, write = self._watchpoints[index]
                api.put_watch(self, index, linear & 0xFFFFFFFF, length, int(read) | int(write) << 1)
            else:
                api.put_watch(self, index, 0, 0, 0)

    def hook_vector(self, vector: int, hooked: bool = True) -> None:
        """Leave with VECTOR where this interrupt or exception would be delivered."""
        api.hook_vector(self, vector & 0xFF, int(hooked))

    def hook_port(self, port: int, hooked: bool = True) -> None:
        """Leave with PORT where the guest may use this port and does."""
        api.hook_port(self, port & 0xFFFF, int(hooked))
        self.hooked_ports = 1

    def hook_instructions(self, *classes: str) -> None:
        """Leave with INSTRUCTION before instructions of these classes (``table.CLASSES``), and no others."""
        bits = 0
        for name in classes:
            if name not in CLASSES:
                raise UsageError(f"no class of instructions is called {name!r}")
            bits |= 2 << CLASSES.index(name)
        if bits != self.exit_classes:
            self.exit_classes = bits
            api.drop_code(self)

    def execute_hooked(self) -> None:
        """Let the instruction that just left with INSTRUCTION be executed after all."""
        self.skip_exit = 1

    def advance(self, length: int) -> None:
        """Move EIP over an instruction that the host has done itself, and count it."""
        self.eip = self.eip + length & 0xFFFFFFFF
        self.until += 1

    def inject(self, vector: int, kind: int = 2, error: int = 0) -> int:
        """Deliver an interrupt or exception to the guest now; 0, or an ``Exit`` reason."""
        return int(api.inject(self, vector, kind, error))

    # --- what memory calls when it changes ------------------------------------------

    def forget_page(self, page: int) -> None:
        """Drop code decoded from a backing page."""
        api.drop_page(self, page)

    def slow_writes(self) -> None:
        """Let each next write to a page pass the log and the hooks."""
        api.relog_writes(self)

    def flush(self) -> None:
        """Drop every translation: the map of memory changed."""
        api.drop_translations(self)

    def flush_page(self, linear: int) -> None:
        """Drop the translation of one page, as INVLPG does."""
        api.drop_translation(self, linear & 0xFFFFFFFF)

    # --- snapshots ------------------------------------------------------------------

    def save(self) -> Any:
        """The whole processor state, TLB included, as an opaque object."""
        return (
            {name: getattr(self, name) for name in SAVED},
            api.tlb_image(self),
            dict(self.msrs),  # type: ignore[call-overload]
        )

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned."""
        fields, tlb, msrs = saved
        for name, value in fields.items():
            # What a compiled engine takes is copied into arrays of its own.
            setattr(self, name, value if COMPILED or isinstance(value, int) else list(value))
        api.put_tlb(self, tlb)
        self.msrs = dict(msrs)
