"""Kernels without section headers: the same sites and counts as with them, from symbols and from content."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vmipatch.annotate import scan
from vmipatch.image import open_image

from .conftest import RealKernel

Get = Callable[[str], RealKernel]


def stripped(elf: Path, target: Path) -> Path:
    """The ELF file with e_shoff, e_shnum and e_shstrndx zero."""
    data = bytearray(elf.read_bytes())
    if data[4] == 2:
        struct.pack_into("<Q", data, 0x28, 0)
        struct.pack_into("<HH", data, 0x3C, 0, 0)
    else:
        struct.pack_into("<I", data, 0x20, 0)
        struct.pack_into("<HH", data, 0x30, 0, 0)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("name", ["686", "6.12-amd64"])
def test_sites_and_counts_are_those_with_headers(real_kernel: Get, name: str, tmp_path: Path) -> None:
    elf = real_kernel(name).elf
    whole, bare = open_image(elf), open_image(stripped(elf, tmp_path / "bare"))
    assert not whole.reconstructed
    assert bare.reconstructed
    expected, found = scan(whole), scan(bare)
    key = [(s.family, s.address, s.length, s.op, s.detail) for s in expected.sites]
    assert [(s.family, s.address, s.length, s.op, s.detail) for s in found.sites] == key
    assert len(key) > 9000
    assert found.findings == ()
    # The mcount table has zero entries at one end, which only its symbols count.
    counts = {(t.family, t.count, t.layout) for t in expected.tables if t.family != "mcount"}
    assert {(t.family, t.count, t.layout) for t in found.tables if t.family != "mcount"} == counts
    assert {s.name for s in bare.code_sections} >= {".text", ".init.text"}
