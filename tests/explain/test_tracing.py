"""ftrace and kprobes on a made-up 64-bit text: what records, trampolines and probes in the dump prove, and what not."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.corewriter import core
from tests.elfwriter import ElfWriter
from vmipatch.annotate import Site
from vmipatch.annotate.site import Mcount
from vmipatch.explain import Memory, probes, tracing
from vmipatch.explain.ground import Ground
from vmipatch.explain.running import Running
from vmipatch.image import Image, open_image

TEXT, DATA = 0xFFFFFFFF81000000, 0xFFFFFFFF82000000
CALLER, REGS, STUB, CALLBACK, OTHER = TEXT, TEXT + 0x40, TEXT + 0x80, TEXT + 0x90, TEXT + 0xA0
TRACE_FUNCTION = DATA + 0x80
SITES = [TEXT + 0x200 + 0x20 * n for n in range(16)]
POOL = 0xFFFF888000100000
"""Memory outside the image: records, probes."""
MODULES = 0xFFFFFFFFC0000000
"""Where trampolines and detours are."""
NOP = bytes.fromhex("0F1F440000")
ENABLED, REGS_EN, TRAMP_EN, DIRECT_EN = 1 << 31, 1 << 29, 1 << 27, 1 << 23


def near(opcode: int, address: int, target: int) -> bytes:
    return bytes((opcode,)) + struct.pack("<i", target - address - 5)


def code_of_callers() -> bytes:
    """ftrace_caller and ftrace_regs_caller: different beginnings, and a call in each."""
    one = b"\x9c" + b"\x48\x83\xec\x08" * 6 + near(0xE8, CALLER + 25, STUB)
    two = b"\x9c" + b"\x48\x83\xec\x10" * 6 + near(0xE8, REGS + 25, STUB)
    return one.ljust(0x40, b"\xc3") + two.ljust(0x40, b"\xc3")


def text_on_disk() -> bytes:
    text = bytearray(b"\xc3" * 0x1000)
    text[: len(code_of_callers())] = code_of_callers()
    for site in SITES:
        text[site - TEXT : site - TEXT + 5] = NOP
    return bytes(text)


def image_of(folder: Path, *, variable: bool) -> Image:
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", text_on_disk(), address=TEXT, flags="ax", align=4096)
    data = bytearray(0x1000)
    struct.pack_into("<Q", data, TRACE_FUNCTION - DATA, STUB)
    elf.section(".data", bytes(data), address=DATA, flags="aw", align=4096)
    for name, address in (
        ("ftrace_caller", CALLER), ("ftrace_call", CALLER + 25), ("ftrace_regs_caller", REGS),
        ("ftrace_regs_call", REGS + 25), ("ftrace_stub", STUB), ("callback", CALLBACK), ("other", OTHER),
    ):  # fmt: skip
        elf.symbol(name, address, ".text", size=16)
    if variable:
        elf.symbol("ftrace_trace_function", TRACE_FUNCTION, ".data", size=8)
    path = folder / f"vmlinux{int(variable)}"
    path.write_bytes(elf.build())
    return open_image(path)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return image_of(tmp_path_factory.mktemp("kernel"), variable=True)


class Machine:
    """Text, data, a pool and trampolines; what is put there is in the dump."""

    def __init__(self) -> None:
        self.parts = {TEXT: bytearray(text_on_disk()), DATA: bytearray(0x1000), POOL: bytearray(0x2000)}
        self.parts[MODULES] = bytearray(0x1000)
        self.put(TRACE_FUNCTION, struct.pack("<Q", STUB))

    def put(self, address: int, code: bytes) -> None:
        base = max(b for b in self.parts if b <= address)
        self.parts[base][address - base : address - base + len(code)] = code

    def records(self, flags: dict[int, int], place: int = POOL + 0x100) -> None:
        self.put(place, b"".join(struct.pack("<QQ", site, flags.get(n, 0)) for n, site in enumerate(SITES)))

    def traced(self, image: Image, folder: Path, *, jumps: bool = False) -> tuple[set[int], list[int]]:
        """Addresses that stay unexplained, by 32 bytes; and those that were proved."""
        ground, running = self.compared(image, folder)
        sites = [Site("mcount", s, 5, "f", "", "", n, Mcount(0)) for n, s in enumerate(SITES)]
        proved = tracing.prove(ground, running, sites, jumps=jumps)
        return {a & ~0x1F for a, _ in ground.differences()}, [p.address for p in proved]

    def probed(self, image: Image, folder: Path) -> tuple[list[int], list[str]]:
        ground, running = self.compared(image, folder)
        proved = probes.prove(ground, running)
        return [a for a, _ in ground.differences()], [p.cause for p in proved]

    def compared(self, image: Image, folder: Path) -> tuple[Ground, Running]:
        dump = folder / "dump"
        dump.write_bytes(core([(address, (1 << 64) - 1, bytes(data)) for address, data in self.parts.items()]))
        running = Running(image, Memory(dump), 0, None, "made")
        return Ground(image, TEXT, text_on_disk(), bytes(self.parts[TEXT])), running


def test_the_flags_of_a_record_say_which_caller(image: Image, tmp_path: Path) -> None:
    for flags, right, wrong in ((1, CALLER, REGS), (1 | REGS_EN, REGS, CALLER)):
        for target, left in ((right, set()), (wrong, {SITES[3]})):
            machine = Machine()
            machine.put(SITES[3], near(0xE8, SITES[3], target))
            machine.records({3: ENABLED | flags})
            assert machine.traced(image, tmp_path) == (left, [] if left else [SITES[3]])
    # A record of its own trampoline accounts for no call of the common one.
    machine = Machine()
    machine.put(SITES[3], near(0xE8, SITES[3], CALLER))
    machine.records({3: ENABLED | TRAMP_EN | 1})
    assert machine.traced(image, tmp_path)[0] == {SITES[3]}


def test_trampolines_are_copies_of_the_callers(image: Image, tmp_path: Path) -> None:
    place = MODULES + 0x100
    machine = Machine()
    machine.put(SITES[2], near(0xE8, SITES[2], place))
    machine.records({2: ENABLED | TRAMP_EN | 1})
    assert machine.traced(image, tmp_path)[0] == {SITES[2]}  # zeros are there
    machine.put(place, b"\x90" * 24)
    assert machine.traced(image, tmp_path)[0] == {SITES[2]}
    machine.put(place, code_of_callers()[:64])
    assert machine.traced(image, tmp_path) == (set(), [SITES[2]])
    # A direct trampoline is anybody's code; its record must say so.
    machine.put(place, b"\x90" * 24)
    machine.records({2: ENABLED | DIRECT_EN | 1})
    assert machine.traced(image, tmp_path) == (set(), [SITES[2]])
    # Newer kernels may jump to it, older ones never do; to a trampoline of ftrace's own nobody jumps.
    machine.put(SITES[2], near(0xE9, SITES[2], place))
    assert machine.traced(image, tmp_path)[0] == {SITES[2]}
    assert machine.traced(image, tmp_path, jumps=True) == (set(), [SITES[2]])
    machine.put(place, code_of_callers()[:64])
    machine.records({2: ENABLED | TRAMP_EN | 1})
    assert machine.traced(image, tmp_path, jumps=True)[0] == {SITES[2]}
    machine.put(place, b"\x90" * 24)
    machine.records({2: ENABLED | DIRECT_EN | 1})
    # Inside the kernel's own text no trampoline is.
    machine.put(SITES[2], near(0xE8, SITES[2], OTHER))
    assert machine.traced(image, tmp_path)[0] == {SITES[2]}
    machine.put(SITES[2], near(0xE8, SITES[2], MODULES + 0x100000))
    assert machine.traced(image, tmp_path)[0] == {SITES[2]}


def test_an_address_alone_is_no_record(image: Image, tmp_path: Path) -> None:
    """Any word may hold a site's address with such flags behind it; records stand among their neighbours."""
    machine = Machine()
    machine.put(SITES[4], near(0xE8, SITES[4], CALLER))
    machine.put(
        POOL + 0x800, struct.pack("<QQQQ", 0x1234, 0x1234, SITES[4], ENABLED | 1) + struct.pack("<QQ", 0x1234, 0)
    )
    assert machine.traced(image, tmp_path)[0] == {SITES[4]}
    machine.records({4: ENABLED | 1})
    assert machine.traced(image, tmp_path)[0] == set()
    machine.records({4: 1})
    assert machine.traced(image, tmp_path)[0] == {SITES[4]}


