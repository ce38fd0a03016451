"""Random calls, hypercalls and privileged instructions: the host never fails, and the guest never gets out.

Whatever the registers and pointers are, a run ends for a reason that a guest can give, at ring 1 or 3; and what the
processor loads from and walks - tables of descriptors, gates, pages - still keeps the guest below the hole and
out of machine-owned memory.  Seeded, so that a failure repeats; the failing steps are printed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from pagedguest import (
    BASE,
    CODE,
    DATA,
    DEPRIVILEGED,
    DIRECTORY,
    GDT,
    IDT,
    LDT,
    MAPPED,
    PDPT,
    STACK_TOP,
    TABLES,
    PagedGuest,
)
from rulebreaking import FREE, HOLE, HOST, STATE, exit_to, started

from vmipatch.emu.hypervisors import layout
from vmipatch.errors import VmipatchError

BOTH = pytest.mark.parametrize("pae", [False, True], ids=["two-level", "pae"])
ALL = pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
ROUNDS, STEPS = 60, 6
ENDS = {"breakpoint", "violation", "halt", "asleep", "limit", "triple fault", "poweroff", "reset", "debug exit"}
NUMBERS = {
    "xen": (0, 1, 2, 3, 5, 8, 9, 10, 17, 23, 26, 29, 33),
    "lguest": (0, 2, 4, 5, 6, 7, 8, 10, 13, 14, 15, 18, 19),
    "kvm": (1, 2, 3),
    "vmware": (10, 45),
    "l4ka": (0x564D,),
}
# Privileged and table instructions with room for one operand: opcode bytes, kind of what follows.
INSTRUCTIONS = [
    *[(f"0f22{0xC0 | cr << 3 | r:02x}", "") for cr in (0, 2, 3, 4) for r in (0, 3)],
    *[(f"0f20{0xC0 | cr << 3:02x}", "") for cr in (0, 2, 3, 4)],
    *[(f"0f23{0xC0 | dr << 3 | 3:02x}", "") for dr in range(8)],
    *[(f"0f01{reg << 3 | 5:02x}", "pointer") for reg in (0, 1, 2, 3, 4, 6, 7)],
    *[(f"0f00{reg << 3 | 5:02x}", "pointer") for reg in range(6)],
    *[(f"8e{0xC0 | s << 3:02x}", "") for s in (0, 2, 3, 4, 5)],
    *[(text, "") for text in ("0f06", "0f08", "0f09", "0f30", "0f32", "0f33", "0f31", "0fa2", "0f34", "0f35")],
    *[(text, "") for text in ("fa", "fb", "f4", "cf", "cb", "9c", "9d", "ec", "ed", "ee", "ef", "6c", "6d", "6e")],
    *[(text, "") for text in ("6f", "f3ab", "f3a5", "f36c", "f36f", "0f01c1", "cc", "ce", "0f0b", "60", "61")],
    ("f00fc70f", ""),
    ("cd", "byte"), ("ea", "far"), ("9a", "far"), ("8705", "pointer"), ("ff35", "pointer"), ("8f05", "pointer"),
    ("c705", "pointer word"), ("0fb235", "pointer"), ("0f0b78656e0fa2", ""),
]  # fmt: skip


class Fuzz:
    """One guest, and random numbers that are more often near something than not."""

    def __init__(self, hypervisor: str, pae: bool, seed: str) -> None:
        self.guest = started(hypervisor, pae=pae)
        self.base = self.guest.machine.snapshot()
        self.random = random.Random(seed)
        self.log: list[str] = []
        self.hole_table = self.guest.personality.paging._hole_table
        self.hole_entries = self.guest.personality.host.read(self.hole_table, 4096)

    def number(self) -> int:
        pick = self.random
        near = (
            0, 1, 8, 64, HOLE, STATE, HOST, BASE, BASE + DATA, BASE + FREE, BASE + GDT, BASE + IDT, BASE + LDT,
            BASE + TABLES, BASE + DIRECTORY, BASE + PDPT, BASE + MAPPED, BASE + STACK_TOP, DATA, FREE, TABLES,
            DIRECTORY, PDPT, HOST >> 12, FREE >> 12, TABLES >> 12, DIRECTORY >> 12, 0x60, 0x68, 0x73, 0x7B, 0x80,
            0x88, 0x80010011, 0x30, 0x7FF0, 0xFFFFFFFF, 0x80000000, 0x174, 0x1B, 0x64, 0x510, 0x518, 0x92, 0xCFC,
        )  # fmt: skip
        kind = pick.random()
        if kind < 0.6:
            value = pick.choice(near)
            if pick.random() < 0.4:
                value += pick.randint(-16, 16)
            if pick.random() < 0.2:
                value |= pick.choice((1, 3, 7, 0x83, 0x10, 0x1000))
        elif kind < 0.8:
            value = pick.randrange(300)
        else:
            value = pick.getrandbits(32)
        return value & 0xFFFFFFFF

    def registers(self) -> dict[str, int]:
        return {name: self.number() for name in ("ebx", "ecx", "edx", "esi", "edi", "ebp")}

    def memory(self) -> None:
        """Random words where pointers often point, and somewhere on the stack."""
        words = struct.pack("<64I", *(self.number() for _ in range(64)))
        self.guest.memory.write(self.random.choice((DATA, DATA, FREE, STACK_TOP - 0x100)), words)

    def fresh(self) -> None:
        self.guest.machine.restore(self.base)
        self.log.clear()

    # --- steps ----------------------------------------------------------------------------

    def gate_call(self) -> str:
        """A call through the gate, its frame mostly where one can be."""
        guest, number = self.guest, self.random.randrange(78)
        words = [self.number() for _ in range(8)]
        guest.memory.write(DATA, struct.pack("<12I", *words, number, *(self.number() for _ in range(3))))
        at = BASE + DATA if self.random.random() < 0.95 else self.number()
        self.log.append(f"gate {number} {[hex(w) for w in words]} at {at:#x}")
        return exit_to(guest, 0x564D, ebx=at).reason

    def hypercall(self) -> str:
        self.memory()
        guest, registers = self.guest, self.registers()
        number = self.random.choice(NUMBERS[guest.personality.name])
        if self.random.random() < 0.3:
            registers["ebx"] = self.random.randrange(16)
        if self.random.random() < 0.5:
            registers |= {"ecx": self.random.randrange(4), "edx": 0, "esi": 0x7FF0}
        self.log.append(f"hypercall {number} { {n: hex(v) for n, v in registers.items()} }")
        return exit_to(guest, number, **registers).reason

    def instruction(self) -> str:
        self.memory()
        prefix, what = self.random.choice(INSTRUCTIONS)
        raw = bytes.fromhex(prefix)
        if what == "byte":
            raw += bytes([self.random.randrange(256)])
        elif what == "far":
            raw += struct.pack(
                "<IH", self.number(), self.random.choice((0x30, 0x60, 0x73, 0x80, self.number() & 0xFFFF))
            )
        elif what:
            raw += struct.pack("<I", self.number())
            raw += struct.pack("<I", self.number()) if "word" in what else b""
        registers = {"eax": self.number(), **self.registers()}
        if self.random.random() < 0.2:
            registers["esp"] = self.number()
        if prefix.startswith("f3"):
            registers["ecx"] &= 0xFFF
        self.log.append(f"{raw.hex()} { {n: hex(v) for n, v in registers.items()} }")
        return self.guest.run(raw, limit=40, **registers).reason

    def call(self) -> str:
        """A call of the ROM's stub, as a kernel makes it."""
        guest = self.guest
        names = sorted(s.name for s in guest.rom.symbols if s.name in guest.personality.abi.calls)
        name = self.random.choice(names)
        registers = {"eax": self.number(), **self.registers()}
        stack = [self.number() for _ in range(2)]
        self.log.append(f"{name} {stack} { {n: hex(v) for n, v in registers.items()} }")
        raw = b"".join(b"\x68" + struct.pack("<I", word) for word in stack)
        raw += b"\xe8" + struct.pack("<i", guest.stub(name) - (BASE + CODE) - len(raw) - 5) + b"\x8d\x64\x24\x08"
        return guest.run(raw, limit=20_000, **registers).reason

    # --- what must hold ---------------------------------------------------------------------

    def check(self, reason: str) -> None:
        guest = self.guest
        assert reason in ENDS, reason
        assert guest.cpu.get("cpl") in (1, 3)
        assert guest.cpu.a20_mask == 0xFFFFFFFF
        personality = guest.personality
        if reason == "violation":
            assert personality.violation is not None
            assert personality.violation.message
        descriptors(guest)
        assert personality.host.read(self.hole_table, 4096) == self.hole_entries
        for linear, physical in mapped(guest):
            assert linear >= STATE or not HOST <= physical < HOST + 0x800000, f"{linear:#x} -> {physical:#x}"


