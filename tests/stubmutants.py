"""Stubs of a built ROM, each broken in three ways, and what the validation of sites makes of them.

A mutant is a set of bytes over the ROM in the test stand's memory, and the address that the call then leads to:
a wrapper in the ROM area behind the image stands for a stub that does one thing too many.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmipatch.isa import decode
from vmipatch.rombuild.build import build
from vmipatch.rombuild.hypervisor import names
from vmipatch.validate.compare import differs
from vmipatch.validate.demonstration import FORMS, guest
from vmipatch.validate.stand import Stand
from vmipatch.validate.states import Maker, look_around
from vmipatch.validate.subject import REGISTERS, Subject
from vmipatch.validate.trial import Trial
from vmipatch.validate.validation import Request, open_all, stand_for

__all__ = ["KINDS", "Mutant", "Verdict", "examine", "names", "stand", "survey", "table"]

KINDS = ("returns at once", "corrupts", "wrong")
RET, PUSHFD, POPFD, NOP = b"\xc3", b"\x9c", b"\x9d", b"\x90"
FREE = 0x3800
"""Offset behind every ROM of ours in the 16 KiB that its PAM register makes visible."""
NUMBERS = {name: number for number, name in enumerate(REGISTERS)}
EXITS = ("in", "out", "int", "vmcall")
PRIVILEGED = ("sti", "cli", "clts", "wbinvd", "invd", "iret", "hlt")
# Which argument (index into Call.args) a wrong call gets wrong, and in which bits; the first and 0x8 if not here.
WRONG = {
    "SetInterruptMask": (0, 0x200),
    "WriteGDTEntry": (2, 0x10),
    "WriteLDTEntry": (2, 0x10),
    "WriteIDTEntry": (2, 0x10),
    "UpdateKernelStack": (1, 0x40),
    "SetDR": (1, 0x10),
    "SetTR": (0, 0x8),
    "WRMSR": (2, 0x10),
    "SetIOPLMask": (0, 0x1000),
    "OUT": (0, 1),
    "OUTB": (0, 1),
    "OUTW": (0, 1),
    "SetAlarm": (1, 0x10),
    "CancelAlarm": (0, 1),
    "SetInitialAPState": (1, 2),
    "APICWrite": (1, 0x10),
    "AllocatePage": (0, 1),
    "ReleasePage": (0, 1),
    "InvalPage": (0, 0x1000),
    "SetCR3": (0, 0x1000),
    "FlushTLB": (0, 3),
    "SYSEXIT": (1, 0x10),
    "SetLinearMapping": (1, 0x1000),
}


@dataclass(frozen=True)
class Mutant:
    """One broken stub: ``start`` is the linear address that the call leads to, ``code`` what is stored first."""

    op: str
    kind: str
    start: int
    code: tuple[tuple[int, bytes], ...]
    what: str


Source = Callable[[Stand, Subject], Iterable[Mutant]]


@dataclass
class Verdict:
    """What the states of one mutant showed: how many saw it, of how many, and the first difference.

    ``reason``: why it may survive; empty if it may not.
    """

    mutant: Mutant
    seen: int = 0
    states: int = 0
    difference: str = ""
    reason: str = ""


def stand(folder: Path, hypervisor: str, form: str, abi: str, moments: int = 2) -> tuple[Stand, list[Subject]]:
    """A test stand of the example guest on a fresh ROM, and all its subjects."""
    rom = folder / f"{hypervisor}-{abi}.rom"
    rom.write_bytes(build(hypervisor, abi).data)
    return stand_for(open_all(Request(guest(form), rom, memory_mib=16, moments=moments)))


def mutants(stand: Stand, subject: Subject) -> Iterator[Mutant]:
    """The three of one call, as far as there is something to break."""
    call, at = subject.call, subject.address
    free = (stand.rom + FREE) & 0xFFFF_FFFF
    yield Mutant(subject.op, KINDS[0], at, ((at, RET),), "ret")
    kept = [r for r in ("ebp", "edi", "esi", "ebx") if r not in call.may_change and r not in call.args]
    if kept:
        code = bytes((0xF7, 0xD0 + NUMBERS[kept[0]])) + _jump(free + 2, at)
        yield Mutant(subject.op, KINDS[1], free, ((free, code),), f"not {kept[0]}")
    yield from _wrong(stand, subject, free)


def _jump(source: int, target: int, opcode: int = 0xE9) -> bytes:
    return struct.pack("<BI", opcode, target - source - 5 & 0xFFFF_FFFF)


def _wrong(stand: Stand, subject: Subject, free: int) -> Iterator[Mutant]:
    """A wrong result, else a wrong argument, else a stub without one of its effects, whichever is on the way."""
    call, at = subject.call, subject.address
    if call.results and not any(a.isdigit() for a in call.args) and not call.jump:
        result = call.results[0]
        code = _jump(free, at, 0xE8) + bytes((0xF7, 0xD0 + NUMBERS[result])) + RET
        yield Mutant(subject.op, KINDS[2], free, ((free, code),), f"result: not {result}")
    elif call.args:
        index, bits = WRONG.get(subject.op, (0, 8))
        name = call.args[index]
        if name.isdigit():
            # After PUSHFD, the word is four bytes further up.
            body = b"\x81\x74\x24" + struct.pack("<BI", int(name) + 4, bits)
        else:
            body = bytes((0x81, 0xF0 + NUMBERS[name])) + struct.pack("<I", bits)
        code = PUSHFD + body + POPFD
        yield Mutant(subject.op, KINDS[2], free, ((free, code + _jump(free + len(code), at)),), f"{name} ^ {bits:#x}")
    else:
        yield from _without_effect(stand, subject)


def _without_effect(stand: Stand, subject: Subject) -> Iterator[Mutant]:
    for found in _reachable(stand, subject.address):
        mnemonic, _, operands = found.text.partition(" ")
        left = operands.split(",")[0]
        writes = "[" in left and mnemonic not in ("cmp", "test", "push", "bt")
        if writes or mnemonic in EXITS or mnemonic.startswith(PRIVILEGED):
            yield Mutant(subject.op, KINDS[2], subject.address, ((found.address, NOP * len(found.code)),), found.text)


def _reachable(stand: Stand, start: int) -> Iterator[decode.Instruction]:
    """Every instruction of the ROM that a stub can come to."""
    rom = stand.setup.rom
    seen: set[int] = set()
    waiting = [start]
    while waiting and len(seen) < 400:
        at = waiting.pop()
        offset = (at - stand.rom) & 0xFFFF_FFFF
        if at in seen or offset >= len(rom):
            continue
        seen.add(at)
        for found in decode.disassemble(rom[offset : offset + 16], 32, at):
            yield found
            mnemonic, _, operand = found.text.partition(" ")
            if operand.startswith("0x") and mnemonic.startswith(("j", "call", "loop")):
                waiting.append(int(operand, 16))
            if not mnemonic.startswith(("jmp", "ret", "iret", "sysexit")):
                waiting.append(at + len(found.code))
            break


def examine(folder: Path, hypervisor: str, form: str, states: int = 6) -> tuple[str, list[Verdict]]:
    """All of one ROM: the ABI's name, and the verdicts."""
    abi = FORMS[form]
    ready, subjects = stand(folder, hypervisor, form, abi)
    verdicts = survey(ready, subjects, states)
    for v in verdicts:
        v.reason = reason(hypervisor, v)
    return abi, verdicts


