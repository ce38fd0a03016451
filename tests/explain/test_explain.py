"""Explanations of a made-up kernel: what is written by hand is named, and every other byte is unexplained."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.explain import running as made
from tests.explain.running import NOP5, Machine, call, function
from vmipatch.annotate import Site
from vmipatch.annotate.site import Lock
from vmipatch.errors import ImageError, UsageError, VmipatchError
from vmipatch.explain import Explanation, Memory, explain, runs
from vmipatch.image import Image, open_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return open_image(made.build(tmp_path_factory.mktemp("kernel")))


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return tmp_path / "dump"


def run(image: Image, machine: Machine, dump: Path, base: int = made.PHYSICAL) -> Explanation:
    dump.write_bytes(machine.bytes)
    return explain(image, Memory(dump, base))


def causes(found: Explanation) -> dict[str, int]:
    return dict(found.by_cause)


BOOTED = {
    "mcount": 5 * made.FUNCTIONS,
    "smp_locks": made.FUNCTIONS,
    # F0 83 04 24 00 → 0F AE F0 89 F6, and 90 90 90 90 90: every byte differs.
    "altinstructions": 5 * made.FUNCTIONS,
    # 3E 8D 74 26 00 → E9 0B 00 00 00: the last byte is the same.
    "jump_labels": 4,
}


def test_a_booted_kernel_is_explained_to_the_last_byte(image: Image, dump: Path) -> None:
    found = run(image, Machine(), dump)
    assert found.unexplained == []
    assert found.unexplained_bytes == 0
    assert causes(found) == BOOTED
    assert found.total == 0x3000
    assert found.pristine + found.explained == found.total
    assert any("boot_cpu_data" in line for line in found.evidence)
    flipped = [p for p in found.proved if p.cause == "static key"]
    assert [p.address for p in flipped] == [function(3) + made.OFF_LABEL]


@pytest.mark.parametrize(("one_cpu", "features"), [(False, (made.XMM2,)), (True, ()), (False, ())])
def test_each_machine_has_its_own_causes(image: Image, dump: Path, one_cpu: bool, features: tuple[int, ...]) -> None:
    found = run(image, Machine(one_cpu=one_cpu, features=features), dump)
    assert found.unexplained == []
    assert ("smp_locks" in causes(found)) == one_cpu
    # Without the feature only the padding of one site is joined.
    assert causes(found)["altinstructions"] == (5 * made.FUNCTIONS if features else 5)


def test_virtual_and_physical_bases_and_text_alone_agree(image: Image, dump: Path) -> None:
    machine = Machine()
    physical, virtual = run(image, machine, dump), run(image, machine, dump, made.TEXT)
    dump.write_bytes(machine.text())
    alone = explain(image, Memory(dump, made.TEXT))
    assert causes(physical) == causes(virtual) == causes(alone) == BOOTED
    assert any("best fit" in line for line in alone.evidence)
    assert alone.unexplained == []


@pytest.mark.parametrize("slide", [0x400000, 0x2000000])
def test_kaslr_is_found_and_its_relocations_applied(image: Image, dump: Path, slide: int) -> None:
    machine = Machine(slide=slide)
    dump.write_bytes(machine.bytes)
    found = explain(image, Memory(dump, made.PHYSICAL + slide))
    assert found.slide == slide
    assert found.unexplained == []
    assert causes(found) == BOOTED
    # A field that was left behind is a byte that nothing explains.
    where = made.pointers()[5]
    machine.put(where, made.text()[where - made.TEXT : where - made.TEXT + 4])
    dump.write_bytes(machine.bytes)
    again = explain(image, Memory(dump, made.PHYSICAL + slide))
    assert [u.address for u in again.unexplained] == [where + (2 if slide < 1 << 24 else 3)]


def test_a_base_that_the_text_itself_denies(image: Image, dump: Path) -> None:
    dump.write_bytes(Machine().text())
    with pytest.raises(ImageError, match="is the base right"):
        explain(image, Memory(dump, made.TEXT + 0x100000))


def test_any_flipped_byte_is_unexplained_at_its_address(image: Image, dump: Path) -> None:
    chosen = random.Random(6)
    for _ in range(150):
        machine = Machine()
        at = chosen.randrange(0x3000)
        value = machine.bytes[at] ^ chosen.randrange(1, 256)
        machine.bytes[at] = value
        found = run(image, machine, dump)
        assert [(u.address, u.found) for u in found.unexplained] == [(made.TEXT + at, bytes((value,)))]
        assert found.unexplained_bytes == 1
        booted = Machine().text()
        assert found.explained == sum(
            a != b for i, (a, b) in enumerate(zip(booted, made.text(), strict=True)) if i != at
        )


def test_a_site_left_as_on_disk_is_unexplained(image: Image, dump: Path) -> None:
    """Every other lock is gone: one that stays was put back."""
    machine = Machine()
    machine.put(function(9) + made.OFF_LOCK, b"\xf0")
    found = run(image, machine, dump)
    assert [(u.address, u.expected, u.site) for u in found.unexplained] == [
        (function(9) + made.OFF_LOCK, b"\x3e", "smp_locks lock")
    ]


def test_a_lock_removed_where_the_others_stay_is_unexplained(image: Image, dump: Path) -> None:
    machine = Machine(one_cpu=False)
    gone = [function(n) + made.OFF_LOCK for n in range(12, 20)]
    for address in gone:
        machine.put(address, b"\x3e")
    assert [u.address for u in run(image, machine, dump).unexplained] == gone


def test_the_key_decides_a_jump_label(image: Image, dump: Path) -> None:
    machine = Machine()
    machine.switch(8, True)
    assert run(image, machine, dump).unexplained == []
    machine.put(made.key(8), struct.pack("<i", 0))
    found = run(image, machine, dump)
    assert [u.address for u in found.unexplained] == [function(8) + made.OFF_LABEL]
    assert found.unexplained[0].hint is not None
    assert "static key" in found.unexplained[0].hint


def test_a_likely_branch_is_taken_while_its_key_is_off(image: Image, dump: Path) -> None:
    machine = Machine()
    machine.switch(made.LIKELY, False)
    found = run(image, machine, dump)
    assert found.unexplained == []
    assert function(made.LIKELY) + made.OFF_LABEL in [p.address for p in found.proved]


def test_the_key_decides_a_static_call(image: Image, dump: Path) -> None:
    machine = Machine()
    machine.put(made.TRAMPOLINE, call(0xE9, made.TRAMPOLINE, function(7)))
    denied = run(image, machine, dump)
    assert all(made.TRAMPOLINE <= u.address < made.TRAMPOLINE + 5 for u in denied.unexplained)
    assert denied.unexplained
    machine.put(made.CALL_KEY, struct.pack("<I", function(7)))
    assert run(image, machine, dump).unexplained == []
    # Another variable that the updating code names, and that happens to hold the function, is no key.
    machine.put(made.CALL_KEY, struct.pack("<I", function(0)))
    machine.put(made.OTHER, struct.pack("<I", function(7)))
    assert run(image, machine, dump).unexplained
    machine.put(made.CALL_KEY, struct.pack("<I", function(7)))
    # A function that the key does not hold, in the middle of another one or not.
    machine.put(made.TRAMPOLINE, call(0xE9, made.TRAMPOLINE, function(6)))
    assert run(image, machine, dump).unexplained
    machine.put(made.TRAMPOLINE, b"\xc3\xcc\xcc\xcc\xcc")
    machine.put(made.CALL_KEY, struct.pack("<I", 0))
    assert run(image, machine, dump).unexplained == []


def test_an_updated_static_call_of_a_moved_kernel(image: Image, dump: Path) -> None:
    """The key holds the running address, the trampoline goes to it: both less the slide."""
    slide = 0x1800000
    machine = Machine(slide=slide)
    machine.put(made.TRAMPOLINE, call(0xE9, made.TRAMPOLINE, function(7)))
    machine.put(made.CALL_KEY, struct.pack("<I", function(7) + slide))
    dump.write_bytes(machine.bytes)
    assert explain(image, Memory(dump, made.PHYSICAL + slide)).unexplained == []
    machine.put(made.CALL_KEY, struct.pack("<I", function(7)))
    dump.write_bytes(machine.bytes)
    assert explain(image, Memory(dump, made.PHYSICAL + slide)).unexplained


def test_a_byte_inside_an_instruction_is_shown_with_the_whole_of_it(image: Image, dump: Path) -> None:
    machine = Machine()
    where = function(21) + made.OFF_POINTER + 3
    machine.put(where, b"\x77")
    (found,) = run(image, machine, dump).unexplained
    assert (found.address, found.symbol, found.offset) == (where, "f21", made.OFF_POINTER + 3)
    assert found.instructions_expected == (f"mov eax, {made.RODATA + 21:#x}",)
    value = (made.RODATA + 21) & 0xFF00FFFF | 0x770000
    assert found.instructions_found == (f"mov eax, {value:#x}",)


def test_of_two_sites_the_smaller_is_named() -> None:
    sites = [Site("f", 0x100, 16, "outer", "", "", 0, Lock())]
    sites += [Site("f", 0x104, 4, "inner", "", "", 1, Lock()), Site("f", 0x105, 8, "other", "", "", 2, Lock())]
    index = runs._Sites(sites)
    named = {
        address: site.op if (site := index.at(address)) else None for address in (0xFF, 0x100, 0x105, 0x108, 0x10F)
    }
    assert named == {0xFF: None, 0x100: "outer", 0x105: "inner", 0x108: "other", 0x10F: "outer"}
    assert index.at(0x110) is None


def test_planted_breakpoints_and_calls_are_unexplained_and_hinted_at(image: Image, dump: Path) -> None:
    machine = Machine()
    for n in range(20):
        machine.put(function(n) + made.OFF_TARGET, b"\xcc")
        site = function(n + 20)
        machine.put(site, call(0xE8, site, made.CALLER if n % 2 else 0xC8000000 + n))
    found = run(image, machine, dump)
    breakpoints = [u for u in found.unexplained if u.hint and "INT3" in u.hint]
    calls = [u for u in found.unexplained if u.hint and "ftrace" in u.hint]
    assert {u.address for u in breakpoints} == {function(n) + made.OFF_TARGET for n in range(20)}
    assert found.unexplained_bytes == sum(len(u.found) for u in found.unexplained) > found.runs
    assert {u.address for u in calls} >= {function(n + 20) for n in range(20)}
    assert found.proved == [p for p in found.proved if p.cause == "static key"]


RECORDS = made.END  # in the memory behind the image: the direct mapping


def records(machine: Machine, flags: dict[int, int]) -> None:
    """A page of dyn_ftrace records, sorted by address."""
    machine.put(RECORDS, b"".join(struct.pack("<II", function(n), flags.get(n, 0)) for n in range(made.FUNCTIONS)))


def test_a_traced_function_is_proved_by_its_record(image: Image, dump: Path) -> None:
    machine = Machine()
    site = function(12)
    machine.put(site, call(0xE8, site, made.CALLER))
    records(machine, {12: 0x80000001})
    # The callback: ftrace_caller calls it, and ftrace_trace_function holds it.
    machine.put(made.CALLER + 1, call(0xE8, made.CALLER + 1, function(5)))
    machine.put(made.TRACE_FUNCTION, struct.pack("<I", function(5)))
    found = run(image, machine, dump)
    assert found.unexplained == []
    traced = [p for p in found.proved if p.cause == "ftrace"]
    assert [p.address for p in traced] == [site, made.CALLER + 1]
    # The callback is what the variable holds, and nothing else.
    machine.put(made.TRACE_FUNCTION, struct.pack("<I", function(6)))
    assert made.CALLER + 2 in [u.address for u in run(image, machine, dump).unexplained]
    machine.put(made.TRACE_FUNCTION, struct.pack("<I", function(5)))
    # A record that is not enabled, or that counts nobody, proves nothing.
    for flags in (0x00000001, 0x80000000):
        records(machine, {12: flags})
        assert site in [u.address for u in run(image, machine, dump).unexplained]
    # Nor does an enabled one for a call of something else.
    records(machine, {12: 0x80000001})
    machine.put(site, call(0xE8, site, function(30)))
    assert site in [u.address - u.address % 16 for u in run(image, machine, dump).unexplained]


def kprobe(machine: Machine, address: int, opcode: int, place: int, head: int) -> None:
    """struct kprobe of 6.1 at a virtual address, in the hash list whose head is given."""
    body = struct.pack("<8I", 0, head, place + 8, place + 8, 0, address, 0, 0)
    body += struct.pack("<II", function(1), 0) + bytes((opcode, 0, 0, 0)) + bytes(40)
    machine.put(place, body)
    machine.put(head, struct.pack("<I", place))


def test_a_breakpoint_is_proved_by_its_kprobe(image: Image, dump: Path) -> None:
    where, head = function(40) + made.OFF_TARGET, made.DATA + 0x900
    machine = Machine()
    kprobe(machine, where, 0x31, RECORDS + 0x1040, head)
    machine.put(where, b"\xcc")
    found = run(image, machine, dump)
    assert found.unexplained == []
    assert [(p.address, p.cause) for p in found.proved if p.cause != "static key"] == [(where, "kprobe")]
    assert causes(found)["kprobe"] == 1
    # Unregistered, or keeping another byte: no proof.
    machine.put(head, bytes(4))
    assert [u.address for u in run(image, machine, dump).unexplained] == [where]
    kprobe(machine, where, 0x30, RECORDS + 0x1040, head)
    assert [u.address for u in run(image, machine, dump).unexplained] == [where]


def test_memory_of_another_kernel_is_refused(image: Image, dump: Path) -> None:
    machine = Machine()
    machine.put(made.TEXT, random.Random(1).randbytes(0x3000))
    machine.put(made.RODATA, made.BANNER.replace(b"-99-", b"-98-"))
    with pytest.raises(ImageError, match="another kernel: its banner is"):
        run(image, machine, dump)


def test_memory_of_another_build_is_refused(image: Image, dump: Path) -> None:
    machine = Machine()
    machine.put(made.RODATA + 0x1000 + 20, b"\xff")
    with pytest.raises(ImageError, match="another build: its build id"):
        run(image, machine, dump)


def test_zeros_and_cut_memory_are_refused(image: Image, dump: Path) -> None:
    dump.write_bytes(bytes(0x20000))
    with pytest.raises(ImageError, match="all zeros"):
        explain(image, Memory(dump, made.PHYSICAL))
    dump.write_bytes(Machine().text()[:0x2000])
    with pytest.raises(ImageError, match="8192 of the 12288 bytes"):
        explain(image, Memory(dump, made.PHYSICAL))
    dump.write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        Memory(dump, 0)
    dump.write_bytes(bytes(4096))
    with pytest.raises(UsageError, match="--base"):
        Memory(dump)


def test_any_dump_gives_a_result_or_an_error_of_ours(image: Image, dump: Path) -> None:
    """Random damage to a dump, its size and its base: never a traceback."""
    chosen = random.Random(3)
    for _ in range(60):
        machine = Machine()
        for _ in range(chosen.randrange(40)):
            start = chosen.randrange(len(machine.bytes))
            machine.bytes[start : start + 16] = chosen.randbytes(16)
        size = chosen.choice((len(machine.bytes), chosen.randrange(1, len(machine.bytes))))
        dump.write_bytes(machine.bytes[:size])
        base = chosen.choice((made.PHYSICAL, made.TEXT, chosen.randrange(1 << 32) & ~0xFFF, 0))
        try:
            found = explain(image, Memory(dump, base))
        except VmipatchError:
            continue
        assert found.pristine + found.explained + found.unexplained_bytes == found.total


def test_the_nop_of_a_site_is_the_kernels(image: Image, dump: Path) -> None:
    """Another nop of five bytes at an mcount site does the same but is not what this kernel writes."""
    machine = Machine()
    machine.put(function(2), bytes.fromhex("0F1F440000"))
    found = run(image, machine, dump)
    assert [u.address for u in found.unexplained] == [function(2)]
    assert NOP5.startswith(found.unexplained[0].expected)