def descriptors(guest: PagedGuest) -> None:
    """GDT, LDT, IDT and TSS, as the processor has them, give nothing above ring 1 or above the hole."""
    tables, host = guest.personality.tables, guest.personality.host
    for number, page in tables.hole_pages():
        words = struct.unpack("<1024I", host.read(page, 4096))
        for low, high in zip(words[::2], words[1::2], strict=True) if number != layout.TSS else ():
            if not high & 0x8000:
                continue
            assert high & 0x6000, "nothing for ring 0"
            if number == layout.IDT:
                assert high >> 8 & 0x1F in (7, 15)
                continue
            assert high & 0x1000, "no system segments"
            limit = low & 0xFFFF | high & 0xF0000
            limit = limit << 12 | 0xFFF if high & 0x800000 else limit
            base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
            # Or it begins behind all that the hole shows, and goes on round the end of the address space.
            assert base + limit < HOLE or (base >= 0xFC030000 and base + limit < (1 << 32) + HOLE)
            assert high & 0xC00 != 0x400, "no expand-down segments"
    tss = host.read(dict(tables.hole_pages())[layout.TSS], 4096)
    esp, ss = struct.unpack_from("<II", tss, 12)
    assert ss & 3 or not esp
    assert not any((*tss[:12], *tss[20:102], *tss[104:]))
    cpu = guest.cpu
    assert (cpu.get("gdtr_base"), cpu.get("idtr_base")) == (0xFC010000, 0xFC001000)
    assert cpu.get("tr_base") == 0xFC002000
    assert cpu.get("ldtr_base") in (0, 0xFC020000)