def test_records_in_many_blocks_are_all_found(image: Image, tmp_path: Path) -> None:
    machine = Machine()
    for n, site in enumerate(SITES):
        machine.put(site, near(0xE8, site, CALLER))
        # Two neighbours a block, and the blocks in no order.
        place = POOL + 0x100 * (n // 2 * 5 % 8) + 16 * (n % 2)
        machine.put(place, struct.pack("<QQ", site, ENABLED | 1 if n != 11 else 1))
    assert machine.traced(image, tmp_path)[0] == {SITES[11]}


@pytest.mark.parametrize("variable", [True, False])
def test_the_callback_is_what_the_variable_holds(tmp_path: Path, variable: bool) -> None:
    image = image_of(tmp_path, variable=variable)
    machine = Machine()
    machine.put(SITES[0], near(0xE8, SITES[0], CALLER))
    machine.records({0: ENABLED | 1})
    machine.put(CALLER + 25, near(0xE8, CALLER + 25, CALLBACK))
    assert machine.traced(image, tmp_path)[0] == {CALLER}
    machine.put(TRACE_FUNCTION, struct.pack("<Q", CALLBACK))
    assert machine.traced(image, tmp_path) == (set(), [SITES[0], CALLER + 25])
    machine.put(TRACE_FUNCTION, struct.pack("<Q", OTHER))
    assert machine.traced(image, tmp_path)[0] == {CALLER}


PROBE, HEAD = POOL + 0x400, DATA + 0x400


def probe(machine: Machine, address: int, opcode: int, detour: int = 0, *, pprev: int = HEAD, at: int = PROBE) -> None:
    """struct kprobe of 6.1 for x86-64, in a hash list; an optimised one knows its detour."""
    words = struct.pack("<8Q", 0, pprev, at + 16, at + 16, 0, address, 0, 0) + struct.pack("<2Q", CALLBACK, 0)
    machine.put(at, words + bytes((opcode,)) + bytes(23) + struct.pack("<Q", detour))
    machine.put(HEAD, struct.pack("<Q", at))


def test_a_breakpoint_and_a_jump_are_proved_by_their_probes(image: Image, tmp_path: Path) -> None:
    where, detour = TEXT + 0x400, MODULES + 0x200
    machine = Machine()
    machine.put(where, b"\xcc")
    assert machine.probed(image, tmp_path) == ([where], [])
    probe(machine, where, 0xC3)
    assert machine.probed(image, tmp_path) == ([], ["kprobe"])
    # Its list leads elsewhere, or nowhere, or to memory that the dump lacks; it keeps another byte.
    machine.put(HEAD, struct.pack("<Q", PROBE + 0x40))
    assert machine.probed(image, tmp_path) == ([where], [])
    machine.put(HEAD, struct.pack("<Q", PROBE + 0x1000))
    assert machine.probed(image, tmp_path) == ([where], [])
    for pprev in (0, HEAD + 3, 0xFFFFFF0000000000):
        probe(machine, where, 0xC3, pprev=pprev)
        assert machine.probed(image, tmp_path) == ([where], []), hex(pprev)
    probe(machine, where, 0x90)
    assert machine.probed(image, tmp_path) == ([where], [])
    # Optimised: the jump goes to the detour that the probe knows.
    machine.put(where, near(0xE9, where, detour))
    probe(machine, where, 0xC3, detour)
    assert machine.probed(image, tmp_path) == ([], ["optimised kprobe"])
    probe(machine, where, 0xC3, detour + 0x40)
    assert machine.probed(image, tmp_path) == ([where], [])
    probe(machine, where, 0xC3, MODULES + 0x100000)
    machine.put(where, near(0xE9, where, MODULES + 0x100000))
    assert machine.probed(image, tmp_path) == ([where], [])


def test_bytes_at_the_edge_of_the_text_are_let_go(image: Image) -> None:
    ground = Ground(image, TEXT, bytes(16), bytes(16))
    cause = ground.cause("x")
    ground.lay(TEXT - 2, b"abcd", cause)
    ground.lay(TEXT + 14, b"abcd", cause)
    assert ground.expected == bytes(16)
    ground.lay(TEXT + 12, b"abcd", cause)
    assert ground.expected == bytes(12) + b"abcd"
    assert ground.cause_at(TEXT + 12) == "x"


def test_freed_memory_of_the_image_has_two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kprobe in memory that the kernel's init data had: its list names it by the direct mapping."""
    alias, direct, physical = 0xFFFFFFFF84000C00, 0xFFFF888000000000, 0x4000C00
    running = Running.__new__(Running)
    monkeypatch.setattr(Running, "virtual_of", lambda self, offset: alias if offset == 0x100 else None)
    monkeypatch.setattr(Running, "direct_map", direct)
    running.memory = SimpleNamespace(physical=(), addresses_of=lambda regions, offset: physical)  # type: ignore[assignment]
    running._mask = (1 << 64) - 1
    assert running.may_be_at(0x100, alias)
    assert running.may_be_at(0x100, direct + physical)
    assert not running.may_be_at(0x100, direct + physical + 0x1000)
    assert not running.may_be_at(0x100, alias - 0x1000)
    assert running.may_be_at(0x200, 0x1234)  # nothing is known of it
