"""Every table layout is read and told from every other one by the bytes; faults are findings that name the entry."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.elfwriter import ElfWriter
from tests.kernelmaker import ALTERNATIVE, TEXT, KernelMaker
from vmipatch.annotate import Scan, scan
from vmipatch.annotate.site import Alternative, Vmi
from vmipatch.errors import UsageError
from vmipatch.image import open_image


def scanned(folder: Path, data: bytes, **options: object) -> Scan:
    path = folder / "vmlinux"
    path.write_bytes(data)
    return scan(open_image(path), **options)  # type: ignore[arg-type]


def with_alternatives(layout: str, count: int = 12) -> tuple[KernelMaker, list[tuple[int, int, int, int, int]]]:
    kernel = KernelMaker(64 if "64" in layout else 32)
    rows, expected = [], []
    for i in range(count):
        site = kernel.code(b"\x89\xc0" * 2 + b"\x90" * (i % 4 + 1))
        replacement = kernel.replacement(b"\x0f\xae\xf0")
        length = 4 + i % 4 + 1
        rows.append((site, replacement, 26 + i, length, 3, {"pad": i % 4 + 1}))
        expected.append((site, length, 26 + i, replacement, 3))
    kernel.alternatives(layout, rows)
    return kernel, expected


@pytest.mark.parametrize("layout", sorted(ALTERNATIVE))
def test_alternatives_of_every_layout(tmp_path: Path, layout: str) -> None:
    kernel, expected = with_alternatives(layout)
    found = scanned(tmp_path, kernel.build())
    (table,) = found.tables
    assert (table.layout, table.count, found.findings) == (layout, len(expected), ())
    rows = []
    for site in found.sites:
        assert isinstance(site.detail, Alternative)
        detail = site.detail
        rows.append((site.address, site.length, detail.feature, detail.replacement, detail.replacement_length))
        assert detail.pad_length == (site.length - 4 if layout == "rel13" else None)
        assert not detail.inverted
    assert rows == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_relative_layouts_of_64_bit_kernels(tmp_path: Path, bits: int) -> None:
    kernel = KernelMaker(bits)
    site = kernel.code(b"\xe8\x00\x00\x00\x00")
    kernel.alternatives("rel12", [(site, kernel.replacement(b"\x90" * 5), 3 | 0x8000, 5, 5, {})])
    (only,) = scanned(tmp_path, kernel.build()).sites
    assert isinstance(only.detail, Alternative)
    assert (only.address, only.detail.feature, only.detail.inverted) == (site, 3, True)
    assert only.op.startswith("!")


def test_flags_of_6_3(tmp_path: Path) -> None:
    kernel = KernelMaker(32)
    site = kernel.code(b"\xff\x15\x00\x00\x10\xc1")
    body = kernel.replacement(b"\xe8\x00\x00\x00\x00")
    kernel.alternatives("rel14", [(site, body, 7, 6, 5, {"flags": 1}), (site, body, 7, 6, 5, {"flags": 2})])
    first, second = (s.detail for s in scanned(tmp_path, kernel.build()).sites)
    assert isinstance(first, Alternative)
    assert isinstance(second, Alternative)
    assert (first.inverted, first.direct_call, second.inverted, second.direct_call) == (True, False, False, True)


def test_the_last_entry_may_lack_its_padding(tmp_path: Path) -> None:
    kernel, expected = with_alternatives("abs32-u8")
    name, data, address = kernel.tables[0]
    kernel.tables[0] = (name, data[:-1], address)
    assert len(data[:-1]) % 12 == 11
    found = scanned(tmp_path, kernel.build())
    assert [s.address for s in found.sites] == [row[0] for row in expected]
    assert not found.findings


@pytest.mark.parametrize(("layout", "bits"), [("abs32", 32), ("abs64", 64), ("rel32", 32), ("rel32", 64)])
def test_locks_of_every_layout(tmp_path: Path, layout: str, bits: int) -> None:
    kernel = KernelMaker(bits)
    sites = [kernel.code(b"\xf0\xff\x00") for _ in range(20)]
    kernel.locks(layout, [*sites[:7], 0, *sites[7:], 0, 0])
    found = scanned(tmp_path, kernel.build())
    (table,) = found.tables
    # Zeros name nothing: they are no entries, wherever they stand.
    assert (table.layout, table.count, table.padding, [s.address for s in found.sites]) == (layout, 20, 3, sites)
    assert not found.findings


def test_a_lock_behind_another_prefix_is_one(tmp_path: Path) -> None:
    kernel = KernelMaker()
    sites = [kernel.code(b"\x66\xf0\x0f\xb1\x0a"), kernel.code(b"\x66\x90")]
    kernel.locks("rel32", sites)
    found = scanned(tmp_path, kernel.build())
    assert [s.address for s in found.sites] == sites[:1]
    (finding,) = found.findings
    assert finding.id == "lock-no-prefix"
    assert f"{sites[1]:#x}" in finding.message


@pytest.mark.parametrize("bits", [32, 64])
def test_paravirt_sites_and_their_slots(tmp_path: Path, bits: int) -> None:
    kernel = KernelMaker(bits)
    slot = kernel.word(0)
    shapes = []
    for before, opcode, after in (
        (b"", b"\xff\x15", b""),
        (b"\x51\x52", b"\xff\x15", b"\x5a\x59"),
        (b"\x50\x51\x52\x2e", b"\xff\x15", b"\x5a\x59\x58"),
        (b"\x2e", b"\xff\x25", b""),
    ):
        here = TEXT + kernel.high + len(kernel.text)
        operand = slot if bits == 32 else slot - (here + len(before) + 6)
        body = before + opcode + struct.pack("<I" if bits == 32 else "<i", operand) + after
        shapes.append((kernel.code(body), 43, len(body), 7))
    kernel.paravirt(shapes)
    found = scanned(tmp_path, kernel.build())
    (finding,) = found.findings
    assert (finding.id, finding.severity, finding.address) == ("op-unknown", "warning", shapes[0][0])
    assert dict(finding.details) == {"type": 43, "slot_address": slot, "sites": 4}
    assert [(s.address, s.length) for s in found.sites] == [(a, n) for a, _, n, _ in shapes]
    assert [s.detail.slot for s in found.sites if hasattr(s.detail, "slot")] == [slot] * 4
    assert all(s.op == "unknown" for s in found.sites)  # nothing names the slot: never a guess


def test_a_64_bit_table_may_lack_its_last_padding(tmp_path: Path) -> None:
    kernel = KernelMaker(64)
    slot = kernel.word(0)
    sites = []
    for _ in range(3):
        here = TEXT + kernel.high + len(kernel.text)
        sites.append(kernel.code(b"\xff\x15" + struct.pack("<i", slot - here - 6)))
    kernel.paravirt([(a, 2, 6, 1) for a in sites])
    name, data, address = kernel.tables[0]
    kernel.tables[0] = (name, data[:-4], address)
    assert [s.address for s in scanned(tmp_path, kernel.build()).sites] == sites


BAD = {
    "outside": ("entry-outside-image", lambda k, good: (0xC7000000, good[1], 3, 4, 3, {})),
    "in data": ("site-not-executable", lambda k, good: (k.word(0) , good[1], 3, 4, 3, {})),
    "no length": ("entry-length", lambda k, good: (good[0], good[1], 3, 0, 0, {})),
    "length 255": ("entry-length", lambda k, good: (good[0], good[1], 3, 255, 3, {})),
    "replacement longer": ("replacement-too-long", lambda k, good: (good[0], good[1], 3, 2, 3, {})),
    "replacement outside": ("entry-outside-image", lambda k, good: (good[0], 0xC7000000, 3, 4, 3, {})),
    "inside an instruction": (
        "site-not-instructions",
        lambda k, good: (k.code(b"\xb8\x01\x02\x03\x04"), good[1], 3, 4, 3, {}),
    ),
    "no such feature": ("entry-feature", lambda k, good: (good[0], good[1], 0x7FFF, 4, 3, {})),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(BAD))
def test_a_bad_entry_is_a_finding_that_names_it(tmp_path: Path, what: str) -> None:
    identifier, make = BAD[what]
    kernel = KernelMaker()
    good = []
    for _ in range(8):
        site = kernel.code(b"\x89\xc0\x89\xc0")
        good.append((site, kernel.replacement(b"\x0f\xae\xf0"), 26, 4, 3, {"pad": 0}))
    rows = [*good[:5], make(kernel, good[5]), *good[5:]]
    table = kernel.alternatives("rel13", rows)
    found = scanned(tmp_path, kernel.build())
    assert len(found.sites) == len(good)
    (finding,) = found.findings
    assert (finding.id, finding.section, finding.address) == (identifier, ".altinstructions", table + 5 * 13)
    assert finding.message.startswith("entry 5:")


def test_a_table_that_fits_no_layout_names_its_entry(tmp_path: Path) -> None:
    kernel = KernelMaker()
    kernel.code(b"\x90" * 64)
    table = kernel.table(".altinstructions", bytes(range(1, 157)))
    found = scanned(tmp_path, kernel.build())
    (finding,) = found.findings
    assert finding.id == "table-layout"
    assert finding.address is not None
    assert table <= finding.address < table + 156
    assert not found.sites


def test_an_odd_size_is_a_finding(tmp_path: Path) -> None:
    kernel = KernelMaker()
    kernel.table(".parainstructions", bytes(9))
    (finding,) = scanned(tmp_path, kernel.build()).findings
    assert finding.id == "table-size"


def test_an_override_reads_against_the_evidence(tmp_path: Path) -> None:
    kernel, _ = with_alternatives("rel12", 13)
    found = scanned(tmp_path, kernel.build(), layouts={"altinstructions": "rel13"})
    (table,) = found.tables
    assert (table.layout, table.count) == ("rel13", 12)
    assert found.findings
    with pytest.raises(UsageError, match="rel99"):
        scanned(tmp_path, kernel.build(), layouts={"altinstructions": "rel99"})
    with pytest.raises(UsageError, match="no family"):
        scanned(tmp_path, kernel.build(), families=["nothing"])


def test_sites_that_overlap_in_part_are_a_finding(tmp_path: Path) -> None:
    kernel = KernelMaker()
    site = kernel.code(b"\x89\xc0" * 6)
    body = kernel.replacement(b"\x90" * 4)
    nested = [(site, body, 1, 8, 4, {}), (site + 2, body, 1, 4, 4, {}), (site, body, 2, 8, 4, {})]
    kernel.alternatives("rel12", nested)
    assert not scanned(tmp_path, kernel.build()).findings
    kernel.tables.clear()
    kernel.alternatives("rel12", [*nested, (site + 4, body, 1, 8, 4, {})])
    found = [f for f in scanned(tmp_path, kernel.build()).findings if f.id == "site-overlap"]
    assert [f.address for f in found] == [site + 4]


def afterburn(entries: list[tuple[int, int]], code: bytes, name: str = ".afterburn") -> bytes:
    elf = ElfWriter(bits=32)
    elf.section(".text", code, address=TEXT, flags="ax")
    elf.section(name, b"".join(struct.pack("<II", *e) for e in entries), address=0xC1200000, flags="a")
    return elf.build()


def test_afterburn_and_its_device_tables(tmp_path: Path) -> None:
    code = b"\xfa" + b"\x90" * 7 + b"\x0f\x20\xd8" + b"\x90" * 12 + b"\x89\x08" + b"\x90" * 6
    entries = [(TEXT, TEXT + 8), (TEXT + 8, TEXT + 23)]
    found = scanned(tmp_path, afterburn(entries, code))
    assert [(s.op, s.length) for s in found.sites] == [("cli", 8), ("mov eax, cr3", 15)]
    found = scanned(tmp_path, afterburn([(TEXT + 23, TEXT + 31)], code, ".afterburn.lapic"))
    (site,) = found.sites
    assert site.table == ".afterburn.lapic"
    assert getattr(site.detail, "device", "") == "lapic"
    (finding,) = scanned(tmp_path, afterburn([*entries, (TEXT + 8, TEXT + 8)], code)).findings
    assert finding.id == "entry-length"


def vmi(rows: list[tuple[int, bytes, bytes, int, int]]) -> bytes:
    """Rows: call, native, translation, growth, call_offset; sites and translations one after the other."""
    text, translations, entries = b"", b"", b""
    for call, native, translation, growth, offset in rows:
        entries += struct.pack(
            "<IIIBBbB",
            *(call, TEXT + len(text), TEXT + 0x8000 + len(translations)),
            *(len(native), len(translation), growth, offset),
        )
        text += native
        translations += translation
    elf = ElfWriter(bits=32)
    elf.section(".text", text, address=TEXT, flags="ax")
    elf.section(".vmi.translation", translations, address=TEXT + 0x8000, flags="ax")
    elf.section(".vmi.annotation", entries, address=0xC1200000, flags="a")
    return elf.build()


# The entry of process.o in the objdump posting of the RFC's discussion: call 35 at 0x2E, FB 66 66 66 90.
STI = (35, b"\xfb\x66\x66\x66\x90", b"\xe8\x23\x00\x00\x00", 4, 0)
FOUR = (16, b"\x89\x0c\xd0\x89\x74\xd0\x04\x66\x66\x90", b"\x56\xe8\x10\x00\x00\x00\x8d\x64\x24\x04", 3, 0)


def versions(found: Scan) -> list[tuple[str, int | None]]:
    return [(s.detail.version, s.detail.call_offset) for s in found.sites if isinstance(s.detail, Vmi)]


def test_the_translations_tell_the_versions_apart(tmp_path: Path) -> None:
    found = scanned(tmp_path, vmi([STI, FOUR]))
    assert versions(found) == [("v1", None), ("v1", None)]
    assert [s.op for s in found.sites] == ["EnableInterrupts", "WriteGDTEntry"]
    found = scanned(tmp_path, vmi([STI, (*FOUR[:4], 1)]))
    assert versions(found) == [("v1b", 0), ("v1b", 1)]
    second = (29, STI[1], b"\xe8\x00\x00\x00\x00", 4, 0)
    third = (11, FOUR[1], b"\x56\xe8\x00\x00\x00\x00\x8d\x64\x24\x04", 3, 1)
    found = scanned(tmp_path, vmi([second, third]))
    assert versions(found) == [("v2", 0), ("v2", 1)]
    assert [s.op for s in found.sites] == ["EnableInterrupts", "WriteGDTEntry"]
    found = scanned(tmp_path, vmi([STI, second]))
    assert [f.id for f in found.findings] == ["vmi-mixed-versions"]


@pytest.mark.parametrize(
    ("row", "identifier"),
    [
        ((35, STI[1], b"\xe8\x24\x00\x00\x00", 4, 0), "vmi-call-number"),
        ((35, STI[1], b"\x54\x90\x90\x90\x90", 4, 0), "vmi-translation"),
        ((35, STI[1], b"\xe8\x23\x00\x00\x00", 4, 2), "vmi-call-offset"),
        ((35, b"\xfb\x90", b"\xe8\x23\x00\x00\x00", 4, 0), "replacement-too-long"),
        ((35, STI[1], b"\xe8\x23\x00\x00\x00", -1, 0), "replacement-too-long"),
    ],
)
def test_bad_vmi_annotations(tmp_path: Path, row: tuple[int, bytes, bytes, int, int], identifier: str) -> None:
    found = scanned(tmp_path, vmi([STI, row, FOUR]))
    assert len(found.sites) == 2
    assert [f.id for f in found.findings] == [identifier]
