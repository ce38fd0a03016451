"""Returns of either length: what ``patch_return`` makes of a jump to the return thunk, with and without a prefix."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker, wrapped
from vmipatch.annotate import scan
from vmipatch.explain.engine import lay_plan
from vmipatch.explain.ground import Ground
from vmipatch.image import open_image
from vmipatch.isa import nops
from vmipatch.patch import Native
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import PASSES, Boot
from vmipatch.patch.planner import boot_plan
from vmipatch.patch.rules import eras
from vmipatch.patch.text import Text


@pytest.mark.parametrize("prefix", [b"", b"\x2e"])
@pytest.mark.parametrize("thunked", [False, True])
def test_a_return_fills_its_site(tmp_path: Path, prefix: bytes, thunked: bool) -> None:
    maker = KernelMaker(64, release="7.3.0")
    thunk = maker.code(b"\xc3".ljust(16, b"\xcc"), "__x86_return_thunk")
    at = maker.code(prefix + b"\xe9" + struct.pack("<i", -16 - len(prefix) - 5) + b"\xcc" * 8, "f")
    table = maker.next_table()
    maker.table(".return_sites", struct.pack("<i", wrapped(at - table)))
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    image = open_image(path)
    rules = next(era for era in eras() if era.name == "linux-7.0")
    words = [0] * 24
    bit = rules.bit("RETHUNK")
    assert bit is not None
    words[bit >> 5] |= thunked << (bit & 31)
    boot = Boot(image, rules, nops.table("p6-11"), Native(Cpu("made", None, None, None, None, tuple(words)), 1))
    text = Text(image)
    patches = list(PASSES["return_sites"].patches(text, scan(image, ["return_sites"]).sites, boot))
    assert [p.address for p in patches] == [at]
    expected = b"\xe9" + struct.pack("<i", thunk - at - 5) if thunked else b"\xc3" + b"\xcc" * 4
    assert text.read(at, 5 + len(prefix)) == expected + b"\xcc" * len(prefix)


@pytest.mark.parametrize("thunked", [False, True])
@pytest.mark.parametrize("odd", [False, True])
def test_a_table_in_bulk_becomes_what_its_sites_become(tmp_path: Path, thunked: bool, odd: bool) -> None:
    """Some of the returns lie in the site of an alternative; an ``odd`` one has a prefix, so none is taken in bulk."""
    maker = KernelMaker(64, release="6.1.176")
    thunk = maker.code(b"\xc3".ljust(16, b"\xcc"), "__x86_return_thunk")
    sites = []
    for number in range(40):
        prefix = b"\x2e" if odd and number == 9 else b""
        back = struct.pack("<i", -16 - 16 * number - len(prefix) - 5)
        sites.append(maker.code((prefix + b"\xe9" + back).ljust(16, b"\xcc"), f"f{number}"))
    table = maker.next_table()
    rows = [struct.pack("<i", wrapped(at - (table + 4 * i))) for i, at in enumerate(sites)]
    maker.table(".return_sites", b"".join(rows))
    maker.alternatives("rel12", [(sites[3], maker.replacement(b"\x90"), 3 * 32 + 21, 5, 1, {})])
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    image = open_image(path)
    bit = next(era for era in eras() if era.name == "linux-5.13").bit("RETHUNK")
    assert bit is not None
    words = [0] * 21
    words[3] = 1 << 21
    words[bit >> 5] |= thunked << (bit & 31)
    native = Native(Cpu("made", None, None, None, None, tuple(words), complete=True), 1)
    families = ("altinstructions", "return_sites")
    one, many = scan(image, families), scan(image, families, bulk=("return_sites",))
    assert bool(many.bulk) != odd
    assert many.of("return_sites") == one.of("return_sites")
    assert many.findings == one.findings
    texts, later = [], []
    for found in (one, many):
        planned = boot_plan(image, found, native)
        assert bool(planned.runs) == bool(found.bulk)
        later.append([p for p in planned.patches if p.cause.family == "altinstructions"])
        text = image.section(".text")
        assert text is not None
        disk = image.read(text.address, text.size)
        ground = Ground(image, text.address, disk, disk)
        lay_plan(ground, planned)
        texts.append(bytes(ground.expected))
    assert texts[0] == texts[1] != disk
    assert later[0] == later[1] != []
    assert texts[0][thunk - text.address] == 0xC3
