"""Static calls, keys and runtime constants of a made-up 64-bit text, with the dump's variables and without them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.corewriter import core
from tests.elfwriter import ElfWriter
from vmipatch.annotate import Site, scan
from vmipatch.annotate.site import JumpLabel, Lock, RuntimeConst, StaticCall
from vmipatch.explain import Memory, chosen, engine
from vmipatch.explain.ground import Ground
from vmipatch.explain.late import LATE, Live, staticcalls
from vmipatch.explain.running import Running
from vmipatch.image import Image, open_image
from vmipatch.patch.passes import Boot
from vmipatch.patch.rules import eras

TEXT, DATA = 0xFFFFFFFF81000000, 0xFFFFFFFF82000000
ONE, TWO, RETURN0, THUNK, KEY, VARIABLE = TEXT, TEXT + 16, TEXT + 32, TEXT + 48, DATA, DATA + 64
CALLS = TEXT + 0x100
NOP = bytes.fromhex("0F1F440000")
WARN, CONDITIONAL = TEXT + 64, TEXT + 80
UD1, JNE = bytes.fromhex("67480FB93A"), bytes.fromhex("0F85")
INLINE = {RETURN0: (bytes.fromhex("2E2E2E31C0"), bytes.fromhex("6631C06690")), WARN: (UD1,)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", b"\xc3" * 0x1000, address=TEXT, flags="ax", align=4096)
    elf.section(".data", struct.pack("<Q", ONE) + bytes(0xFF8), address=DATA, flags="aw", align=4096)
    named = ("one", ONE), ("two", TWO), ("__static_call_return0", RETURN0), ("thunk", THUNK), ("calls", CALLS)
    for name, address in named:
        elf.symbol(name, address, ".text", size=16)
    elf.symbol("variable", VARIABLE, ".data", size=8)
    elf.symbol("x86_return_thunk", DATA + 128, ".data", size=8)
    path = tmp_path_factory.mktemp("kernel") / "vmlinux"
    path.write_bytes(elf.build())
    return open_image(path)


def near(opcode: int, address: int, target: int) -> bytes:
    return bytes((opcode,)) + struct.pack("<i", target - address - 5)


def call_site(number: int, *, tail: bool = False) -> Site:
    detail = StaticCall(KEY, TEXT + 0x800, tail)
    return Site("static_calls", CALLS + 16 * number, 5, "it", ".static_call_sites", "", number, detail)


def running(image: Image, folder: Path, text: bytes, data: bytes) -> Running:
    """The running kernel in a core by virtual addresses."""
    dump = folder / "dump"
    nowhere = (1 << 64) - 1
    dump.write_bytes(core([(TEXT, nowhere, text), (DATA, nowhere, data.ljust(0x1000, b"\0"))]))
    return Running(image, Memory(dump), 0, None, "made")


def live(image: Image, dump: Running | None) -> Live:
    """A boot by the rules of 6.1, whose nops for x86-64 are those of the P6."""
    rules = next(era for era in eras() if era.name == "linux-5.13")
    return Live(Boot(image, rules, rules.nop_tables(64)[0]), dump)


def left(
    image: Image,
    found: bytearray,
    sites: list[Site],
    dump: Running | None,
    thunk: int | None = None,
    *,
    forced: bool = False,
) -> set[int]:
    """Sites of static calls that are not as expected, by number."""
    forms = staticcalls.CallForms(
        64, NOP, RETURN0, INLINE, thunk, None, forced=forced, conditional=CONDITIONAL
    )  # fmt: skip
    disk = bytearray(b"\xc3" * 0x1000)
    for site in sites:
        if site.length == 6:
            disk[site.address - TEXT : site.address - TEXT + 2] = JNE
    ground = Ground(image, TEXT, bytes(disk), bytes(found))
    staticcalls.expect(ground, sites, dump, forms)
    return {
        site.entry for site in sites
        if ground.found[site.address - TEXT : site.end - TEXT] != ground.expected[site.address - TEXT : site.end - TEXT]
    }  # fmt: skip


def laid(code: dict[int, bytes]) -> bytearray:
    text = bytearray(b"\xc3" * 0x1000)
    for number, piece in code.items():
        at = CALLS - TEXT + 16 * number
        text[at : at + len(piece)] = piece
    return text


def to(function: int, numbers: range) -> dict[int, bytes]:
    return {n: near(0xE8, CALLS + 16 * n, function) for n in numbers}


def test_calls_that_agree_are_believed_without_their_key_and_few_are_not(image: Image) -> None:
    sites = [call_site(n) for n in range(20)]
    assert left(image, laid(to(TWO, range(20))), sites, None) == set()
    # One in twenty calls something else; the others agree.
    assert left(image, laid(to(TWO, range(19)) | to(THUNK, range(19, 20))), sites, None) == {19}
    # Where more than one in ten do not, nobody is believed but what the key held on disk.
    assert left(image, laid(to(TWO, range(17)) | to(ONE, range(17, 20))), sites, None) == set(range(17))
    # Three sites are too few to outvote the key on disk, four are not.
    assert left(image, laid(to(TWO, range(3))), sites[:3], None) == {0, 1, 2}
    assert left(image, laid(to(TWO, range(4))), sites[:4], None) == set()
    # The middle of a function is no function.
    assert left(image, laid(to(TWO + 1, range(20))), sites, None) == set(range(20))


def test_what_the_key_holds_decides(image: Image, tmp_path: Path) -> None:
    sites = [call_site(0), call_site(1, tail=True)]
    calls = laid({0: near(0xE8, CALLS, TWO), 1: near(0xE9, CALLS + 16, TWO)})
    assert left(image, calls, sites, running(image, tmp_path, calls, struct.pack("<Q", TWO))) == set()
    assert left(image, calls, sites, running(image, tmp_path, calls, struct.pack("<Q", ONE))) == {0, 1}
    none = laid({0: NOP, 1: b"\xc3\xcc\xcc\xcc\xcc"})
    assert left(image, none, sites, running(image, tmp_path, none, bytes(8))) == set()
    assert left(image, none, sites, running(image, tmp_path, none, struct.pack("<Q", TWO))) == {0, 1}
    # A tail call of nothing is a return: through the thunk where there is one, and plain if it was made before that.
    through = laid({0: NOP, 1: near(0xE9, CALLS + 16, THUNK)})
    assert left(image, through, sites, running(image, tmp_path, through, bytes(8)), THUNK) == set()
    assert left(image, through, sites, running(image, tmp_path, through, bytes(8))) == {1}
    assert left(image, none, sites, running(image, tmp_path, none, bytes(8)), THUNK) == set()
    for form in ("2E2E2E31C0", "6631C06690"):
        zero = laid({0: bytes.fromhex(form), 1: near(0xE9, CALLS + 16, RETURN0)})
        assert left(image, zero, sites, running(image, tmp_path, zero, struct.pack("<Q", RETURN0))) == set()
    wrong = laid({0: bytes.fromhex("2E2E2E33C0"), 1: near(0xE9, CALLS + 16, RETURN0)})
    assert left(image, wrong, sites, running(image, tmp_path, wrong, struct.pack("<Q", RETURN0))) == {0}


def test_a_trap_is_written_out_only_where_the_key_holds_it(image: Image, tmp_path: Path) -> None:
    """__WARN_trap of 6.19: UD1 in place of the call, a jump in a tail site and in the trampoline."""
    sites = [call_site(0), call_site(1, tail=True)]
    trap = laid({0: UD1, 1: near(0xE9, CALLS + 16, WARN)})
    assert left(image, trap, sites, running(image, tmp_path, trap, struct.pack("<Q", WARN))) == set()
    assert left(image, trap, sites, running(image, tmp_path, trap, struct.pack("<Q", TWO))) == {0, 1}
    called = laid({0: near(0xE8, CALLS, WARN), 1: UD1})
    assert left(image, called, sites, running(image, tmp_path, called, struct.pack("<Q", WARN))) == {0, 1}
    # Without the key's value a trap is not believed: the key held another function on disk.
    assert left(image, trap, sites[:1], None) == {0}


def test_a_kernel_that_writes_its_calls_again_leaves_no_plain_return(image: Image, tmp_path: Path) -> None:
    """static_call_force_reinit goes over the sites; a trampoline keeps the return that was written before."""
    site = call_site(0, tail=True)
    trampoline = site._replace(detail=StaticCall(KEY, site.address, True))
    plain = laid({0: b"\xc3\xcc\xcc\xcc\xcc"})
    dump = running(image, tmp_path, plain, bytes(8))
    assert left(image, plain, [site], dump, THUNK) == set()
    assert left(image, plain, [site], dump, THUNK, forced=True) == {0}
    assert left(image, plain, [trampoline], dump, THUNK, forced=True) == set()


def conditional(target: int, opcode: bytes = JNE) -> bytes:
    return opcode + struct.pack("<i", target - CALLS - 6)


def test_conditional_tail_calls_keep_their_condition(image: Image, tmp_path: Path) -> None:
    """What clang makes of a tail call behind a test: six bytes, of which the last four are the kernel's."""
    sites = [call_site(0, tail=True)._replace(length=6)]
    for holds, goes, thunk in ((TWO, TWO, None), (0, CONDITIONAL, None), (0, THUNK, THUNK)):
        text = laid({0: conditional(goes)})
        dump = running(image, tmp_path, text, struct.pack("<Q", holds))
        assert left(image, text, sites, dump, thunk) == set()
    for wrong in (conditional(TWO, b"\x0f\x84"), conditional(ONE), near(0xE9, CALLS, TWO) + b"\xc3"):
        text = laid({0: wrong})
        assert left(image, text, sites, running(image, tmp_path, text, struct.pack("<Q", TWO))) == {0}