def survey(stand: Stand, subjects: Sequence[Subject], states: int, source: Source = mutants) -> list[Verdict]:
    """Every mutant of every call, from ``states`` states at each moment."""
    trial = Trial(stand)
    pairs = [(m, s) for s in subjects if s.is_call for m in source(stand, s)]
    verdicts = {mutant: Verdict(mutant) for mutant, _ in pairs}
    for base in stand.bases:
        stand.machine.restore(base.native)
        around = look_around(stand.machine, stand.page_offset)
        maker = Maker(around)
        natives = []
        for mutant, subject in pairs:
            for number in range(states):
                state = maker.make(subject, number, [])
                if state.possible:
                    # The same bytes lie in both memories, but only the patched run comes by.
                    state.writes.extend(mutant.code)
                    native = trial.native(subject, state, base.native)
                    if native.end != "fault":
                        natives.append((mutant, subject, state, native))
        for mutant, subject, state, native in natives:
            patched = trial.lowered(replace(subject, address=mutant.start), state, base.lowered)
            difference = differs(subject, state, around, native, patched, base.native.memory)
            verdict = verdicts[mutant]
            verdict.states += 1
            if difference is not None:
                verdict.seen += 1
                verdict.difference = verdict.difference or str(difference)
    # Of the several instructions that could be left out, the one that matters stands for all.
    best: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts.values():
        key = verdict.mutant.op, verdict.mutant.kind
        if key not in best or verdict.seen > best[key].seen:
            best[key] = verdict
    return list(best.values())


