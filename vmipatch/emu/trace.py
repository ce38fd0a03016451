"""Traces of a run: instructions, memory, ports, interrupts and calls into a ROM.

May import :mod:`vmipatch.emu.machine` and ``vmipatch.errors``; capstone only
when instructions or memory are traced.  One event is one line of text:

``<instructions retired> <kind> <rest>``

``i`` CS:EIP, bytes, disassembly · ``m`` ``r`` or ``w``, linear address, size and
value · ``p`` ``in`` or ``out``, port, size and value · ``d`` a memory-mapped
device likewise · ``v`` the vector of a hardware interrupt · ``x`` CS:EIP of the
handler that an exception or software interrupt reached · ``c`` a call into the
ROM: its offset there, and who called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from vmipatch.emu.machine import linear
from vmipatch.errors import UsageError

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

KINDS = ("instructions", "memory", "ports", "interrupts", "calls")
STEPPED = frozenset(("instructions", "memory", "calls"))


@dataclass(frozen=True)
class Filter:
    """Which events are written.

    ``addresses``: linear addresses of instructions (first, last) · ``after``:
    only from this count of instructions on · ``ports``: (first, last) · ``rom``:
    physical range of a ROM, whose entries count as calls.
    """

    kinds: frozenset[str] = frozenset(("ports", "interrupts", "calls"))
    addresses: tuple[int, int] = (0, 0xFFFF_FFFF)
    after: int = 0
    ports: tuple[int, int] = (0, 0xFFFF)
    rom: tuple[int, int] | None = None


def parse_kinds(text: str) -> frozenset[str]:
    """Kinds from a comma-separated list; raises :class:`UsageError` for one that does not exist."""
    kinds = frozenset(KINDS if text == "all" else [kind.strip() for kind in text.split(",") if kind.strip()])
    unknown = sorted(kinds - set(KINDS))
    if unknown or not kinds:
        raise UsageError(f"no trace events {', '.join(unknown) or text!r}; there are: {', '.join(KINDS)}, all")
    return kinds


def parse_range(text: str) -> tuple[int, int]:
    """``FIRST-LAST`` or one number, decimal or 0x; raises :class:`UsageError`."""
    first, _, last = text.partition("-")
    try:
        low = int(first, 0)
        return low, int(last, 0) if last else low
    except ValueError as error:
        raise UsageError(f"not a range of numbers: {text!r}") from error


class Tracer:
    """Writes events of one machine to a text stream from :meth:`attach` on."""

    def __init__(self, machine: Machine, out: IO[str], wanted: Filter) -> None:
        self.machine = machine
        self.out = out
        self.filter = wanted
        self._decoder: dict[int, Any] = {}
        self._next: int | None = None  # where a straight-line instruction goes on
        self._was_in_rom = False

    def attach(self) -> None:
        """Start tracing."""
        if self.filter.kinds & {"ports", "interrupts"}:
            self.machine.bus.observer = self
        if self.filter.kinds & STEPPED:
            self.machine.on_instruction = self.instruction

    def _write(self, kind: str, rest: str) -> None:
        count = self.machine.cpu.instructions
        if count >= self.filter.after:
            self.out.write(f"{count} {kind} {rest}\n")

    # --- from the bus -----------------------------------------------------------------

    def port(self, port: int, size: int, value: int, write: bool) -> None:
        """A port was accessed."""
        first, last = self.filter.ports
        if "ports" in self.filter.kinds and first <= port <= last:
            self._write("p", f"{'out' if write else 'in'} {port:04x} {size} {value:0{2 * size}x}")

    def mmio(self, physical: int, size: int, value: int, write: bool) -> None:
        """A memory-mapped device was accessed."""
        if "ports" in self.filter.kinds:
            self._write("d", f"{'w' if write else 'r'} {physical:08x} {size} {value:0{2 * size}x}")

    def interrupt(self, vector: int) -> None:
        """The processor acknowledged an interrupt."""
        if "interrupts" in self.filter.kinds:
            self._write("v", f"{vector:02x}")

    # --- before every instruction --------------------------------------------------------

    def instruction(self, machine: Machine) -> None:
        """The machine is about to execute one instruction."""
        cpu = machine.cpu
        eip, base = cpu.get("eip"), cpu.get("cs_base")
        at = (base + eip) & 0xFFFF_FFFF
        if "calls" in self.filter.kinds:
            self._call(at)
        if machine.cpu.instructions < self.filter.after or not self.filter.kinds & {"instructions", "memory"}:
            return
        first, last = self.filter.addresses
        inside = first <= at <= last
        code = linear.read(machine, at, 15)
        decoded = next(self._disassembler().disasm(code, at, 1), None)
        where = f"{cpu.get('cs'):04x}:{eip:08x}"
        if self._next is not None and self._next != at and inside:
            self._write("x", where)
        self._next = None
        if decoded is None:
            if inside:
                self._write("i", f"{where} {code[:1].hex() or '??'} (undefined)")
            return
        if not decoded.groups and decoded.mnemonic.split()[0] not in ("hlt", "rep", "repe", "repne"):
            self._next = at + decoded.size
        if inside and "instructions" in self.filter.kinds:
            text = f"{decoded.mnemonic} {decoded.op_str}".strip()
            self._write("i", f"{where} {bytes(decoded.bytes).hex()} {text}")
        if inside and "memory" in self.filter.kinds:
            self._operands(decoded)

    def _disassembler(self) -> Any:
        width = 32 if self.machine.cpu.code_is_32_bit() else 16
        if width not in self._decoder:
            import capstone

            mode = capstone.CS_MODE_32 if width == 32 else capstone.CS_MODE_16
            self._decoder[width] = capstone.Cs(capstone.CS_ARCH_X86, mode)
            self._decoder[width].detail = True
        return self._decoder[width]

    def _operands(self, decoded: Any) -> None:
        import capstone
        from capstone import x86

        if decoded.id in (x86.X86_INS_LEA, x86.X86_INS_NOP):
            return
        for operand in decoded.operands:
            if operand.type != x86.X86_OP_MEM:
                continue
            at = self._address(decoded, operand.mem)
            value = linear.read(self.machine, at, operand.size)
            text = value[::-1].hex() or "not present"
            for bit, letter in ((capstone.CS_AC_READ, "r"), (capstone.CS_AC_WRITE, "w")):
                if operand.access & bit:
                    # The value is what stands there before the instruction.
                    self._write("m", f"{letter} {at:08x} {operand.size} {text}")

    def _address(self, decoded: Any, memory: Any) -> int:
        get = self.machine.cpu.get

        def value(register: int) -> int:
            name = decoded.reg_name(register) if register else ""
            if not name:
                return 0
            return int(get(name) if name.startswith("e") else get("e" + name) & 0xFFFF)

        offset = value(memory.base) + value(memory.index) * memory.scale + memory.disp
        offset &= 0xFFFF_FFFF if decoded.addr_size == 4 else 0xFFFF
        if memory.segment:
            segment = decoded.reg_name(memory.segment)
        else:
            stack = decoded.reg_name(memory.base) if memory.base else ""
            segment = "ss" if stack in ("esp", "ebp", "bp") else "ds"
        return int(get(f"{segment}_base") + offset) & 0xFFFF_FFFF

    def _call(self, at: int) -> None:
        rom = self.filter.rom
        if rom is None:
            return
        physical = linear.translate(self.machine, at)
        inside = physical is not None and rom[0] <= physical <= rom[1]
        if inside and not self._was_in_rom:
            stack = (self.machine.cpu.get("ss_base") + self.machine.cpu.get("esp")) & 0xFFFF_FFFF
            back = int.from_bytes(linear.read(self.machine, stack, 4), "little")
            self._write("c", f"+{(physical or 0) - rom[0]:04x} return {back:08x}")
        self._was_in_rom = inside
