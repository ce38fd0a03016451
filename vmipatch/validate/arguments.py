"""What a call is given in a trial: for each op, arguments that a kernel could mean, and how to see their effect.

May import states and subject.  Each function fills in one :class:`State`; the ABI says which register or stack
word an argument is in, and a site's translation where the stack words come from.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from vmipatch.validate.states import ARITHMETIC, IF, State, Surroundings
from vmipatch.validate.subject import Subject

DATA_SEGMENT = 0x00CF_F200  # high word: present, DPL 3, writable, flat, 4 KiB units
SCRATCH_PORT, DEBUG_PORT = 0x3FF, 0xE9
TPR, APIC, LOW_PRIORITY = 0x80, 0xFEE0_0000, 0x10
PERIODIC = 0x100
MARK = b"mark"


class Given:
    """One state being filled in.

    ``turn`` decides what has two cases that must both come up: chance would miss one of them in a few states. It
    changes with every second number, for interrupts are on in every second one.
    """

    def __init__(self, subject: Subject, around: Surroundings, state: State, rng: random.Random, number: int) -> None:
        self.subject, self.around, self.state, self.rng = subject, around, state, rng
        self.turn = bool(number & 2)
        self.call = subject.call
        self.stack: dict[int, int] = {}

    def put(self, index: int, value: int) -> None:
        """The call's argument of that index (of ``Call.args``) is this."""
        if index >= len(self.call.args):
            return
        name = self.call.args[index]
        value &= 0xFFFF_FFFF
        if not name.isdigit():
            self.state.registers[name] = value
            return
        word = int(name) // 4 - 1
        self.stack[word] = value
        if not self.subject.is_call and word < len(self.subject.arguments):
            source = self.subject.arguments[word]
            if isinstance(source, str):
                self.state.registers[source] = value

    def spare(self, index: int) -> int:
        """The linear address of a spare page."""
        return self.around.spare[index][0]

    def frame(self, index: int) -> int:
        """The frame number of a spare page."""
        return self.around.spare[index][1] >> 12

    def write(self, linear: int, data: bytes) -> None:
        """Memory that both runs start with."""
        self.state.writes.append((linear, data))


Maker = Callable[[Given], None]
MAKERS: dict[str, Maker] = {}


def op(*names: str) -> Callable[[Maker], Maker]:
    """Register a function under calls' names."""

    def register(maker: Maker) -> Maker:
        for name in names:
            MAKERS[name] = maker
        return maker

    return register


def arrange(subject: Subject, around: Surroundings, state: State, rng: random.Random, number: int) -> None:
    """Fill in what the call needs for its state of that number; a call without an entry here takes anything."""
    given = Given(subject, around, state, rng, number)
    maker = MAKERS.get(subject.call.name)
    if maker is not None:
        maker(given)
    if subject.is_call and given.stack:
        words = [given.stack.get(i, 0) for i in range(max(given.stack) + 1)]
        state.stack = (*words, *state.stack[len(words) :])


# --- interrupts ---------------------------------------------------------------------------


@op("SetInterruptMask", "RestoreIRQs", "SetEFLAGS")
def interrupt_mask(g: Given) -> None:
    # Only IF is acted on (VMI's document, appendix A); the processor's POPF would take the others too.
    g.put(0, g.state.flags & ~(IF | ARITHMETIC) | (IF if g.turn else 0) | g.rng.getrandbits(12) & ARITHMETIC)


@op("IRET")
def iret(g: Given) -> None:
    flags = 2 | g.rng.getrandbits(12) & ARITHMETIC | g.rng.choice((0, IF)) | g.rng.choice((0, 0x400))
    if g.turn and g.around.user_cs and g.around.user_ds:
        eip = g.around.user_page + g.rng.randrange(4096)
        g.state.stack = (eip, g.around.user_cs, flags | IF, 0xBF80_0000, g.around.user_ds)
    else:
        eip = g.around.spare[0][0]
        g.state.stack = (eip, g.around.kernel_cs, flags, 0x1111_1111, 0x2222_2222)
        g.state.kernel_words = [1]
    g.state.destination = eip
    g.state.exact_flags = ARITHMETIC | 0x400


@op("SYSEXIT", "StiSysexit")
def sysexit(g: Given) -> None:
    g.state.registers["edx"] = g.state.destination = g.around.user_page + 0x40
    g.state.registers["ecx"] = 0xBF80_0000
    g.state.sysenter_cs = g.around.kernel_cs & ~3
    # The processor's SYSEXIT leaves the data segments alone: the kernel has the user's in them by then.
    g.state.segments = {"ds": g.around.user_ds, "es": g.around.user_ds, "fs": 0, "gs": 0}
    if g.around.user_cs != g.state.sysenter_cs + 16 | 3:
        g.state.possible = False


