"""What to show of a guest that died: registers, and the last instructions before the end.

May import the rest of this package; capstone when it disassembles.  The engine
keeps no history.  A run is repeatable, so the last instructions come from a
second run of the same machine that stops shortly before the end and steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from vmipatch.emu.machine import linear
from vmipatch.emu.machine.machine import Machine

GENERAL = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip", "eflags")
CONTROL = ("cr0", "cr2", "cr3", "cr4")
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
SHOWN = 16


def registers(machine: Machine) -> dict[str, int]:
    """General, control and segment registers with the segments' bases and limits."""
    get = machine.cpu.get
    names = [*GENERAL, *CONTROL]
    for name in SEGMENTS:
        names += [name, f"{name}_base", f"{name}_limit"]
    names += ["gdtr_base", "gdtr_limit", "idtr_base", "idtr_limit"]
    return {name: int(get(name)) for name in names}


def register_lines(values: dict[str, int]) -> list[str]:
    """The registers as text."""
    general = [f"{name} {values[name]:08x}" for name in (*GENERAL, *CONTROL)]
    lines = ["  ".join(general[at : at + 5]) for at in range(0, len(general), 5)]
    lines += [
        f"{name} {values[name]:04x} base {values[f'{name}_base']:08x} limit {values[f'{name}_limit']:08x}"
        for name in SEGMENTS
    ]
    for name in ("gdtr", "idtr"):
        lines.append(f"{name} base {values[f'{name}_base']:08x} limit {values[f'{name}_limit']:04x}")
    return lines


def disassemble(machine: Machine) -> str:
    """The instruction at CS:EIP as one line."""
    import capstone

    cpu = machine.cpu
    eip = cpu.get("eip")
    at = (cpu.get("cs_base") + eip) & 0xFFFF_FFFF
    code = linear.read(machine, at, 15)
    mode = capstone.CS_MODE_32 if cpu.code_is_32_bit() else capstone.CS_MODE_16
    decoded = next(capstone.Cs(capstone.CS_ARCH_X86, mode).disasm_lite(code, at, 1), None)
    where = f"{cpu.get('cs'):04x}:{eip:08x}"
    if decoded is None:
        return f"{where}  {code[:4].hex() or '(no page)'}"
    _, size, mnemonic, operands = decoded
    return f"{where}  {code[:size].hex():<20}  {mnemonic} {operands}".rstrip()


def last_instructions(build: Callable[[], Machine], end: int, count: int = SHOWN) -> list[str]:
    """Run a machine that ``build`` makes up to shortly before ``end`` and note what it executes.

    ``end`` is the instruction count of the first run's end; the last line is
    the instruction that did not complete.
    """
    machine = build()
    if end > count:
        machine.run(limit=end - count)
    lines: deque[str] = deque(maxlen=count + 1)
    machine.on_instruction = lambda machine: lines.append(disassemble(machine))
    machine.run(limit=end + 1)
    return list(lines)