# Why nothing can be seen of a mutant, by (op, kind); a hypervisor in front means it alone.
CACHES = "caches are not modelled, and a write-back shows in no register or memory"
NO_RETURN = "the call does not come back, so there is nobody whose registers could be wrong"
EMULATED = "the entry's own write is caught and emulated where it is made; nothing is left to do"
DELAY = "a pause, with no effect but time"
NOTHING = "without a hypervisor there is nothing to tell: the stub is a plain return"
NOTHING_NATIVELY = (
    *("UpdateKernelStack", "AllocatePage", "ReleasePage", "SetLinearMapping", "SetInitialAPState"),
    *("GetCycleFrequency", "SetAlarm", "CancelAlarm", "GetWallclockTime"),
)
SURVIVORS: dict[tuple[str, str], str] = {
    ("WBINVD", KINDS[0]): CACHES,
    ("WBINVD", KINDS[2]): CACHES,
    ("INVD", KINDS[0]): CACHES,
    ("INVD", KINDS[2]): CACHES,
    ("Pause", KINDS[0]): DELAY,
    ("Pause", KINDS[2]): DELAY,
    ("IODelay", KINDS[0]): DELAY,
    ("IODelay", KINDS[2]): DELAY,
    ("Reboot", KINDS[1]): NO_RETURN,
    ("Shutdown", KINDS[1]): NO_RETURN,
    ("Reboot", KINDS[2]): "the argument is how to restart, hard or soft; the machine restarts either way",
    ("UpdatePxE", KINDS[0]): EMULATED,
    ("UpdatePxE", KINDS[2]): EMULATED,
    ("UpdatePxELong", KINDS[0]): EMULATED,
    ("UpdatePxELong", KINDS[2]): EMULATED,
    ("FlushTLB", KINDS[2]): "native code and all hypervisors flush whatever the argument says, as they may",
    ("FlushDeferredCalls", KINDS[0]): "no call is deferred, so none is there to flush",
    ("FlushDeferredCalls", KINDS[2]): "the result is published nowhere, and no guest looks at it",
    ("lguest:AllocatePage", KINDS[0]): "lguest is not told of page tables: the stub is a plain return",
    ("lguest:AllocatePage", KINDS[2]): "lguest is not told of page tables: the stub is a plain return",
    ("lguest:ReleasePage", KINDS[0]): "lguest is not told of page tables: the stub is a plain return",
    ("lguest:ReleasePage", KINDS[2]): "lguest is not told of page tables: the stub is a plain return",
}


def reason(hypervisor: str, verdict: Verdict) -> str:
    """Why a mutant may survive; empty if it may not."""
    op, kind = verdict.mutant.op, verdict.mutant.kind
    if hypervisor == "native" and op in NOTHING_NATIVELY and kind != KINDS[1]:
        return NOTHING
    return SURVIVORS.get((f"{hypervisor}:{op}", kind), SURVIVORS.get((op, kind), ""))


def table(hypervisor: str, abi: str, verdicts: Sequence[Verdict]) -> str:
    """One line a call, three columns; then the survivors, each with its reason."""
    by_op: dict[str, dict[str, Verdict]] = {}
    for v in verdicts:
        by_op.setdefault(v.mutant.op, {})[v.mutant.kind] = v
    lines = [f"{hypervisor}, {abi}", f"{'call':<26}{''.join(k.ljust(24) for k in KINDS)}"]
    for op, kinds in by_op.items():
        cells = [_cell(kinds.get(kind)) for kind in KINDS]
        lines.append(f"{op:<26}{''.join(c.ljust(24) for c in cells)}".rstrip())
    alive = [v for v in verdicts if not v.seen]
    counts = Counter(bool(v.seen) for v in verdicts)
    lines.append(f"{len(verdicts)} mutants: {counts[True]} named, {counts[False]} survive")
    for v in alive:
        lines.append(f"  survives: {v.mutant.op}, {v.mutant.kind} ({v.mutant.what}): {v.reason or 'NO REASON'}")
    return "\n".join(lines)


def _cell(v: Verdict | None) -> str:
    if v is None:
        return "-"
    return f"named {v.seen}/{v.states}" if v.seen else f"SURVIVES 0/{v.states}"
