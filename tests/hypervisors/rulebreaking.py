"""What the tests of guests that break the rules share: machine-owned memory compared, and the ends of a run.

Machine-owned memory is everything from ``HOST`` on but the state page, which the guest may write.  What the
processor itself marks there does not count: accessed and dirty bits of directory entries, accessed bits of
descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagedguest import PagedGuest

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
