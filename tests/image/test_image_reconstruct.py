"""Images without section headers: sections from symbols, tables by content, and what cannot be found is said."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from kallsyms_writer import Symbol, build

from tests.elfwriter import ElfWriter
from vmipatch.annotate import scan
from vmipatch.image import open_image

TOP = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
LOCK = bytes.fromhex("F00FB10B")
COUNT = 60


def kernel(
    bits: int, bounds: dict[str, tuple[int, int]], *, locks: bool = True, reader: int = 0x70, rest: str = "after"
) -> bytes:
    """A kernel of COUNT locked instructions; ``bounds`` are names of symbols at the two ends of parts.

    ``reader`` is the size of the function that reads the table, ``rest`` the name of the one behind it.
    """
    top, size = TOP[bits], 0x8000
    text = bytearray(b"\x90" * size)
    for n in range(COUNT):
        text[0x40 + 24 * n : 0x44 + 24 * n] = LOCK
    table_at = top + 0x40000
    entries = b"".join(struct.pack("<i", top + 0x40 + 24 * n - table_at - 4 * n) for n in range(COUNT))
    table = random.Random(1).randbytes(4096 if not locks else 0) or entries + bytes(-len(entries) % 4096)
    rows: list[Symbol] = [(top, "T", "_text"), (top + size, "T", "_etext")]
    rows += [(top + 0x100 * n, "t", f"function_{n}") for n in range(1, size // 0x100)]
    rows += [(top + 0x2010, "T", "alternatives_smp_module_add"), (top + 0x2010 + reader, "T", rest)]
    rows += [(top + 16 * n, "t", f"filler_{n}") for n in range(0x300, 0x500)]
    for start, end in bounds.items():
        rows += [(end[0], "R", start), (end[1], "R", start + "_end")]
    rows.sort()
    rows = [r for r in rows if not (r[2].startswith("filler") and top + 0x2010 < r[0] < top + 0x2010 + 0x80)]
    symbols = build(rows, bits=bits, addresses="relative", era="6.4")
    elf = ElfWriter(bits=bits)
    elf.section(".text", bytes(text), address=top, flags="ax", align=4096)
    rodata = b"Linux version 6.1.0 (x)\n\0".ljust(64, b"\0") + symbols
    elf.section(".rodata", rodata, address=top + 0x20000, flags="a", align=4096)
    elf.section(".smp_locks", table, address=table_at, flags="a", align=4096)
    data = bytearray(elf.build())
    at, width = (32, 4) if bits == 32 else (40, 8)
    data[at : at + width] = bytes(width)
    struct.pack_into("<HHH", data, 46 if bits == 32 else 58, 0, 0, 0)
    return bytes(data)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("known", [True, False])
def test_locks_are_found_by_symbols_and_by_content(bits: int, known: bool, tmp_path: Path) -> None:
    at = TOP[bits] + 0x40000
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel(bits, {"__smp_locks": (at, at + 4096)} if known else {}))
    image = open_image(path)
    assert image.reconstructed
    assert image.symbols.sources == ("kallsyms",)
    assert [(s.name, s.address) for s in image.code_sections] == [(".text", TOP[bits])]
    found = scan(image)
    assert [s.address for s in found.sites] == [TOP[bits] + 0x40 + 24 * n for n in range(COUNT)]
    locks = [(t.section, t.address, t.size, t.count, t.padding) for t in found.tables if t.family == "smp_locks"]
    assert locks == [(".smp_locks", at, 4096, COUNT, 1024 - COUNT)]
    assert {f.id for f in found.findings} <= {"table-missing"}
    assert ".smp_locks" not in {f.section for f in found.findings}
    # Every byte of the segments is in one section.
    for segment in image.segments:
        assert sum(s.size for s in image.sections if segment.address <= s.address < segment.end) == segment.memory_size


def test_a_table_that_is_not_found_is_said(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel(64, {}, locks=False))
    found = scan(open_image(path))
    assert found.sites == ()
    (finding,) = [f for f in found.findings if f.section == ".smp_locks"]
    assert (finding.id, finding.severity) == ("table-missing", "warning")
    assert "alternatives_smp_module_add" in finding.message


def test_a_reader_that_only_returns_wants_no_table(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel(64, {}, locks=False, reader=0x10))
    image = open_image(path)
    assert image.symbols.lookup("alternatives_smp_module_add") == TOP[64] + 0x2010
    assert scan(image).findings == ()


def test_a_reader_that_the_compiler_split_wants_its_table(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel(64, {}, locks=False, reader=0x10, rest="alternatives_smp_module_add.part.0"))
    (finding,) = [f for f in scan(open_image(path)).findings if f.section == ".smp_locks"]
    assert (finding.id, finding.address) == ("table-missing", TOP[64] + 0x2020)


def bundle(memory: bytes) -> bytes:
    """A shared library that holds a kernel's memory as libkrunfw does."""
    names = b"\0KERNEL_BUNDLE\0"
    rows = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0) + struct.pack("<IBBHQQ", 1, 0x11, 0, 3, 0x10000, len(memory))
    elf = ElfWriter(bits=64, kind="dyn")
    elf.section(".dynsym", rows, address=0x1000, flags="a", type=11, link=".dynstr", entry_size=24, align=8)
    elf.section(".dynstr", names, address=0x2000, flags="a", type="strtab")
    elf.section(".data", memory, address=0x10000, flags="aw", align=4096)
    return elf.build()


def test_the_kernel_in_a_library_is_opened_at_its_own_address(tmp_path: Path) -> None:
    at = TOP[64] + 0x40000
    (tmp_path / "elf").write_bytes(kernel(64, {"__smp_locks": (at, at + 4096)}))
    plain = open_image(tmp_path / "elf")
    memory = bytearray(0x42000)
    for segment in plain.segments:
        start = segment.address - TOP[64]
        memory[start : start + segment.file_size] = plain.read(segment.address, segment.file_size)
    (tmp_path / "libkrunfw.so").write_bytes(bundle(bytes(memory)))
    image = open_image(tmp_path / "libkrunfw.so")
    assert (image.container, image.kind, image.reconstructed) == ("raw", "linux", True)
    assert image.segments[0].address == TOP[64]
    assert [s.address for s in scan(image).sites] == [s.address for s in scan(plain).sites]
    # Offsets count in the library, so that a patch is written into it.
    assert image.data[image.offset_of(TOP[64] + 0x40) :][:4] == LOCK
