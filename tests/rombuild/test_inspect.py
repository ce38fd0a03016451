"""The inspector on anything: bounded, never a traceback; relocations only from ROMs of ours."""

from __future__ import annotations

import ast
import random
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from romguest import PAIRS, rom

from vmipatch.errors import RomError, VmipatchError
from vmipatch.report import rom as report
from vmipatch.rombuild.check import check
from vmipatch.rombuild.inspect import disassemble, images, relocations
from vmipatch.rombuild.relocations import RelocationType, check_base

PACKAGE = Path(__file__).parents[2] / "vmipatch" / "rombuild"


@pytest.mark.parametrize("module", ["inspect", "check", "relocations"])
def test_the_reader_shares_no_code_with_the_writer(module: str) -> None:
    """Neither directly nor through what it imports."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vmipatch.rombuild"):
                parts = node.module.split(".")[2:] or [alias.name for alias in node.names]
                todo += [part for part in parts if (PACKAGE / f"{part}.py").is_file()]
    assert not seen & {"build", "stubs", "entry", "contract", "hypervisor", "symbols"}


def everything(data: bytes) -> None:
    """All that `rom inspect --json`, `rom inspect --stubs` and the patcher do."""
    try:
        found, findings = images(data), check(data)
    except RomError:
        return
    report.as_json("x", len(data), found, findings, disassemble)
    report.as_text(found, findings, disassemble, stubs=True)
    try:
        relocations(data)
    except VmipatchError:
        return


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=4096))
def test_random_bytes(data: bytes) -> None:
    everything(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=16, max_size=2048))
def test_random_bytes_behind_a_signature(data: bytes) -> None:
    everything(b"\x55\xaa" + data)
    everything(b"\x55\xaa\x04" + data[:5] + b"cVmi\0\3" + data)
    everything(b"\x55\xaa\x04" + data[:5] + b"cVmi\0\x0d" + data)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_roms(pair: tuple[str, str], changes: list[tuple[int, int]]) -> None:
    data = bytearray(rom(*pair).data)
    for at, value in changes:
        data[at % len(data)] = value
    everything(bytes(data))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), st.integers(0x20, 0x3C), st.integers(0, 0xFFFF))
def test_damaged_private_blocks(pair: tuple[str, str], at: int, value: int) -> None:
    data = bytearray(rom(*pair).data)
    struct.pack_into("<H", data, at, value)
    everything(bytes(data))


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_tiny_files(size: int) -> None:
    with pytest.raises(RomError, match="not an option ROM"):
        images(b"\x55\xaa\x01"[:size] if size < 3 else b"MZ\0")
    everything(b"\x55\xaa\x01"[:size])


def test_sixteen_megabytes() -> None:
    noise = random.Random(7).randbytes(1 << 20)
    image = rom("xen", "vmi-13.0").data
    chained = bytearray(512)
    chained[:3] = b"\x55\xaa\x01"
    struct.pack_into("<H", chained, 0x18, 0x40)
    chained[0x40:0x44] = b"PCIR"
    struct.pack_into("<H", chained, 0x40 + 0x10, 1)
    for data in (
        noise * 16,
        b"\x55\xaa\xff" + noise * 16,
        image + noise * 16,
        bytes(chained) * 32768,
        b"\x55\xaa" * (8 << 20),
    ):
        start = time.process_time()
        everything(data)
        assert time.process_time() - start < 2.0
    with pytest.raises(RomError, match="32 MiB"):
        images(b"\x55\xaa" + bytes(32 << 20))


@pytest.mark.parametrize(("hypervisor", "abi"), PAIRS)
def test_relocations(hypervisor: str, abi: str) -> None:
    answers = relocations(rom(hypervisor, abi).data)
    assert answers.abi == abi
    assert answers.hypervisor == hypervisor
    assert answers.generation == {"vmi-3.0": 3, "vmi-6.1": 6}.get(abi, 13)
    assert answers.image_offset == 0
    assert answers.image_size == len(rom(hypervisor, abi).data)
    assert answers.virtual_top == (0 if hypervisor == "native" else 0xFC000000)
    assert answers.of(100000).type is RelocationType.NONE
    with pytest.raises(AttributeError):
        answers.abi = "other"  # type: ignore[misc]


def test_relocations_are_refused() -> None:
    ours = bytearray(rom("native", "vmi-3.0").data)
    ours[0x20:0x24] = bytes(4)
    with pytest.raises(RomError, match="not ours"):
        relocations(bytes(ours))
    with pytest.raises(RomError, match="no VMI image"):
        relocations(b"\x55\xaa\x01\xcb" + bytes(508))
    with pytest.raises(RomError, match="not an option ROM"):
        relocations(b"")
    with pytest.raises(RomError, match="generation 13"):
        relocations(rom("native", "vmi-3.0").data, 13)
    table = struct.unpack_from("<H", ours, 0x28)[0]
    for offset, value, says in ((4, 9, "type 9"), (1, 0xFF, "out of the image"), (5, 1, "type")):
        broken = bytearray(rom("native", "vmi-3.0").data)
        broken[table + 8 * 28 + offset] = value
        with pytest.raises(RomError, match=says):
            relocations(bytes(broken))


def test_bases() -> None:
    check_base(0xC0000, 4096)
    check_base(0xDF800, 2048)
    for base, size, says in (
        (0xC0001, 512, "multiple of 2048"),
        (0xC0400, 512, "multiple of 2048"),
        (0xBF800, 512, "outside"),
        (0xE0000, 512, "outside"),
        (0xDF800, 4096, "outside"),
        (-2048, 512, "outside"),
    ):
        with pytest.raises(RomError, match=says):
            check_base(base, size)
