"""What the passes of newer boots write, by hand from arch/x86/kernel/alternative.c of 6.12, 7.2 and 7.3."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import Site, scan
from vmipatch.annotate.site import Thunk
from vmipatch.image import Image, open_image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import PASSES, Boot
from vmipatch.patch.passes.retpolines import direct
from vmipatch.patch.rules import Rules, eras
from vmipatch.patch.target import Native
from vmipatch.patch.text import Text

RAX, R11 = 0, 11


def era(name: str) -> Rules:
    return next(rules for rules in eras() if rules.name == name)


@pytest.mark.parametrize(
    ("kind", "register", "length", "fence", "old", "new"),
    [
        # kind, register, length, LFENCE, nops and one INT3 (6.12), prefixes and INT3 (6.18 on); before nops are joined
        ("call", RAX, 5, False, "ffd0 909090", "2e2e2e ffd0"),
        ("call", R11, 6, False, "41ffd3 909090", "2e2e2e 41ffd3"),
        ("call", R11, 5, False, "41ffd3 9090", "2e2e 41ffd3"),
        ("call", RAX, 6, False, "ffd0 90909090", "ffd0 90909090"),  # four are too many prefixes
        ("call", RAX, 5, True, "0faee8 ffd0", "0faee8 ffd0"),
        ("call", RAX, 6, True, "0faee8 ffd0 90", "0faee8 2e ffd0"),
        ("call", R11, 6, True, "0faee8 41ffd3", "0faee8 41ffd3"),
        ("call", R11, 5, True, None, None),
        ("jmp", RAX, 5, False, "ffe0 cc 9090", "ffe0 cccccc"),
        ("jmp", R11, 5, False, "41ffe3 cc 90", "41ffe3 cccc"),
        ("jmp", R11, 6, True, "0faee8 41ffe3", "0faee8 41ffe3"),
        ("jcc", R11, 6, False, "7404 41ffe3 cc", "7404 41ffe3 cc"),  # jne becomes je over it
        ("jcc", RAX, 6, False, "7404 ffe0 cc 90", "7404 ffe0 cccc"),
    ],
)  # fmt: skip
def test_indirect_branches(
    kind: str, register: int, length: int, fence: bool, old: str | None, new: str | None
) -> None:
    before = {"call": b"\xe8", "jmp": b"\xe9", "jcc": b"\x0f\x85"}[kind].ljust(length, b"\0")
    site = Site("retpoline_sites", 0x1000, length, f"{kind} it", ".text", "", 0, Thunk(0, register))
    for prefixes, wanted in ((False, old), (True, new)):
        found = direct(site, before, fence=fence, int3=True, prefixes=prefixes)
        assert found == (None if wanted is None else bytes.fromhex(wanted))


def kernel(folder: Path, maker: KernelMaker) -> Image:
    path = folder / "vmlinux"
    path.write_bytes(maker.build())
    return open_image(path)


XMM2, CLFLUSH, NOT = 26, 19, 1
ONE_, TWO_ = bytes.fromhex("0faee8"), bytes.fromhex("0faef0")


def run(image: Image, rules: Rules, features: list[int], start: int, length: int) -> str:
    words = [0] * 24
    for feature in features:
        words[feature >> 5] |= 1 << (feature & 31)
    boot = Boot(image, rules, rules.nop_tables(64)[0], Native(Cpu("made", None, None, None, None, tuple(words)), 2))
    text = Text(image)
    list(PASSES["altinstructions"].patches(text, scan(image, ["altinstructions"]).sites, boot))
    return text.read(start, length).hex()


@pytest.mark.parametrize("name", ["linux-6.9", "linux-7.0"])
@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ([], "ebfe" "0f1f440000"),  # neither: what is on disk, its nops joined
        ([XMM2], ONE_.hex() + "0f1f4000"),
        ([CLFLUSH], TWO_.hex() + "0f1f4000"),
        ([XMM2, CLFLUSH], TWO_.hex() + "0f1f4000"),  # the last one wins, whatever came before
    ],
)  # fmt: skip
def test_the_last_entry_of_a_place_that_applies_wins(
    name: str, features: list[int], wanted: str, tmp_path: Path
) -> None:
    """Nested entries of five and seven bytes: both count seven, and the padding is joined to the end of them."""
    maker = KernelMaker(bits=64, release="7.3.0")
    site = maker.code(bytes.fromhex("ebfe9090909090c3"))
    one, two = maker.replacement(ONE_), maker.replacement(TWO_)
    maker.alternatives("rel14", [(site, one, XMM2, 5, 3, {}), (site, two, CLFLUSH, 7, 3, {})])
    assert run(kernel(tmp_path, maker), era(name), features, site, 7) == wanted


@pytest.mark.parametrize(("name", "calls"), [("linux-6.9", False), ("linux-7.0", True)])
def test_a_direct_call_sees_the_disk_where_places_are_written_once(name: str, calls: bool, tmp_path: Path) -> None:
    """An entry before it that applies: up to 6.19 it has replaced the indirect call, and the kernel stops."""
    from vmipatch.errors import PatchError

    maker = KernelMaker(bits=64, release="7.3.0")
    function = maker.code(b"\xc3" * 16, "function")
    slot = maker.word(function)
    site = maker.code(b"\xff\x15" + bytes(4))
    maker.text[-4:] = struct.pack("<i", slot - site - 6)
    bug = maker.code(b"\xc3" * 16, "BUG_func")
    one = maker.replacement(ONE_)
    two = maker.replacement(bytes(5))
    maker.replacements[-5:] = b"\xe8" + struct.pack("<i", bug - two - 5)
    maker.alternatives("rel14", [(site, one, XMM2, 6, 3, {}), (site, two, CLFLUSH, 6, 5, {"flags": 2})])
    image = kernel(tmp_path, maker)
    call = b"\xe8" + struct.pack("<i", function - site - 5) + b"\x90"
    assert run(image, era(name), [CLFLUSH], site, 6) == call.hex()
    if calls:
        assert run(image, era(name), [XMM2, CLFLUSH], site, 6) == call.hex()
    else:
        with pytest.raises(PatchError):
            run(image, era(name), [XMM2, CLFLUSH], site, 6)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("linux-6.18", "4889f6" "90" "c3" "0f1f00"), ("linux-6.19", "0f1f4000" "c3" "0f1f00")],
)  # fmt: skip
def test_mov_of_a_register_to_itself_is_a_nop_since_6_19(name: str, wanted: str, tmp_path: Path) -> None:
    """``mov rsi, rsi; nop; ret; nop; nop; nop``: the first run has two instructions since then, one before."""
    maker = KernelMaker(bits=64, release="7.3.0")
    site = maker.code(bytes.fromhex("4889f690c3909090"))
    replacement = maker.replacement(ONE_)
    maker.alternatives("rel14", [(site, replacement, XMM2, 8, 3, {})])
    assert run(kernel(tmp_path, maker), era(name), [], site, 8) == wanted