def test_runtime_constants_are_what_the_variable_holds(image: Image, tmp_path: Path) -> None:
    sites = [
        Site(
            "runtime_consts",
            CALLS + 16 * n,
            8,
            "variable",
            "runtime_ptr_variable",
            "",
            n,
            RuntimeConst("ptr", "variable"),
        )
        for n in range(3)
    ]
    value = struct.pack("<Q", 0xFFFF888001234560)
    text = laid(dict.fromkeys(range(3), value))

    def wrong(found: bytearray, dump: Running | None) -> set[int]:
        ground = Ground(image, TEXT, b"\xc3" * 0x1000, bytes(found))
        LATE["runtime_consts"].expect(ground, sites, live(image, dump))
        return {(address - CALLS) // 16 for address, _ in ground.differences()}

    assert wrong(text, running(image, tmp_path, text, bytes(64) + value)) == set()
    assert wrong(text, running(image, tmp_path, text, bytes(64) + struct.pack("<Q", 7))) == {0, 1, 2}
    assert wrong(text, None) == set()
    odd = laid({0: value, 1: value, 2: struct.pack("<Q", 7)})
    assert wrong(odd, None) == {2}


@pytest.mark.parametrize(("count", "explained"), [(0, {False}), (1, {True}), (7, {True}), (-1, {False, True})])
def test_the_count_of_a_key(image: Image, tmp_path: Path, count: int, explained: set[bool]) -> None:
    """-1 is a key that is being switched on: its one branch may be changed already or not."""
    site = Site("jump_labels", CALLS, 5, "key", "__jump_table", "", 0, JumpLabel(TEXT + 0x800, KEY, False))
    good = set()
    for taken, code in ((False, NOP), (True, near(0xE9, CALLS, TEXT + 0x800))):
        text = laid({0: code})
        ground = Ground(image, TEXT, b"\xc3" * 0x1000, bytes(text))
        dump = running(image, tmp_path, text, struct.pack("<i", count))
        LATE["jump_labels"].expect(ground, [site], live(image, dump))
        if next(ground.differences(), None) is None:
            good.add(taken)
    assert good == explained


def test_the_return_thunk_is_what_the_kernels_variable_says(image: Image, tmp_path: Path) -> None:
    """Whatever most returns go to: who has redirected them all has not become the kernel's choice by that."""
    text = laid({})
    ground = Ground(image, TEXT, b"\xc3" * 0x1000, bytes(text))
    found = scan(image, ["return_sites"])
    dump = running(image, tmp_path, text, bytes(128) + struct.pack("<Q", THUNK))
    assert chosen.return_thunk(image, dump, found, ground) == THUNK
    sites = tuple(Site("return_sites", CALLS + 16 * n, 5, "return", "", "", n, Lock()) for n in range(9))
    text = laid({n: near(0xE9, CALLS + 16 * n, TWO) for n in range(9)})
    ground = Ground(image, TEXT, b"\xc3" * 0x1000, bytes(text))
    dump = running(image, tmp_path, text, bytes(128) + struct.pack("<Q", THUNK))
    assert chosen.return_thunk(image, dump, replace(found, sites=sites), ground) == THUNK
    # Text alone: what they agree on.
    alone = running(image, tmp_path, text, b"")
    assert chosen.return_thunk(image, alone, replace(found, sites=sites), ground) == TWO


def test_a_key_that_no_symbol_names_is_found_beside_its_trampoline(tmp_path: Path) -> None:
    """struct lsm_static_call (include/linux/lsm_hooks.h of 6.12) has the key's address, then the trampoline's."""
    tramp, table = TEXT + 0x800, DATA + 0x100
    text = bytearray(b"\xc3" * 0x1000)
    text[0x800:0x805] = near(0xE9, tramp, THUNK)
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", bytes(text), address=TEXT, flags="ax", align=4096)
    data = bytes(0x100) + struct.pack("<QQ", KEY + 8, tramp) + bytes(0xEF0)
    elf.section(".data", data, address=DATA, flags="aw", align=4096)
    elf.symbol("__x86_return_thunk", THUNK, ".text", size=16).symbol("two", TWO, ".text", size=16)
    (tmp_path / "vmlinux").write_bytes(elf.build())
    kernel = open_image(tmp_path / "vmlinux")
    site = Site("static_calls", tramp, 5, f"{tramp:#x}", ".text", "", 0, StaticCall(0, tramp, True))
    text[0x800:0x805] = near(0xE9, tramp, TWO)
    assert table == DATA + data.index(struct.pack("<Q", KEY + 8))
    for held, wrong in ((TWO, set()), (ONE, {0})):
        ground = Ground(kernel, TEXT, kernel.read(TEXT, 0x1000), bytes(text))
        dump = running(kernel, tmp_path, bytes(text), bytes(8) + struct.pack("<Q", held))
        LATE["static_calls"].expect(ground, [site], live(kernel, dump))
        assert {0 for _ in ground.differences()} == wrong


def test_an_image_without_named_data_is_judged_by_what_it_has(tmp_path: Path) -> None:
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", b"\xc3" * 0x1000, address=TEXT, flags="ax", align=4096)
    elf.section(".load0", b"\1" * 0x1000, address=DATA, flags="aw", align=4096)
    (tmp_path / "vmlinux").write_bytes(elf.build())
    kernel = open_image(tmp_path / "vmlinux")
    assert engine._has_data(running(kernel, tmp_path, b"\xc3" * 0x1000, b""))
    dump = tmp_path / "dump"
    dump.write_bytes(core([(TEXT, (1 << 64) - 1, b"\xc3" * 0x1000)]))
    assert not engine._has_data(Running(kernel, Memory(dump), 0, None, "made"))