@op("Halt")
def halt(g: Given) -> None:
    # With an interrupt waiting that the halt itself lets in, it comes back.
    if g.rng.random() < 0.7:
        g.state.flags &= ~IF
        g.state.pending = True


# --- descriptor tables --------------------------------------------------------------------


@op("SetGDT")
def set_gdt(g: Given) -> None:
    base, limit = g.around.gdt
    if g.turn:
        g.write(g.spare(1), g.around.gdt_bytes)
        base = g.spare(1)
    g.write(g.spare(0), struct.pack("<HI", limit, base))
    g.put(0, g.spare(0))


@op("SetIDT")
def set_idt(g: Given) -> None:
    base, limit = g.around.idt
    if g.turn:
        g.write(g.spare(1), g.around.idt_bytes)
        base = g.spare(1)
    g.write(g.spare(0), struct.pack("<HI", limit, base))
    g.put(0, g.spare(0))


@op("GetGDT", "GetIDT")
def get_table(g: Given) -> None:
    g.put(0, g.spare(0) + 8 * g.rng.randrange(64))


@op("SetLDT")
def set_ldt(g: Given) -> None:
    index = _free(g)
    if not index or g.rng.random() < 0.3:
        g.put(0, g.rng.choice((0, g.around.ldt)))
        return
    _system_descriptor(g, index, g.spare(0), 0xFFF, 0x82)
    g.put(0, 8 * index)


@op("SetTR")
def set_tr(g: Given) -> None:
    # LTR wants a TSS that is not busy: the one in force, or the same under another selector.
    g.state.possible = bool(g.around.tss_selector & 0xFFFC)
    index = _free(g)
    if index and g.rng.random() < 0.7:
        _system_descriptor(g, index, g.around.tss, 0x67, 0x89)
        g.put(0, 8 * index)
        return
    at = g.around.gdt[0] + (g.around.tss_selector & 0xFFF8) + 5
    g.write(at, b"\x89")
    g.put(0, g.around.tss_selector & 0xFFFC)


