"""What each era of the kernel's patcher writes; expected bytes are worked out here from the kernel's rules.

Sources: arch/x86/kernel/alternative.c and paravirt.c of the versions named; nop sequences from asm/nops.h.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import Site, scan
from vmipatch.annotate.site import Paravirt
from vmipatch.errors import PatchError, TableError, UsageError
from vmipatch.image import open_image
from vmipatch.patch import Native, Plan, plan
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import Boot
from vmipatch.patch.passes.paravirt import ParavirtCalls
from vmipatch.patch.rules import eras
from vmipatch.patch.text import Text

FEATURE, ABSENT = 26, 27


def cpu(
    words: int, vendor: str | None = "GenuineIntel", family: int = 6, model: int = 1, extra: tuple[int, ...] = ()
) -> Cpu:
    """A CPU that has ``FEATURE``, and the bits of ``extra``."""
    values = [0] * words
    for bit in (FEATURE, *extra):
        values[bit >> 5] |= 1 << (bit & 31)
    return Cpu("test", vendor, family, model, 1, tuple(values))


def planned(folder: Path, kernel: KernelMaker, target: Native) -> Plan:
    path = folder / "vmlinux"
    path.write_bytes(kernel.build())
    image = open_image(path)
    return plan(image, scan(image), target)


def after(folder: Path, kernel: KernelMaker, target: Native, address: int, length: int) -> bytes:
    """What stands at an address after the plan."""
    changes = planned(folder, kernel, target).changes()
    image = open_image(folder / "vmlinux")
    return bytes(
        changes[address + i][1] if address + i in changes else image.read(address + i, 1)[0] for i in range(length)
    )


# Release, alternatives layout, number of feature words, nops of 1 to 8 bytes on an Intel CPU of family 6 model 1
# without NOPL.
GENERIC = ["90", "89f6", "8d7600", "8d742600", "908d742600", "8db600000000", "8db42600000000", "908db42600000000"]
ATOMIC = [*GENERIC[:4], "3e8d742600", *GENERIC[5:7], "3e8db42600000000"]
ERAS = [
    ("2.6.18", "abs32-u8", 7, GENERIC),
    ("2.6.21", "abs32-u8", 7, GENERIC),
    ("2.6.32.9", "abs32-u8", 9, GENERIC),
    ("2.6.37.6", "abs32-u16", 9, GENERIC),
    ("3.0.8", "abs32-u16", 10, GENERIC),
    ("3.1.5", "rel12", 10, GENERIC),
    ("3.16.7", "rel12", 11, GENERIC),
    ("4.9.1", "rel13", 19, GENERIC),
    ("5.10.13", "rel13", 20, GENERIC),
    ("5.10.200", "rel12", 24, GENERIC),
    ("6.1.50", "rel12", 24, ATOMIC),
    ("6.3.1", "rel14", 24, ATOMIC),
]


@pytest.mark.parametrize(("release", "layout", "words", "nops"), ERAS, ids=[e[0] for e in ERAS])
def test_a_replacement_that_applies_is_padded_and_one_that_does_not_is_not(
    tmp_path: Path, release: str, layout: str, words: int, nops: list[str]
) -> None:
    kernel = KernelMaker(release=release)
    sites = [kernel.code(b"\x89\xc0" * 6) for _ in range(16)]
    body = kernel.replacement(b"\x0f\xae\xf0")
    rows = [(site, body, FEATURE if i % 2 else ABSENT, 3 + i // 2 + 1, 3, {}) for i, site in enumerate(sites)]
    # Whole instructions: the site's bytes are two each, so odd lengths end with a nop.
    for i, site in enumerate(sites):
        length = rows[i][3]
        if length % 2:
            at = site - 0xC1000000
            kernel.text[at + length - 1] = 0x90
    kernel.alternatives(layout, rows)
    for i, site in enumerate(sites):
        length = rows[i][3]
        found = after(tmp_path, kernel, Native(cpu(words)), site, length)
        if i % 2:
            assert found.hex() == "0faef0" + nops[length - 4]
        else:
            assert found == bytes(kernel.text[site - 0xC1000000 :][:length])


@pytest.mark.parametrize(
    ("release", "layout", "words", "call_moves", "jump_moves"),
    [
        ("2.6.18", "abs32-u8", 7, False, False),
        ("2.6.38", "abs32-u16", 10, True, False),
        ("3.16.7", "rel12", 11, True, False),
        ("4.9.1", "rel13", 19, True, True),
        ("6.1.50", "rel12", 24, True, True),
        ("6.6.10", "rel14", 23, True, True),
        ("6.12.1", "rel14", 25, True, True),
    ],
)
def test_displacements_of_replacements(
    tmp_path: Path, release: str, layout: str, words: int, call_moves: bool, jump_moves: bool
) -> None:
    kernel = KernelMaker(release=release)
    far = kernel.code(b"\x90" * 0x400)
    site_call, site_jump = kernel.code(b"\x0f\x1f\x44\x00\x00"), kernel.code(b"\x0f\x1f\x44\x00\x00")
    call = kernel.replacement(b"\xe8" + bytes(4))
    jump = kernel.replacement(b"\xe9" + bytes(4))
    kernel.replacements[1:5] = struct.pack("<i", far - call - 5)
    kernel.replacements[6:10] = struct.pack("<i", far - jump - 5)
    kernel.alternatives(layout, [(site_call, call, FEATURE, 5, 5, {}), (site_jump, jump, FEATURE, 5, 5, {})])
    target = Native(cpu(words))
    moved = b"\xe8" + struct.pack("<i", (far if call_moves else site_call + (far - call)) - site_call - 5)
    assert after(tmp_path, kernel, target, site_call, 5) == moved
    moved = b"\xe9" + struct.pack("<i", (far if jump_moves else site_jump + (far - jump)) - site_jump - 5)
    assert after(tmp_path, kernel, target, site_jump, 5) == moved


@pytest.mark.parametrize(
    ("release", "layout", "words", "forward", "backward"),
    [
        ("4.9.1", "rel13", 19, "eb{:02x}8d7600", False),
        ("6.1.50", "rel12", 24, "eb{:02x}8d7600", False),
        ("6.4.16", "rel14", 23, "eb{:02x}8d7600", False),
        # "x86/alternatives for 6.5" (pull request of June 2023): relocations, nops of any length, longer 64-bit nops.
        ("6.5.2", "rel14", 23, "eb{:02x}cccccc", True),
        ("6.6.10", "rel14", 23, "eb{:02x}cccccc", True),
        ("6.12.1", "rel14", 25, "eb{:02x}cccccc", True),
    ],
)
def test_jumps_that_reach_become_short(
    tmp_path: Path, release: str, layout: str, words: int, forward: str, backward: bool
) -> None:
    kernel = KernelMaker(release=release)
    before = kernel.code(b"\x90" * 16)
    site_back, site_ahead = kernel.code(b"\x0f\x1f\x44\x00\x00"), kernel.code(b"\x0f\x1f\x44\x00\x00")
    ahead = kernel.code(b"\x90" * 16)
    jump_back, jump_ahead = kernel.replacement(b"\xe9" + bytes(4)), kernel.replacement(b"\xe9" + bytes(4))
    kernel.replacements[1:5] = struct.pack("<i", before - jump_back - 5)
    kernel.replacements[6:10] = struct.pack("<i", ahead - jump_ahead - 5)
    rows = [(site_back, jump_back, FEATURE, 5, 5, {}), (site_ahead, jump_ahead, FEATURE, 5, 5, {})]
    kernel.alternatives(layout, rows)
    target = Native(cpu(words))
    assert after(tmp_path, kernel, target, site_ahead, 5).hex() == forward.format(ahead - site_ahead - 2)
    found = after(tmp_path, kernel, target, site_back, 5)
    if backward:
        assert found == b"\xeb" + struct.pack("<b", before - site_back - 2) + b"\xcc" * 3
    else:
        # recompute_jump of 4.1 to 6.3 compares a negative distance with its own low byte: it never shortens these.
        assert found == b"\xe9" + struct.pack("<i", before - site_back - 5)


def test_4_1_looks_for_its_padding_at_the_beginning_of_the_site(tmp_path: Path) -> None:
    """4.1 to 5.12: ``padlen`` nops at the end are joined only if the site begins with as many."""
    kernel = KernelMaker(release="4.9.1")
    whole = kernel.code(b"\x90" * 4)
    tail = kernel.code(b"\x89\xc0\x90\x90\x90")
    body = kernel.replacement(b"\x0f\xae\xf0")
    rows = [(whole, body, ABSENT, 4, 3, {"pad": 4}), (tail, body, ABSENT, 5, 3, {"pad": 3})]
    kernel.alternatives("rel13", rows)
    assert after(tmp_path, kernel, Native(cpu(19)), whole, 4).hex() == "8d742600"
    assert after(tmp_path, kernel, Native(cpu(19)), tail, 5).hex() == "89c0909090"


@pytest.mark.parametrize(("site", "expected"), [
    ("9090909090", "3e8d742600"), ("89c0909090", "89c08d7600"), ("9090c39090", "89f6c389f6"),
    ("90c39090f4", "90c389f6f4"), ("b890909090", "b890909090"), ("89c089c090", "89c089c090"),
])  # fmt: skip
def test_5_13_joins_nops_between_instructions_whether_or_not_an_entry_applies(
    tmp_path: Path, site: str, expected: str
) -> None:
    kernel = KernelMaker(release="6.1.50")
    address = kernel.code(bytes.fromhex(site))
    kernel.alternatives("rel12", [(address, kernel.replacement(b"\xc3"), ABSENT, 5, 1, {})])
    assert after(tmp_path, kernel, Native(cpu(24)), address, 5).hex() == expected


def test_later_entries_win_and_see_what_earlier_ones_wrote(tmp_path: Path) -> None:
    kernel = KernelMaker(release="6.1.50")
    site = kernel.code(b"\x89\xc0\x89\xc0")
    first, second = kernel.replacement(b"\x0f\xae\xf0"), kernel.replacement(b"\x0f\xae\xe8\xc3")
    rows = [(site, first, FEATURE, 4, 3, {}), (site, second, FEATURE, 4, 4, {}), (site, first, ABSENT, 4, 3, {})]
    kernel.alternatives("rel12", rows)
    assert after(tmp_path, kernel, Native(cpu(24)), site, 4).hex() == "0faee8c3"
    patches = planned(tmp_path, kernel, Native(cpu(24))).patches
    assert [(p.old.hex(), p.new.hex()) for p in patches] == [("89c089c0", "0faef090"), ("0faef090", "0faee8c3")]


def test_inverted_entries(tmp_path: Path) -> None:
    kernel = KernelMaker(release="6.1.50")
    sites = [kernel.code(b"\x89\xc0\x90") for _ in range(2)]
    body = kernel.replacement(b"\x0f\xae\xf0")
    rows = [(sites[0], body, FEATURE | 0x8000, 3, 3, {}), (sites[1], body, ABSENT | 0x8000, 3, 3, {})]
    kernel.alternatives("rel12", rows)
    assert after(tmp_path, kernel, Native(cpu(24)), sites[0], 3).hex() == "89c090"
    assert after(tmp_path, kernel, Native(cpu(24)), sites[1], 3).hex() == "0faef0"


@pytest.mark.parametrize(("release", "layout", "words", "byte"), [
    ("2.6.18", "abs32", 7, 0x90), ("2.6.27", "abs32", 8, 0x90), ("2.6.28", "abs32", 9, 0x3E),
    ("2.6.32.9", "abs32", 9, 0x3E),
    ("3.16.7", "rel32", 11, 0x3E), ("6.1.50", "rel32", 24, 0x3E),
])  # fmt: skip
def test_locks_go_on_one_cpu_between_the_bounds(
    tmp_path: Path, release: str, layout: str, words: int, byte: int
) -> None:
    kernel = KernelMaker(release=release)
    inside = kernel.code(b"\xf0\xff\x00")
    outside = kernel.replacement(b"\xf0\xff\x00")
    kernel.locks(layout, [inside, outside, 0])
    assert after(tmp_path, kernel, Native(cpu(words)), inside, 3) == bytes((byte, 0xFF, 0))
    assert after(tmp_path, kernel, Native(cpu(words)), outside, 3) == b"\xf0\xff\x00"
    assert not planned(tmp_path, kernel, Native(cpu(words), cpus=2)).patches


def modern(release: str) -> tuple[KernelMaker, dict[str, int]]:
    """A pv_ops kernel with sites for: an ordinary slot, a nop, an empty one."""
    kernel = KernelMaker(release=release)
    function = kernel.code(b"\xc3", "native_flush_tlb_local")
    nothing = kernel.code(b"\xc3", "_paravirt_nop")
    bug = kernel.code(b"\x0f\x0b", "paravirt_BUG")
    slots = kernel.pv_ops(flush_tlb_user=function, exit_mmap=nothing)
    places = {"function": function, "bug": bug}
    rows = []
    members = {"call": "flush_tlb_user", "nop": "exit_mmap", "empty": "tlb_remove_table"}
    for kind, (name, member) in enumerate(members.items()):
        slot = slots[member]
        places[name] = kernel.code(b"\xff\x15" + struct.pack("<I", slot))
        rows.append((places[name], kind, 6, 7))
    kernel.paravirt(rows)
    return kernel, places


def call(site: int, target: int) -> bytes:
    return b"\xe8" + struct.pack("<i", target - site - 5)


@pytest.mark.parametrize(("release", "words", "nops", "empty"), [
    ("4.20.1", 21, GENERIC, "ud2"), ("5.10.13", 20, GENERIC, "ud2"),
    ("6.1.50", 24, ATOMIC, "bug"), ("6.7.2", 24, ATOMIC, "bug"),
])  # fmt: skip
def test_direct_calls_from_4_20_on(tmp_path: Path, release: str, words: int, nops: list[str], empty: str) -> None:
    kernel, places = modern(release)
    target = Native(cpu(words))
    expected = call(places["call"], places["function"]) + b"\x90"
    assert after(tmp_path, kernel, target, places["call"], 6) == expected
    assert after(tmp_path, kernel, target, places["nop"], 6).hex() == nops[5]
    found = after(tmp_path, kernel, target, places["empty"], 6)
    if empty == "ud2":
        assert found.hex() == "0f0b" + nops[3]
    else:
        assert found == call(places["empty"], places["bug"]) + b"\x90"


def old(clobbers: int, length: int = 6) -> tuple[KernelMaker, dict[str, int]]:
    """A 2.6.32 with pv_irq_ops, pv_cpu_ops and pv_mmu_ops, whose layouts are those of asm/paravirt_types.h."""
    kernel = KernelMaker(release="2.6.32.9")
    places: dict[str, int] = {}
    names = [
        "native_save_fl",
        "native_restore_fl",
        "native_irq_disable",
        "native_irq_enable",
        "native_safe_halt",
        "native_halt",
    ]
    functions = [kernel.code(b"\xc3\x90\x90\x90", name) for name in names]
    slots = [kernel.word(f, "pv_irq_ops" if not i else None) for i, f in enumerate(functions)]
    rows = []
    for i, name in enumerate(("save_fl", "restore_fl", "irq_disable", "irq_enable", "safe_halt")):
        places[name] = kernel.code(b"\xff\x15" + struct.pack("<I", slots[i]) + b"\x90" * (length - 6))
        rows.append((places[name], 43 + i, length, clobbers))
    places["native_safe_halt"] = functions[4]
    kernel.paravirt(rows)
    return kernel, places


def test_native_inlining_of_2_6_32(tmp_path: Path) -> None:
    kernel, places = old(7)
    target = Native(cpu(9))
    expected = {"save_fl": "9c58", "restore_fl": "509d", "irq_disable": "fa", "irq_enable": "fb"}
    for name, code in expected.items():
        pad = GENERIC[5 - len(code) // 2]
        assert after(tmp_path, kernel, target, places[name], 6).hex() == code + pad, name
    assert after(tmp_path, kernel, target, places["safe_halt"], 6) == (
        call(places["safe_halt"], places["native_safe_halt"]) + b"\x90"
    )


def test_what_the_kernel_keeps_no_native_code_for_is_not_inlined(tmp_path: Path) -> None:
    """DEF_NATIVE makes labels (start_pv_irq_ops_irq_disable): an image that has some shows what it can inline."""
    kernel, places = old(7)
    kernel.code(b"\xfa", "start_pv_irq_ops_irq_disable")
    kernel.code(b"\x9c\x58", "start_pv_irq_ops_save_fl")
    found = {name: after(tmp_path, kernel, Native(cpu(9)), places[name], 2).hex() for name in places}
    assert (found["irq_disable"], found["save_fl"]) == ("fa90", "9c58")
    assert found["restore_fl"][:2] == found["irq_enable"][:2] == "e8"


def test_4_15_calls_flush_tlb_single_and_4_14_inlines_it() -> None:
    """arch/x86/kernel/paravirt_patch_64.c: the INVLPG of 4.14 is gone in 4.15."""
    inline = {e.since: e.section("paravirt")["inline64"] for e in eras() if (4, 1) <= e.since <= (4, 15)}
    assert [(since, code["pv_mmu_ops.flush_tlb_single"]) for since, code in sorted(inline.items())] == [
        ((4, 1), "0F013F"), ((4, 2), "0F013F"), ((4, 15), ""),
    ]  # fmt: skip
    assert all(code["pv_mmu_ops.write_cr3"] == "0F22DF" for code in inline.values())


def test_2_6_32_calls_only_where_the_site_may_lose_what_a_function_may(tmp_path: Path) -> None:
    kernel, places = old(1)
    found = after(tmp_path, kernel, Native(cpu(9)), places["safe_halt"], 6)
    assert found[:2] == b"\xff\x15"


def test_a_paravirt_site_under_an_alternative(tmp_path: Path) -> None:
    """5.13 on: paravirt first, then the alternative puts native instructions over the call."""
    kernel, places = modern("6.1.50")
    kernel.alternatives("rel12", [(places["call"], kernel.replacement(b"\xfa"), FEATURE, 6, 1, {})])
    assert after(tmp_path, kernel, Native(cpu(24)), places["call"], 6).hex() == "fa" + ATOMIC[4]


# Vendor, family, model, features, expected padding of 3 bytes in 4.2 to 5.12 (arch_init_ideal_nops).
P3, P4 = 3 * 32 + 6, 3 * 32 + 7
NOPL, K7, K8 = 3 * 32 + 20, 3 * 32 + 5, 3 * 32 + 4
IDEAL = [
    ("GenuineIntel", 6, 0x1A, (NOPL,), "666690"), ("GenuineIntel", 6, 0x3C, (NOPL,), "0f1f00"),
    ("GenuineIntel", 6, 0x1C, (NOPL,), "0f1f00"), ("GenuineIntel", 6, 1, (), "8d7600"),
    ("AuthenticAMD", 0x10, 2, (), "0f1f00"), ("AuthenticAMD", 0xF, 2, (K8,), "666690"),
    ("AuthenticAMD", 6, 2, (K7,), "8d0420"), ("CentaurHauls", 6, 2, (), "8d7600"),
]  # fmt: skip


@pytest.mark.parametrize(("vendor", "family", "model", "extra", "expected"), IDEAL)
def test_padding_by_cpu(
    tmp_path: Path, vendor: str, family: int, model: int, extra: tuple[int, ...], expected: str
) -> None:
    kernel = KernelMaker(release="4.9.1")
    site = kernel.code(b"\x89\xc0\x89\xc0")
    kernel.alternatives("rel13", [(site, kernel.replacement(b"\xc3"), FEATURE, 4, 1, {})])
    target = Native(cpu(19, vendor, family, model, extra))
    assert after(tmp_path, kernel, target, site, 4).hex() == "c3" + expected


K8_3, P6_3, GENERIC_3 = "666690", "0f1f00", "8d7600"
# Release, bits, layout, words, vendor, family, model, features, padding of 3 bytes: find_nop_table of 2.6.23 (k8_nops
# on 64 bits), 2.6.26 (Intel from family 6 on: p6_nops), 2.6.33; arch_init_ideal_nops of 3.0.8, 3.2.0 and 3.4.0 (Intel's
# case falls through to the default), of 3.6 (it does not), of 4.2 (AMD after family 15: p6_nops).
BY_RELEASE = [
    ("2.6.23", 64, "abs64-u8", 7, "GenuineIntel", 6, 0x3C, (NOPL, P3), K8_3),
    ("2.6.26", 64, "abs64-u8", 8, "GenuineIntel", 6, 15, (), P6_3),
    ("2.6.26", 64, "abs64-u8", 8, "GenuineIntel", 15, 4, (), P6_3),
    ("2.6.26", 64, "abs64-u8", 8, "AuthenticAMD", 16, 2, (), K8_3),
    ("2.6.26", 32, "abs32-u8", 8, "GenuineIntel", 6, 8, (P3,), P6_3),
    ("2.6.26", 32, "abs32-u8", 8, "GenuineIntel", 15, 4, (P4,), P6_3),
    ("2.6.33", 64, "abs64-u8", 9, "GenuineIntel", 6, 15, (), K8_3),
    ("2.6.33", 64, "abs64-u8", 9, "GenuineIntel", 6, 15, (NOPL,), P6_3),
    ("3.0.8", 64, "abs64-u16", 10, "GenuineIntel", 6, 0x3C, (NOPL,), K8_3),
    ("3.0.8", 32, "abs32-u16", 10, "GenuineIntel", 6, 0x1A, (NOPL,), GENERIC_3),
    ("3.2.0", 64, "rel12", 10, "GenuineIntel", 6, 0x3C, (NOPL,), K8_3),
    ("3.4.0", 64, "rel12", 10, "GenuineIntel", 6, 0x3C, (NOPL,), K8_3),
    ("3.4.0", 32, "rel12", 10, "GenuineIntel", 6, 0x1A, (), GENERIC_3),
    ("3.6.0", 64, "rel12", 10, "GenuineIntel", 6, 0x3C, (NOPL,), P6_3),
    ("3.6.0", 32, "rel12", 10, "GenuineIntel", 6, 0x1A, (), K8_3),
    ("3.6.0", 64, "rel12", 10, "AuthenticAMD", 0x15, 2, (), K8_3),
    ("4.1.0", 64, "rel13", 13, "AuthenticAMD", 0x15, 2, (), K8_3),
    ("4.2.0", 64, "rel13", 14, "AuthenticAMD", 0x15, 2, (), P6_3),
]


@pytest.mark.parametrize(
    ("release", "bits", "layout", "words", "vendor", "family", "model", "extra", "expected"), BY_RELEASE
)
def test_padding_by_release(
    tmp_path: Path, release: str, bits: int, layout: str, words: int, vendor: str, family: int, model: int,
    extra: tuple[int, ...], expected: str,
) -> None:  # fmt: skip
    kernel = KernelMaker(bits=bits, release=release)
    site = kernel.code(b"\x89\xc0\x89\xc0")
    kernel.alternatives(layout, [(site, kernel.replacement(b"\xc3"), FEATURE, 4, 1, {})])
    target = Native(cpu(words, vendor, family, model, extra))
    assert planned(tmp_path, kernel, target).warnings == ()
    assert after(tmp_path, kernel, target, site, 4).hex() == "c3" + expected


@pytest.mark.parametrize(("release", "expected"), [
    # P6_NOP8 and P6_NOP3, twice; BYTES_NOP11 (asm/nops.h of 6.5).
    ("6.4.16", "0f1f840000000000" "0f1f00"), ("6.5.2", "66662e0f1f840000000000"),
])  # fmt: skip
def test_longer_nops_of_64_bits(tmp_path: Path, release: str, expected: str) -> None:
    kernel = KernelMaker(bits=64, release=release)
    site = kernel.code(b"\x89\xc0" * 6)
    kernel.alternatives("rel14", [(site, kernel.replacement(b"\xc3"), FEATURE, 12, 1, {})])
    assert after(tmp_path, kernel, Native(cpu(23)), site, 12).hex() == "c3" + expected


# Release, layouts of alternatives and locks: 2.6.34 moves calls and has absolute locks, 2.6.35 relative ones (read from
# both); RHEL 6 calls itself 2.6.32, moves calls, and has features of 16 bits beside absolute locks.
@pytest.mark.parametrize(("release", "layout", "locks", "words"), [
    ("2.6.34.7", "abs32-u8", "abs32", 9), ("2.6.35.6", "abs32-u8", "rel32", 9), ("2.6.36.1", "abs32-u16", "rel32", 9),
    ("2.6.32", "abs32-u16", "abs32", 9),
])  # fmt: skip
def test_calls_are_moved_from_2_6_34_on_with_either_lock_table(
    tmp_path: Path, release: str, layout: str, locks: str, words: int
) -> None:
    kernel = KernelMaker(release=release)
    site = kernel.code(b"\x89\xc0\x89\xc0\x90")
    lock = kernel.code(b"\xf0\xff\x00")
    place = kernel.replacement(b"\xe8\x00\x01\x00\x00")
    kernel.alternatives(layout, [(site, place, FEATURE, 5, 5, {})])
    kernel.locks(locks, [lock])
    moved = struct.pack("<i", 0x100 + place - site)
    assert after(tmp_path, kernel, Native(cpu(words), 1), site, 5) == b"\xe8" + moved
    assert after(tmp_path, kernel, Native(cpu(words), 1), lock, 3) == b"\x3e\xff\x00"


def test_feature_words_without_an_identity_are_warned_about(tmp_path: Path) -> None:
    kernel = KernelMaker(release="4.9.1")
    site = kernel.code(b"\x89\xc0\x89\xc0")
    kernel.alternatives("rel13", [(site, kernel.replacement(b"\xc3"), FEATURE, 4, 1, {})])
    anonymous = Cpu("words", None, None, None, None, (1 << FEATURE,) + (0,) * 18)
    assert "vendor" in planned(tmp_path, kernel, Native(anonymous)).warnings[0]


def test_the_era_is_corrected_by_the_tables(tmp_path: Path) -> None:
    kernel = KernelMaker(release="5.4.200")
    site = kernel.code(b"\x89\xc0\x89\xc0")
    kernel.alternatives("rel12", [(site, kernel.replacement(b"\xc3"), FEATURE, 4, 1, {})])
    found = planned(tmp_path, kernel, Native(cpu(22)))
    assert found.rules != "linux-4.20"
    assert "backport" in found.warnings[0]


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    kernel, _ = modern("6.1.50")
    with pytest.raises(UsageError, match="feature words"):
        planned(tmp_path, kernel, Native(cpu(3)))
    with pytest.raises(UsageError, match="at least one"):
        planned(tmp_path, kernel, Native(cpu(24), cpus=0))
    kernel.release = "2.6.9"
    with pytest.raises(PatchError, match="older"):
        planned(tmp_path, kernel, Native(cpu(7)))
    kernel, _ = modern("6.1.50")
    kernel.symbols = [s for s in kernel.symbols if s[0] != "paravirt_BUG"]
    with pytest.raises(PatchError, match="paravirt_BUG"):
        planned(tmp_path, kernel, Native(cpu(24)))
    kernel, _ = modern("6.1.50")
    kernel.alternatives("rel12", [(0xC7000000, 0xC7000000, 3, 4, 3, {})])
    with pytest.raises(TableError) as caught:
        planned(tmp_path, kernel, Native(cpu(24)))
    assert caught.value.section == ".altinstructions"
    assert caught.value.address
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("release", "op", "body"), [
    # native_patch of arch/i386/kernel/paravirt.c in 2.6.22 and 2.6.23, whatever the slot holds.
    ("2.6.22", "paravirt_ops.pte_val", ""), ("2.6.23.1", "paravirt_ops.make_pmd", ""),
    # DEF_NATIVE of arch/x86/kernel/paravirt_patch_32.c: `sti; sysexit`, under the name of 2.6.25 and 2.6.26.
    ("2.6.25", "pv_cpu_ops.irq_enable_syscall_ret", "fb0f35"),
    ("2.6.26.2", "pv_cpu_ops.irq_enable_syscall_ret", "fb0f35"),
    ("2.6.24", "pv_cpu_ops.irq_enable_sysexit", "fb0f35"), ("2.6.27", "pv_cpu_ops.irq_enable_sysexit", "fb0f35"),
])  # fmt: skip
def test_native_code_that_few_releases_have(tmp_path: Path, release: str, op: str, body: str) -> None:
    kernel = KernelMaker(release=release)
    slot = kernel.word(kernel.code(b"\xc3"))
    address = kernel.code(b"\xff\x15" + slot.to_bytes(4, "little"))
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel.build())
    image = open_image(path)
    site = Site("parainstructions", address, 6, op, ".text", ".parainstructions", 0, Paravirt(1, slot, 7))
    rules = next(era for era in reversed(eras()) if era.since <= (image.version or ()))
    boot = Boot(image, rules, rules.nop_table(cpu(8), 32), Native(cpu(8)))
    (patch,) = ParavirtCalls().patches(Text(image), [site], boot)
    assert patch.new == bytes.fromhex(body) + boot.nops.fill(6 - len(body) // 2)