def mapped(guest: PagedGuest) -> Iterator[tuple[int, int]]:
    """Linear and physical address of every page that the processor could reach, by its own tables."""
    memory, size = guest.memory, 8 if guest.pae else 4
    shape = "<512Q" if guest.pae else "<1024I"
    reach = 21 if guest.pae else 22
    roots = [e & ~0xFFF if e & 1 else 0 for e in list(guest.cpu.pdpte)[:4]] if guest.pae else [guest.cpu.get("cr3")]
    for top, directory in enumerate(roots):
        if not directory:
            continue
        for i, entry in enumerate(struct.unpack(shape, memory.read(directory, 4096))):
            linear = top << 30 | i << reach
            if not entry & 1:
                continue
            if entry & 0x80:
                for part in (0, (1 << reach) - 4096):
                    yield linear + part, (entry & ~((1 << reach) - 1) & 0xFFFFFFFF) + part
                continue
            if entry >> 12 & (1 << 24 if size == 8 else 1 << 20) - 1 >= 1 << 20:
                continue
            for j, leaf in enumerate(struct.unpack(shape, memory.read(entry & 0xFFFFF000, 4096))):
                if leaf & 1 and leaf >> 32 & 0xF == 0:
                    yield linear + j * 4096, leaf & 0xFFFFF000


def play(fuzz: Fuzz, *kinds: str) -> None:
    for _ in range(ROUNDS):
        fuzz.fresh()
        try:
            for _ in range(STEPS):
                reason = getattr(fuzz, fuzz.random.choice(kinds))()
                fuzz.check(reason)
                if reason != "breakpoint":
                    break
        except (Exception, AssertionError) as error:
            if isinstance(error, VmipatchError):
                raise
            raise AssertionError(f"{type(error).__name__}: {error}\n" + "\n".join(fuzz.log)) from error


@ALL
@BOTH
def test_gate_calls(hypervisor: str, pae: bool) -> None:
    play(Fuzz(hypervisor, pae, f"gate {hypervisor} {pae}"), "gate_call")


@ALL
@BOTH
def test_hypercalls(hypervisor: str, pae: bool) -> None:
    play(Fuzz(hypervisor, pae, f"hypercall {hypervisor} {pae}"), "hypercall")


@ALL
@BOTH
def test_instructions(hypervisor: str, pae: bool) -> None:
    play(Fuzz(hypervisor, pae, f"instruction {hypervisor} {pae}"), "instruction")


@ALL
@BOTH
def test_everything_mixed(hypervisor: str, pae: bool) -> None:
    play(Fuzz(hypervisor, pae, f"mixed {hypervisor} {pae}"), "call", "gate_call", "hypercall", "instruction")


@ALL
@pytest.mark.parametrize("abi", ["vmi-3.0", "vmi-13.0"])
def test_forged_roms(hypervisor: str, abi: str) -> None:
    """The init call reads a ROM that the guest may have made: any bytes give an answer."""
    guest = PagedGuest(hypervisor, abi)
    base = guest.machine.snapshot()
    pick = random.Random(f"roms {hypervisor} {abi}")
    layout_at = int.from_bytes(guest.rom.data[0x2A:0x2C], "little")
    answers = set()
    for _ in range(150):
        guest.machine.restore(base)
        forged = bytearray(guest.rom.data)
        for _ in range(pick.randint(1, 6)):
            at = pick.choice((pick.randrange(len(forged)), pick.randrange(0x40), layout_at + pick.randrange(200)))
            forged[at] = pick.choice((0, 0xFF, pick.randrange(256)))
        guest.memory.write(FREE, bytes(forged))
        answers.add(guest.personality.start(BASE + FREE))
        assert guest.cpu.get("cpl") == int(guest.personality.active)
        if guest.personality.active:
            descriptors(guest)
    assert {0, 1, 2} <= answers <= {0, 1, 2, 3}