def _free(g: Given) -> int:
    """The last unused entry of the GDT; 0 if there is none."""
    raw = g.around.gdt_bytes
    return max((i for i in range(1, len(raw) // 8) if not any(raw[8 * i : 8 * i + 8])), default=0)


def _system_descriptor(g: Given, index: int, base: int, limit: int, access: int) -> None:
    low, high = (base & 0xFFFF) << 16 | limit & 0xFFFF, base & 0xFF00_0000 | access << 8 | base >> 16 & 0xFF
    g.write(g.around.gdt[0] + 8 * index, struct.pack("<II", low, high))


@op("WriteGDTEntry")
def write_gdt(g: Given) -> None:
    free = [i for i in range(1, (g.around.gdt[1] + 1) // 8) if not any(g.around.gdt_bytes[8 * i : 8 * i + 8])]
    index = g.rng.choice(free or [1])
    _descriptor(g, g.around.gdt[0] if free else g.spare(0), index)


@op("WriteLDTEntry")
def write_ldt(g: Given) -> None:
    _descriptor(g, g.spare(0), g.rng.randrange(512))


def _descriptor(g: Given, table: int, index: int) -> None:
    base, limit = g.rng.getrandbits(28), g.rng.getrandbits(16)
    g.put(0, table)
    g.put(1, index)
    g.put(2, (base & 0xFFFF) << 16 | limit)
    g.put(3, base & 0xFF00_0000 | DATA_SEGMENT & ~0xF0000 | g.rng.randrange(16) << 16 | base >> 16 & 0xFF)
    g.state.probes.append(table + 8 * index)


@op("WriteIDTEntry")
def write_idt(g: Given) -> None:
    index = g.rng.randrange(0xD0, 0xF0)
    g.put(0, g.around.idt[0])
    g.put(1, index)
    g.put(2, g.around.kernel_cs << 16 | g.rng.getrandbits(16))
    g.put(3, 0xC000_8E00 | g.rng.getrandbits(12) << 16)


@op("UpdateKernelStack")
def update_kernel_stack(g: Given) -> None:
    # The kernel writes its TSS itself, and then says so.
    g.state.possible = bool(g.around.tss_selector & 0xFFFC)
    esp = g.around.esp & ~0xFFF | g.rng.getrandbits(10) << 2
    g.put(0, g.around.kernel_ds & ~3 if g.subject.generation == 3 else g.around.tss)
    g.put(1, esp)
    g.write(g.around.tss + 4, struct.pack("<I", esp))


# --- registers ----------------------------------------------------------------------------


@op("SetCR0")
def set_cr0(g: Given) -> None:
    g.put(0, g.around.cr0 ^ g.rng.choice((0, 8, 8, 2, 0x10000, 0x40000)))
    g.state.check = _task_switched


@op("CLTS")
def clts(g: Given) -> None:
    g.state.cr0 = g.around.cr0 | g.rng.choice((0, 8, 8))
    g.state.check = _task_switched


@op("STTS")
def stts(g: Given) -> None:
    g.state.cr0 = g.around.cr0 & ~8
    g.state.check = _task_switched


@op("LMSW")
def lmsw(g: Given) -> None:
    g.put(0, g.around.cr0 & 0xFFFF ^ g.rng.choice((0, 8)))
    g.state.check = _task_switched


def _task_switched(p: Any) -> str:
    """TS decides what the next x87 instruction does, so the processor must have it as the guest does."""
    real, seen = p.machine.cpu.get("cr0") & 8, p.view()["cr0"] & 8
    return "" if real == seen else f"TS is {real >> 3} in the processor and {seen >> 3} for the guest"


@op("SetCR3")
def set_cr3(g: Given) -> None:
    directory = g.around.cr3
    if g.turn and g.around.directory:
        g.write(g.spare(2), g.around.directory)
        directory = g.around.spare[2][1]
    g.put(0, directory)
    g.state.probes.append(g.around.gdt[0])


@op("SetCR4")
def set_cr4(g: Given) -> None:
    g.put(0, g.around.cr4 ^ g.rng.choice((0, 0x80, 8)))


def _debug_register(g: Given) -> int:
    """Native code has the number in its ModRM byte: a site is about one register."""
    code = g.subject.native
    if not g.subject.is_call and code[:1] == b"\x0f" and code[1] in (0x21, 0x23):
        return code[2] >> 3 & 7
    return g.rng.choice((0, 1, 2, 3, 6, 7))


@op("SetDR")
def set_dr(g: Given) -> None:
    number = _debug_register(g)
    g.put(0, number)
    g.put(1, 0x400 | g.rng.getrandbits(8) & 0x55 if number == 7 else g.rng.getrandbits(31))
    if number == 7:
        # What it switches on must not be where the trial itself goes.
        g.state.debug = (0, 0, 0, 0)


@op("GetDR")
def get_dr(g: Given) -> None:
    g.put(0, _debug_register(g))
    g.state.debug = (0x1000, 0x2000, 0x3000, 0x4000)


@op("CPUID")
def cpuid(g: Given) -> None:
    g.put(0, g.rng.choice((0, 1, 2)))
    g.put(1, 0)


@op("RDMSR")
def rdmsr(g: Given) -> None:
    g.put(0, g.rng.choice((0x174, 0x175, 0x176)))


@op("WRMSR")
def wrmsr(g: Given) -> None:
    g.put(0, g.rng.choice((0x174, 0x175, 0x176)))
    g.put(1, 0)
    g.put(2, g.rng.getrandbits(16))


@op("RDPMC")
def rdpmc(g: Given) -> None:
    g.put(0, g.rng.choice((0, 1)))


@op("SetIOPLMask")
def set_iopl_mask(g: Given) -> None:
    g.put(0, g.rng.randrange(4) << 12)


# --- page tables --------------------------------------------------------------------------


def _place(g: Given) -> int:
    """An entry: a live one of a page that nobody uses, or one of a page that is no table yet."""
    if g.around.pte and g.turn:
        return g.around.pte
    return g.spare(0) + 8 * g.rng.randrange(512)


def _entry(g: Given) -> int:
    return g.rng.choice((0, g.frame(1) << 12 | 0x63, g.frame(2) << 12 | 0x67, g.frame(3) << 12 | 0x25))


@op("SetPxE", "SetPxE0", "SetPte")
def set_pxe(g: Given) -> None:
    later = len(g.call.args) == 3
    g.put(1 if later else 0, _place(g))
    g.put(0 if later else 1, _entry(g))
    g.put(2, 1)


@op("SetPxELong", "SetPxELong0", "SetPteLong", "SwapPxELongAtomic", "SwapPteLong")
def set_pxe_long(g: Given) -> None:
    g.put(0, _entry(g))
    g.put(1, 0)
    g.put(2, _place(g) if g.around.entry_size == 8 else g.spare(0) + 8 * g.rng.randrange(512))
    g.put(3, 1)


@op("SwapPxE", "SwapPte")
def swap_pxe(g: Given) -> None:
    g.put(0, _place(g))
    g.put(1, _entry(g))


@op("GetPxE", "GetPxELong", "GetPteVal", "GetPdeVal", "UpdatePxE", "UpdatePxELong", "DeactivatePxELongAtomic")
def one_entry(g: Given) -> None:
    at = _place(g) if g.around.entry_size == 8 or "Long" not in g.call.name else g.spare(0) + 8 * g.rng.randrange(500)
    if at != g.around.pte:
        g.write(at, struct.pack("<II", _entry(g), 0))
    g.put(0, at)
    g.put(1, 1)


@op(
    "TestAndSetPxEBit", "TestAndClearPxEBit", "TestAndSetPxELongBit", "TestAndClearPxELongBit",
    "TestAndSetPteBit", "TestAndClearPteBit", "TestAndSetPteLongBit", "TestAndClearPteLongBit",
)  # fmt: skip
def entry_bit(g: Given) -> None:
    at = _place(g)
    if at != g.around.pte:
        g.write(at, struct.pack("<I", _entry(g)))
    g.put(0, at)
    g.put(1, g.rng.choice((1, 5, 6, 9, 10, 11)))


@op("AllocatePage")
def allocate_page(g: Given) -> None:
    frame = g.frame(0)
    is_table = g.rng.random() < 0.7
    g.put(0, frame)
    g.put(1, 1 if is_table else 2)
    for index in (2, 3, 4):
        g.put(index, 0)
    if is_table:

        def check(p: Any) -> str:
            if p.paging.is_guarded(frame) or not p.told_of_tables:
                return ""
            return "the page is not guarded as a page table"

        g.state.check = check


@op("ReleasePage")
def release_page(g: Given) -> None:
    frame = g.frame(0)
    g.put(0, frame)
    g.put(1, 1)
    g.state.before = lambda p: p.paging.allocate(frame, True)
    g.state.check = lambda p: "the page is still guarded" if p.told_of_tables and p.paging.is_guarded(frame) else ""


@op("InvalPage", "FlushTLB", "FlushTLBAll")
def stale_translation(g: Given) -> None:
    # A translation that the table has left behind: after the call the new one must be seen.
    g.put(0, g.spare(0) if g.call.name == "InvalPage" else g.rng.choice((1, 3)))
    if g.around.pte:
        entry = g.around.spare[1][1] | 0x63
        g.state.warm.append(g.spare(0))
        g.write(g.spare(1), MARK)
        g.write(g.around.pte, struct.pack("<I", entry))
        g.state.probes.append(g.spare(0))


@op("SetLinearMapping")
def set_linear_mapping(g: Given) -> None:
    slot, linear, pages, frame = g.rng.randrange(4), g.rng.getrandbits(20) << 12, g.rng.getrandbits(8), 0x100
    for index, value in enumerate((slot, linear, pages, frame)):
        g.put(index, value)
    wanted = struct.pack("<III", linear, pages << 12, frame << 12)

    def check(p: Any) -> str:
        held = p.state.get("maps").to_bytes(64, "little")[16 * slot : 16 * slot + 12]
        return "" if held == wanted else f"the mapping of slot {slot} is {held.hex()}, not {wanted.hex()}"

    g.state.check = check


@op("PhysToMachine", "MachineToPhys", "PhysIsCoherent")
def address(g: Given) -> None:
    g.put(0, g.rng.getrandbits(24) << 12)


@op("SetLazyMode")
def lazy_mode(g: Given) -> None:
    mode = g.rng.randrange(3)
    g.put(0, mode)
    g.state.check = lambda p: "" if p.lazy_mode == mode else f"the lazy mode is {p.lazy_mode}, not {mode}"


@op("FlushDeferredCalls")
def flush_deferred(g: Given) -> None:
    g.put(0, 0x80)
    g.state.ignore_results = True


# --- ports --------------------------------------------------------------------------------


@op("INB", "INW", "IN", "INL")
def port_in(g: Given) -> None:
    g.put(0, {"INB": g.rng.choice((SCRATCH_PORT, 0x21, 0x61)), "INW": 0x3FE}.get(g.call.name, 0x3FC))


@op("OUTB", "OUTW", "OUT", "OUTL")
def port_out(g: Given) -> None:
    g.put(0, g.rng.getrandbits(32))
    g.put(1, g.rng.choice((SCRATCH_PORT, DEBUG_PORT)) if g.call.name == "OUTB" else DEBUG_PORT)


@op("INS", "INSB", "INSW", "INSL", "OUTS", "OUTSB", "OUTSW", "OUTSL")
def string(g: Given) -> None:
    g.state.flags &= ~0x400
    reading = g.call.name.startswith("IN")
    at = g.spare(0) + 16 * g.rng.randrange(64)
    if not reading:
        g.write(at, g.rng.randbytes(32))
    g.put(0, at)
    g.put(1, 0x3FC if reading else DEBUG_PORT)
    g.put(2, g.rng.randrange(5))


# --- processors, APIC, time ---------------------------------------------------------------


@op("SetInitialAPState")
def initial_state(g: Given) -> None:
    content = g.rng.randbytes(0x5A)
    g.write(g.spare(0) + 0x80, content)
    g.put(0, g.spare(0) + 0x80)
    g.put(1, 1)
    g.state.check = lambda p: "" if p.processors.get(1) == content else "the state of processor 1 is not kept"


def _apic_register(g: Given) -> int:
    if g.subject.generation == 3:
        return TPR
    g.write(g.around.pte, struct.pack("<I", APIC | 0x7B))
    return g.spare(0) + TPR


@op("APICWrite")
def apic_write(g: Given) -> None:
    if g.subject.generation != 3 and not g.around.pte:
        g.state.possible = False
        return
    g.state.of_machine = g.subject.generation != 3
    value = g.rng.getrandbits(4) << 4
    g.put(0, _apic_register(g))
    g.put(1, value)
    g.state.check = lambda p: "" if p.machine.board.apic.tpr == value else "the task priority is not what was written"


@op("APICRead")
def apic_read(g: Given) -> None:
    if g.subject.generation != 3 and not g.around.pte:
        g.state.possible = False
        return
    g.state.of_machine = g.subject.generation != 3
    g.put(0, _apic_register(g))
    # A priority that holds no interrupt back: the native run, which reads nothing, does not have it.
    g.state.before = lambda p: p.machine.bus.memory_write(APIC + TPR, 4, LOW_PRIORITY)
    g.state.ignore_results = True
    g.state.check = lambda p: "" if p.machine.cpu.get("eax") == LOW_PRIORITY else "not the task priority"


@op("GetCycleFrequency")
def cycle_frequency(g: Given) -> None:
    g.state.ignore_results = True
    g.state.check = lambda p: _wide(p, 1_000_000_000 // p.machine.options.ns_per_instruction, 0)


@op("GetCycleCounter")
def cycle_counter(g: Given) -> None:
    kind = g.rng.choice((0, 1, 2))
    g.put(0, kind)
    g.state.time_results = kind != 2


@op("RDTSC")
def rdtsc(g: Given) -> None:
    g.state.time_results = True


@op("GetWallclockTime")
def wallclock(g: Given) -> None:
    g.state.ignore_results = True
    g.state.check = lambda p: _wide(p, p.alarms.wallclock(), 1_000_000)


def _wide(p: Any, wanted: int, tolerance: int) -> str:
    got = p.machine.cpu.get("eax") | p.machine.cpu.get("edx") << 32
    return "" if abs(got - wanted) <= tolerance else f"EDX:EAX is {got}, not {wanted}"


@op("SetAlarm")
def set_alarm(g: Given) -> None:
    flags = g.rng.choice((0, 1)) | g.rng.choice((0, PERIODIC))
    expiry = (1 << 40) + g.rng.getrandbits(36)
    period = g.rng.getrandbits(33)
    for index, value in enumerate((flags, expiry, expiry >> 32, period, period >> 32)):
        g.put(index, value)
    wanted = (expiry, period if flags & PERIODIC else 0)

    def check(p: Any) -> str:
        held = p.alarms.armed(flags)
        return "" if held == wanted else f"the alarm is {held}, not {wanted}"

    g.state.check = check


@op("CancelAlarm")
def cancel_alarm(g: Given) -> None:
    flags = g.rng.choice((0, 1))
    g.put(0, flags)
    g.state.before = lambda p: p.alarms.set(flags, 1 << 50, 0)
    g.state.ignore_results = True

    def check(p: Any) -> str:
        if p.alarms.armed(flags) is not None:
            return "the alarm is still set"
        return "" if p.machine.cpu.get("eax") == 1 else "EAX does not say that there was an alarm"

    g.state.check = check
