"""What must agree between the two runs of one state, and the first thing that does not.

May import trial, states, subject and the emulator's saved memory.  Not compared: registers and flags that the call
may change, the dead stack below ESP, the marks that the processor leaves in tables (accessed, dirty, busy), and what
is the hypervisor's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmipatch.emu.machine.snapshot import SavedMemory
from vmipatch.validate.states import ARITHMETIC, IF, IOPL, State, Surroundings
from vmipatch.validate.subject import REGISTERS, Subject
from vmipatch.validate.trial import PAGE, SELECTORS, Result

RF = 0x10000
TIME_TOLERANCE = 100_000
DEAD_STACK = 1024
RESULT_MASK = {"GetInterruptMask": IF, "SaveAndDisableIRQs": IF, "GetEFLAGS": IF, "GetLDT": 0xFFFC, "GetTR": 0xFFFC}
MARKS = 0x60
# Left to trap and emulation, as the real ones do it (docs/abis.md); tables that are written in place are guarded.
TRAPS = {
    **dict.fromkeys(("IN", "INB", "INW", "INL"), "in"),
    **dict.fromkeys(("OUT", "OUTB", "OUTW", "OUTL"), "out"),
    **dict.fromkeys(("INS", "INSB", "INSW", "INSL", "OUTS", "OUTSB", "OUTSW", "OUTSL"), "ins, outs"),
    "RDMSR": "rdmsr",
    "WRMSR": "wrmsr",
    "RDPMC": "rdpmc",
    "RDTSC": "rdtsc",
}
WRITERS = ("SetPxE", "SetPte", "Swap", "TestAnd", "Deactivate", "Write", "SetGDT", "SetLDT", "SetIDT")
# Shutdown is CLI and HLT natively, and Reboot may be nothing at all: the kernel's own way stands behind it.
ENDS = {("halt", "off"), ("done", "reset")}


@dataclass(frozen=True)
class Difference:
    """The first thing that differs: ``what``, and its value natively and patched."""

    what: str
    native: str
    patched: str

    def __str__(self) -> str:
        return f"{self.what}: {self.native} natively, {self.patched} patched"


def differs(
    subject: Subject, state: State, around: Surroundings, native: Result, patched: Result, ram: SavedMemory
) -> Difference | None:
    """None if the two runs agree; ``ram`` is the memory that both began with."""
    if patched.effect:
        return Difference("the effect", "as asked", patched.effect)
    if (native.end, native.detail) != (patched.end, patched.detail):
        both = (native.end, patched.end)
        fitting = both[0] != "halt" or native.detail == "interrupts off"
        if both not in ENDS or not fitting or subject.call.name not in ("Shutdown", "Reboot"):
            return Difference("the end", _end(native), _end(patched))
    if native.interrupts != patched.interrupts:
        return Difference("interrupts taken", _vectors(native), _vectors(patched))
    if native.end != "done" or patched.end != "done":
        return None
    return (
        _registers(subject, state, native, patched)
        or _flags(subject, state, native, patched)
        or _view(native, patched)
        or _memory(subject, state, around, native, patched, ram)
        or _rest(subject, state, native, patched)
    )


def _end(result: Result) -> str:
    return f"{result.end} {result.detail}".strip()


def _vectors(result: Result) -> str:
    return ", ".join(f"{vector:#x}" for vector in result.interrupts) or "none"


def _hex(value: int) -> str:
    return f"{value:#x}"


def _registers(subject: Subject, state: State, native: Result, patched: Result) -> Difference | None:
    call = subject.calls[-1]
    results = set().union(*(c.results for c in subject.calls))
    free = frozenset().union(*(c.may_change for c in subject.calls))
    for name, a, b in zip(REGISTERS, native.registers, patched.registers, strict=True):
        if name in results:
            if state.ignore_results or (state.time_results and name in ("eax", "edx")):
                continue
            mask = RESULT_MASK.get(call.name, RESULT_MASK.get(subject.call.name, 0xFFFF_FFFF))
            if a & mask != b & mask:
                return Difference(name, _hex(a), _hex(b))
        elif name not in free and a != b:
            return Difference(name, _hex(a), _hex(b))
    if state.time_results:
        times = [r.registers[0] | r.registers[2] << 32 for r in (native, patched)]
        if abs(times[0] - times[1]) > TIME_TOLERANCE:
            return Difference("the time in EDX:EAX", _hex(times[0]), _hex(times[1]))
    if native.eip != patched.eip:
        return Difference("eip", _hex(native.eip), _hex(patched.eip))
    for name, a, b in zip(SELECTORS, native.selectors, patched.selectors, strict=True):
        if a & 0xFFFC != b & 0xFFFC or (a & 3 == 3) != (b & 3 == 3):
            return Difference(name, _hex(a), _hex(b))
    return None


def _flags(subject: Subject, state: State, native: Result, patched: Result) -> Difference | None:
    free = ARITHMETIC & ~state.exact_flags if any("flags" in c.may_change for c in subject.calls) else 0
    mask = 0x3F_7FD5 & ~(free | IF | IOPL | RF)
    a, b = native.flags & mask, patched.flags & mask
    return None if a == b else Difference("flags", _hex(a), _hex(b))


def _view(native: Result, patched: Result) -> Difference | None:
    for name, a in native.view.items():
        b = patched.view[name]
        if name in ("ldtr", "tr", "stack_ss"):
            a, b = a & 0xFFFC, b & 0xFFFC
        if a != b:
            return Difference(f"the guest's {name}", _hex(a), _hex(b))
    return None


def _memory(
    subject: Subject, state: State, around: Surroundings, native: Result, patched: Result, ram: SavedMemory
) -> Difference | None:
    if native.written == patched.written:
        return None
    for page in sorted({*native.written, *patched.written}):
        a, b = (result.written.get(page) or ram.page(page) for result in (native, patched))
        for at in _unequal(a, b):
            one, other = a[at : at + 4], b[at : at + 4]
            if not _excused(subject, state, around, page * PAGE + at, one, other):
                return Difference(f"memory at physical {page * PAGE + at:#x}", one.hex(), other.hex())
    return None


def _unequal(one: bytes, other: bytes) -> Iterator[int]:
    """Offsets of the aligned words in which two pages differ, lowest first."""
    bits = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    while bits:
        word = (bits & -bits).bit_length() - 1 >> 5
        yield 4 * word
        bits = bits >> 32 * (word + 1) << 32 * (word + 1)


def _excused(
    subject: Subject, state: State, around: Surroundings, physical: int, native: bytes, patched: bytes
) -> bool:
    one, other = int.from_bytes(native, "little"), int.from_bytes(patched, "little")
    linear = around.page_offset + physical
    if not subject.is_call and subject.address - 4 < linear < subject.address + subject.length:
        return True  # the site itself
    if around.stack - DEAD_STACK <= linear < around.stack:
        return True
    if state.kernel_words and around.stack <= linear < around.stack + 64:
        return one ^ other == 1  # a selector of the kernel in a frame that the state itself made
    base, limit = around.gdt
    if base <= linear <= base + limit and (linear - base) % 8 == 4:
        # The processor marks segments accessed and tasks busy, in the copies here.
        return (one ^ other) & ~0x300 == 0
    return physical >> 12 in around.table_frames and (one ^ other) & ~MARKS == 0


def _rest(subject: Subject, state: State, native: Result, patched: Result) -> Difference | None:
    for linear, a, b in zip(state.probes, native.probes, patched.probes, strict=True):
        if a != b:
            return Difference(f"what is at {linear:#x}", a.hex() if a else "nothing", b.hex() if b else "nothing")
    if native.debug_console != patched.debug_console:
        return Difference("the debug console", native.debug_console.hex(), patched.debug_console.hex())
    allowed = {TRAPS.get(c.name, "") for c in subject.calls}
    if any(c.name.startswith(WRITERS) or "PxE" in c.name for c in subject.calls):
        allowed.add("guarded write")
    unexpected = sorted(set(patched.traps) - allowed)
    if unexpected:
        return Difference("privileged instructions outside the interface", "none", ", ".join(unexpected))
    return None
