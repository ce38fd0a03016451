"""What the tests of guests that break the rules share: actions, the ends of a run, machine-owned memory compared.

Machine-owned memory is everything from ``HOST`` on but the state page, which the guest may write.  What the
processor itself marks there does not count: accessed and dirty bits of directory entries, accessed bits of
descriptors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pagedguest import BASE, DATA, USER_AT, USER_CODE, USER_CS, USER_DS, USER_STACK_AT, PagedGuest, code

from vmipatch.emu.hypervisors import layout
from vmipatch.emu.machine.machine import Outcome

HOST = 0xF8000000
HOLE = 0xFC001000
STATE = 0xFC000000
FREE = 0x300000  # physical pages of the guest's that nothing uses
WINDOW = 0xC03F0000  # a page of the direct map that the tests map elsewhere


def owned(guest: PagedGuest) -> dict[int, bytes]:
    """Every machine-owned page that is in use, by its number, without the processor's own marks."""
    host, paging, tables = guest.personality.host, guest.personality.paging, guest.personality.tables
    free = set(host.free)
    state = (guest.personality.state.physical - HOST) // 4096
    directories = {(d.copy - HOST) // 4096 for d in paging._directories.values()}
    descriptors = {
        (page - HOST) // 4096 for number, page in tables._pages.items() if number not in (layout.IDT, layout.TSS)
    }
    pages = {}
    for number in range(layout.PAGES):
        if number in free or number == state:
            continue
        raw = bytearray(host.read(HOST + number * 4096, 4096))
        if number in directories:
            step = 8 if guest.pae else 4
            raw[::step] = bytes(byte & ~0x60 for byte in raw[::step])
        elif number in descriptors:
            raw[5::8] = bytes(byte | 1 for byte in raw[5::8])
        pages[number] = bytes(raw)
    return pages


@dataclass(frozen=True)
class Stopped:
    """The run ended with a violation of this rule, at this address where one is given."""

    rule: str
    address: int | None = None

    def check(self, guest: PagedGuest, outcome: Outcome) -> None:
        violation = guest.personality.violation
        assert (outcome.reason, violation and violation.rule) == ("violation", self.rule), describe(guest, outcome)
        assert violation is not None
        assert violation.message
        if self.address is not None:
            assert violation.address == self.address


@dataclass(frozen=True)
class Fault:
    """The guest's own handler of this vector was entered, as on the bare machine, at ring 1."""

    vector: int
    error: int | None = None

    def check(self, guest: PagedGuest, outcome: Outcome) -> None:
        assert guest.personality.violation is None, guest.personality.violation
        assert outcome.reason == "halt", describe(guest, outcome)
        words = guest.cpu.read_linear(guest.cpu.get("esp"), 8)
        assert words is not None
        assert int.from_bytes(words[:4], "little") == self.vector, describe(guest, outcome)
        if self.error is not None:
            assert int.from_bytes(words[4:], "little") == self.error
        assert guest.cpu.get("cpl") == 1


@dataclass(frozen=True)
class Harmless:
    """The guest went on, still at ring 1 (or 3), with these registers."""

    registers: tuple[tuple[str, int], ...] = ()

    def check(self, guest: PagedGuest, outcome: Outcome) -> None:
        assert guest.personality.violation is None, guest.personality.violation
        assert outcome.reason == "breakpoint", describe(guest, outcome)
        assert guest.cpu.get("cpl") in (1, 3)
        for name, value in self.registers:
            assert guest.cpu.get(name) == value & 0xFFFFFFFF, name


@dataclass(frozen=True)
class Dead:
    """The machine stopped for this reason."""

    reason: str

    def check(self, guest: PagedGuest, outcome: Outcome) -> None:
        assert outcome.reason == self.reason, describe(guest, outcome)


End = Stopped | Fault | Harmless | Dead


def describe(guest: PagedGuest, outcome: Outcome) -> str:
    """What happened, for a failing test."""
    cpu = guest.cpu
    top = cpu.read_linear(cpu.get("esp"), 16)
    where = f"CS:EIP {cpu.get('cs'):#x}:{cpu.get('eip'):#x}, stack {top.hex(' ', 4) if top else 'gone'}"
    return f"{outcome.reason}, {guest.personality.violation}, {where}, EAX {cpu.get('eax'):#x}"


Action = Callable[[PagedGuest], Outcome]
Ends = End | Mapping[str, End]
GATE = {"vmware": None, "kvm": "vmcall", "l4ka": "int 0x30", "xen": "int 0x82", "lguest": "int 0x1f"}


def started(hypervisor: str, *, pae: bool = False) -> PagedGuest:
    guest = PagedGuest(hypervisor, pae=pae)
    assert guest.init() == 0
    guest.call("SetLinearMapping", 0, eax=0, edx=BASE, ecx=0x400)
    return guest


def judge(hypervisor: str, action: Action | After, ends: Ends, *, pae: bool = False) -> None:
    guest = started(hypervisor, pae=pae)
    if isinstance(action, After):
        assert action.setup(guest).reason == "breakpoint"
        action = action.act
    before = owned(guest)
    outcome = action(guest)
    end = ends.get(hypervisor, ends.get("", None)) if isinstance(ends, Mapping) else ends
    assert end is not None
    end.check(guest, outcome)
    after = owned(guest)
    changed = [number for number in before if after.get(number, before[number]) != before[number]]
    assert not changed, f"machine-owned pages {changed} changed"
    assert guest.cpu.get("cpl") != 0


def text(*lines: str) -> Action:
    return lambda guest: guest.run("; ".join(lines), limit=2000)


def raw(prefix: str, data: str, suffix: str = "nop") -> Action:
    return lambda guest: guest.run(code(prefix) + bytes.fromhex(data) + code(suffix), limit=2000)


def call(name: str, *stack: int, **registers: int) -> Action:
    return lambda guest: guest.call(name, *stack, **registers)


def exit_to(guest: PagedGuest, number: int, **registers: int) -> Outcome:
    """The hypervisor's own exit with EAX = number (VMware: the backdoor command)."""
    name = guest.personality.name
    if name == "vmware":
        registers = {"ebx": 0, **registers, "eax": 0x564D5868, "ecx": number, "edx": 0x5658}
        return guest.run("in eax, dx", limit=2000, **registers)
    if name == "kvm":
        return guest.run(b"\x0f\x01\xc1", limit=2000, **{**registers, "eax": number})
    return guest.run(GATE[name] or "", limit=2000, **{**registers, "eax": number})


def frame(guest: PagedGuest, number: int, **registers: int) -> bytes:
    """A frame of the call gate."""
    names = ("edi", "esi", "ebp", "esp", "ebx", "edx", "ecx", "eax")
    return struct.pack("<10I", *(registers.get(name, 0) for name in names), number, BASE)


def through_gate(number: int, **registers: int) -> Action:
    """A call through the gate, whatever the hypervisor has published for it."""

    def act(guest: PagedGuest) -> Outcome:
        guest.memory.write(DATA, frame(guest, number, **registers) + bytes(16))
        return exit_to(guest, 0x564D, ebx=BASE + DATA)

    return act


def with_memory(physical: int, data: bytes, action: Action) -> Action:
    """Put bytes into guest memory first, as the guest might have long before."""

    def act(guest: PagedGuest) -> Outcome:
        guest.memory.write(physical, data)
        return action(guest)

    return act


@dataclass(frozen=True)
class After:
    """A case that begins with something that is allowed; what counts is what comes behind it."""

    setup: Action
    act: Action


def then(*actions: Action) -> Action:
    """One after the other up to the first that does not come back."""

    def act(guest: PagedGuest) -> Outcome:
        outcome = None
        for action in actions:
            outcome = action(guest)
            if outcome.reason != "breakpoint":
                break
        assert outcome is not None
        return outcome

    return act


def from_user(what: str | bytes, *, flags: int = 0x202) -> Action:
    """Run user code at ring 3."""

    def act(guest: PagedGuest) -> Outcome:
        guest.memory.write(USER_CODE, what if isinstance(what, bytes) else code(what))
        to = f"push {USER_DS}; push {USER_STACK_AT}; push {flags}; push {USER_CS}; push {USER_AT}; "
        return guest.run(to + f"mov eax, {guest.stub('IRET')}; jmp eax", limit=300)

    return act
