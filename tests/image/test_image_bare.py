"""bzImages of 2.6.21 to 2.6.25, whose payload is bare memory: tables, exports and relocations found by content."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.annotate.paravirt_words import Words, words
from tests.barekernel import EXCEPTIONS, Bare, bare
from vmipatch.annotate import Scan, scan
from vmipatch.cli import app
from vmipatch.image import Image, kaslr, open_image

ROWS = [None, *(row for row in words() if row.release in ("2.6.22", "2.6.23", "2.6.24", "2.6.25"))]
FAMILIES = ("parainstructions", "smp_locks", "altinstructions")


def release_of(row: Words | None) -> str:
    return row.release if row else "2.6.21"


def name_of(row: Words | None) -> str:
    return f"{row.release} {row.configuration}".strip() if row else "2.6.21"


def opened(tmp_path: Path, data: bytes) -> Image:
    (tmp_path / "bzImage").write_bytes(data)
    return open_image(tmp_path / "bzImage")


def found_in(tmp_path: Path, made: Bare) -> tuple[Image, Scan]:
    image = opened(tmp_path, made.bzimage())
    return image, scan(image)


def check(made: Bare, found: Scan) -> None:
    """Every site of each family and no other, none of their tables missing."""
    for family in FAMILIES:
        assert [(s.address, s.length) for s in found.of(family)] == made.sites[family], family
        at, size = made.parts.get(f".{family}", (0, 0))
        # Made-up sections may end with the zeros that fill a page.
        size += -size % 4096 if family == "smp_locks" else 0
        expected = [(made.base + at, size, len(made.sites[family]))] if made.sites[family] else []
        assert [(t.address, t.size, t.count) for t in found.tables if t.family == family] == expected
    assert [(t.address, t.count) for t in found.tables if t.family == "ex_table"] == [
        (made.base + made.parts["__ex_table"][0], EXCEPTIONS)
    ]
    assert found.findings == ()


@pytest.mark.parametrize("relocatable", [True, False])
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_every_site_is_found_and_named(row: Words | None, relocatable: bool, tmp_path: Path) -> None:
    made = bare(release_of(row), row, relocatable=relocatable)
    image, found = found_in(tmp_path, made)
    assert (image.container, image.bits, image.reconstructed) == ("bzimage", 32, True)
    check(made, found)
    assert [s.op for s in found.of("parainstructions")] == made.ops
    if relocatable:
        assert image.relocations is not None
        assert list(image.relocations.absolute32) == made.fields
    else:
        assert image.relocations is None
    section = image.section(".kallsyms")
    assert section is not None
    assert (section.address, section.end) == (made.symbols.start, made.symbols.stop)
    # The table of what moves is no memory, and every byte of memory is in one section.
    (segment,) = image.segments
    assert (segment.address, segment.file_size) == (made.base, len(made.memory))
    assert sum(s.size for s in image.sections) == len(made.memory)


@pytest.mark.parametrize("base", [0xC0100000, 0xC1000000, 0xC0400000, 0x80100000])
def test_where_the_kernel_was_linked(base: int, tmp_path: Path) -> None:
    made = bare("2.6.24", next(r for r in ROWS if r and r.release == "2.6.24"), base=base)
    image, found = found_in(tmp_path, made)
    assert image.read(base, 16) == made.memory[:16]
    check(made, found)


def test_symbols_come_from_exports_too(tmp_path: Path) -> None:
    row = next(r for r in ROWS if r and r.release == "2.6.24")
    image, _ = found_in(tmp_path, bare("2.6.24", row))
    assert set(image.symbols.sources) == {"kallsyms", "exports"}
    assert image.symbols.lookup("pv_irq_ops") is not None
    assert image.symbols.lookup("printk") == image.symbols.lookup("_stext") + 0x7000  # type: ignore[operator]


def test_without_exports_the_sites_are_there_and_have_no_slot_s_name(tmp_path: Path) -> None:
    row = next(r for r in ROWS if r and r.release == "2.6.24")
    made = bare("2.6.24", row, exports=False)
    image, found = found_in(tmp_path, made)
    assert image.symbols.sources == ("kallsyms",)
    assert [(s.address, s.length) for s in found.of("parainstructions")] == made.sites["parainstructions"]


def test_one_processor_needs_no_table_of_locks(tmp_path: Path) -> None:
    made = bare("2.6.24", next(r for r in ROWS if r and r.release == "2.6.24"), smp=False)
    check(made, found_in(tmp_path, made)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_that_is_not_found_is_said(family: str, tmp_path: Path) -> None:
    made = bare("2.6.24", next(r for r in ROWS if r and r.release == "2.6.24"))
    at, size = made.parts[f".{family}"]
    made.memory = made.memory[:at] + random.Random(1).randbytes(size) + made.memory[at + size :]
    _, found = found_in(tmp_path, made)
    assert not found.of(family)
    (finding,) = [f for f in found.findings if f.section == f".{family}"]
    assert (finding.id, finding.severity) == ("table-missing", "warning")


# The table of what moves


BASE = 0xC0100000


def table(fields: list[int], zero: int = 0) -> bytes:
    return struct.pack(f"<{len(fields) + 1}I", zero, *fields)


def memory(fields: list[int], size: int = 0x4001, value: int = BASE + 0x100) -> bytes:
    data = bytearray(random.Random(2).randbytes(size))
    for at in fields:
        struct.pack_into("<I", data, at - BASE, value)
    return bytes(data)


FIELDS = [BASE + 5 + 9 * n for n in range(200)]


def test_the_table_begins_at_its_zero() -> None:
    assert kaslr.start(memory(FIELDS) + table(FIELDS), BASE) == 0x4001
    # Physical addresses move as virtual ones do.
    assert kaslr.start(memory(FIELDS, value=0x100100) + table(FIELDS), BASE) == 0x4001


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (memory(FIELDS), "none there"),
        (b"", "nothing there"),
        (table(FIELDS), "no memory in front"),
        (memory(FIELDS[:9]) + table(FIELDS[:9]), "few enough to be chance"),
        (memory(FIELDS) + table(FIELDS, zero=7), "no stop"),
        (memory(FIELDS, value=0x12345678) + table(FIELDS), "what they name are no addresses"),
        (memory(FIELDS) + table([*FIELDS, BASE + 0x4001]), "a field behind the memory"),
        (memory(FIELDS) + table(FIELDS[::-1]), "not ascending"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_table_of_what_moves(data: bytes, why: str) -> None:
    assert kaslr.start(data, BASE) == len(data), why


def test_ops_are_not_all_alike() -> None:
    assert all(len(Counter(bare(release_of(row), row).ops)) > 3 for row in ROWS)


# What is written is bare memory too


def test_the_patched_memory_is_compared_and_scanned_by_its_base(tmp_path: Path) -> None:
    made = bare("2.6.24", next(r for r in ROWS if r and r.release == "2.6.24"))
    (tmp_path / "bzImage").write_bytes(made.bzimage())
    image = open_image(tmp_path / "bzImage")
    assert image.bare_base == made.base
    (tmp_path / "memory").write_bytes(image.data)
    again = open_image(tmp_path / "memory", base=image.bare_base)
    assert (again.container, again.bare_base, again.reconstructed) == ("raw", made.base, True)
    key = [(s.family, s.address, s.length, s.op) for s in scan(image).sites]
    assert [(s.family, s.address, s.length, s.op) for s in scan(again).sites] == key
    out = tmp_path / "patched"
    run = CliRunner()
    done = run.invoke(app, ["patch", str(image.path), "-o", str(out), "--target", "native", "--cpu", "pentium3"])
    assert done.exit_code == 0, done.output
    held = out.read_bytes()
    assert len(held) == len(image.data)
    # Nothing but code is changed.
    changed = [n for n, (old, new) in enumerate(zip(image.data, held, strict=True)) if old != new]
    inside = [made.parts[name] for name in (".text", ".init.text")]
    assert changed
    assert all(any(at <= n < at + size for at, size in inside) for n in changed)
    done = run.invoke(app, ["diff", str(image.path), str(out)])
    assert done.exit_code == 0, done.output
    assert ", 0 wrong" in done.output


def test_memory_that_nothing_describes_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(b"Linux version 2.6.24 (x)\n\0" + bytes(0x4000))
    image = open_image(tmp_path / "memory", base=BASE)
    assert image.sections == ()
    (finding,) = scan(image).findings
    assert (finding.id, finding.severity, finding.section) == ("table-missing", "warning", "image")
    (tmp_path / "System.map").write_text(f"{BASE:08x} T _text\n")
    assert scan(open_image(tmp_path / "memory", base=BASE, system_map=tmp_path / "System.map")).findings == ()
