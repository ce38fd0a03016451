"""Returns of either length: what ``patch_return`` makes of a jump to the return thunk, with and without a prefix."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker, wrapped
from vmipatch.annotate import scan
from vmipatch.image import open_image
from vmipatch.isa import nops
from vmipatch.patch import Native
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import PASSES, Boot
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
