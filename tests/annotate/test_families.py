"""Families beyond the boot patcher's three: made tables, with and without a section of their own."""

from __future__ import annotations

import random
import struct
from importlib import import_module
from pathlib import Path

import pytest

from tests.elfwriter import ElfWriter
from vmipatch.annotate import FAMILIES, Site, scan
from vmipatch.annotate.family import Family, Sealing, Written
from vmipatch.annotate.site import JumpLabel, Mcount, StaticCall, Thunk
from vmipatch.annotate.tables import load_format
from vmipatch.image import Image, open_image

TEXT = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
COUNT = 80
NOP5 = {32: bytes.fromhex("3E8D742600"), 64: bytes.fromhex("0F1F440000")}


class Kernel:
    """A text of small functions, and tables that name them."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.text = bytearray(b"\xcc" * 0x3000)
        self.start = TEXT[bits]
        self.tables = self.start + 0x100000
        self.elf = ElfWriter(bits=bits, entry=self.start)

    def put(self, offset: int, code: bytes) -> int:
        self.text[offset : offset + len(code)] = code
        return self.start + offset

    def branch(self, opcode: bytes, offset: int, target: int) -> int:
        distance = target - (self.start + offset + len(opcode) + 4)
        return self.put(offset, opcode + struct.pack("<i", distance))

    def relative(self, name: str, addresses: list[int], at: int) -> None:
        where = self.tables + at
        data = b"".join(struct.pack("<i", a - where - 4 * i) for i, a in enumerate(addresses))
        self.elf.section(name, data, address=where, flags="a", align=4)

    def open(self, folder: Path) -> Image:
        self.elf.section(".text", bytes(self.text), address=self.start, flags="ax", align=4096)
        path = folder / "vmlinux"
        path.write_bytes(self.elf.build())
        return open_image(path)


def sites(image: Image, family: str) -> tuple[Site, ...]:
    found = scan(image, [family])
    assert found.findings == ()
    return found.sites


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("section", ["__mcount_loc", ".init.data"])
def test_mcount(bits: int, section: str, tmp_path: Path) -> None:
    kernel = Kernel(bits)
    fentry = kernel.put(0, b"\xc3")
    places = [kernel.branch(b"\xe8", 0x100 + 32 * n, fentry) for n in range(COUNT)]
    for n in range(0, COUNT, 7):
        kernel.put(0x100 + 32 * n, NOP5[bits])
    table = b"".join(p.to_bytes(bits // 8, "little") for p in places)
    # Hidden in other data, it is the run of entries that tells where it begins and ends.
    around = b"" if section == "__mcount_loc" else random.Random(2).randbytes(4096)
    kernel.elf.section(section, around + table + around, address=kernel.tables, flags="aw", align=4096)
    image = kernel.open(tmp_path)
    found = sites(image, "mcount")
    assert [s.address for s in found] == places
    assert [s.entry for s in found] == [kernel.tables + len(around) + n * bits // 8 for n in range(COUNT)]
    assert {s.detail for s in found} == {Mcount(fentry), Mcount(0)}
    (table_info,) = scan(image).tables
    assert (table_info.count, bool(table_info.found)) == (COUNT, section != "__mcount_loc")
    assert scan(image).sites == ()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("section", ["__jump_table", ".rodata"])
def test_jump_labels(bits: int, section: str, tmp_path: Path) -> None:
    kernel = Kernel(bits)
    around = b"" if section == "__jump_table" else random.Random(3).randbytes(8192)
    size, key_code = (12, "<iii") if bits == 32 else (16, "<iiq")
    data_at = kernel.tables + 0x20000
    table, expected = b"", []
    for n in range(COUNT):
        offset = 0x100 + 64 * n
        target = kernel.start + offset + 40
        short, taken, likely = n % 3 == 0, n % 2 == 1, n % 5 == 0
        if short:
            kernel.put(offset, bytes((0xEB, 38)) if taken else b"\x66\x90")
        elif taken:
            kernel.branch(b"\xe9", offset, target)
        else:
            kernel.put(offset, NOP5[bits])
        where = kernel.tables + len(around) + size * n
        key = data_at + 16 * n
        site = kernel.start + offset
        # Bit 1 is the mark of code that is freed (or objtool's): no part of the key.
        word = key - where - 8 + likely + 2 * (n % 4 == 0)
        table += struct.pack(key_code, site - where, target - where - 4, word)
        expected.append((site, 2 if short else 5, JumpLabel(target, key, likely)))
    kernel.elf.section(section, around + table + around, address=kernel.tables, flags="aw", align=4096)
    kernel.elf.section(".data", bytes(4096), address=data_at, flags="aw", align=4096)
    found = sites(kernel.open(tmp_path), "jump_labels")
    assert [(s.address, s.length, s.detail) for s in found] == expected


def test_static_calls(tmp_path: Path) -> None:
    kernel = Kernel(64)
    function = kernel.put(0, b"\xc3")
    data_at = kernel.tables + 0x20000
    tramps = []
    for n in range(4):
        tramps.append(kernel.branch(b"\xe9", 0x40 + 8 * n, function))
        kernel.put(0x45 + 8 * n, bytes.fromhex("0FB9CC"))
    kernel.put(0x60, bytes.fromhex("C3CCCCCCCC0FB9CC"))
    # The mark alone, and behind a jump out of the text: no trampolines.
    kernel.put(0x85, bytes.fromhex("0FB9CC"))
    kernel.branch(b"\xe9", 0xA0, kernel.start + 0x900000)
    kernel.put(0xA5, bytes.fromhex("0FB9CC"))
    table, expected = b"", []
    for n in range(COUNT):
        tail = n % 2
        site = kernel.branch(b"\xe9" if tail else b"\xe8", 0x100 + 16 * n, tramps[n % 4])
        where, key = kernel.tables + 8 * n, data_at + 16 * (n % 4)
        table += struct.pack("<ii", site - where, key - where - 4 + tail)
        expected.append((site, StaticCall(key, tramps[n % 4], bool(tail))))
    kernel.elf.section(".rodata", table, address=kernel.tables, flags="aw", align=4096)
    kernel.elf.section(".data", bytes(4096), address=data_at, flags="aw", align=4096)
    kernel.elf.symbol("__SCT__alpha", tramps[0], ".text")
    found = sites(kernel.open(tmp_path), "static_calls")
    assert [s.address for s in found[:5]] == [*tramps, kernel.start + 0x60]
    assert [(s.address, s.detail) for s in found[5:]] == expected
    assert {s.op for s in found if s.detail.trampoline == tramps[0]} == {"alpha"}  # type: ignore[union-attr]
    assert found[0].detail == StaticCall(data_at, tramps[0], True)


def test_returns_and_retpolines(tmp_path: Path) -> None:
    kernel = Kernel(64)
    thunk = kernel.put(0x800, b"\xc3")
    array = kernel.start + 0x1000
    kernel.elf.symbol("__x86_indirect_thunk_array", array, ".text")
    returns = [kernel.branch(b"\xe9", 0x20 * n, thunk) for n in range(10)]
    kernel.relative(".return_sites", returns, 0)
    branches = [
        (kernel.branch(b"\xe8", 0x400, array), 5, "call rax", 0),
        (kernel.branch(b"\xe9", 0x420, array + 11 * 32), 5, "jmp r11", 11),
        (kernel.branch(b"\x2e\xe8", 0x440, array + 8 * 32), 6, "call r8", 8),
        (kernel.branch(b"\x0f\x84", 0x460, array + 2 * 32), 6, "jcc rdx", 2),
    ]
    kernel.relative(".retpoline_sites", [b[0] for b in branches], 0x1000)
    image = kernel.open(tmp_path)
    assert [(s.address, s.detail) for s in sites(image, "return_sites")] == [(a, Thunk(thunk, None)) for a in returns]
    found = [(s.address, s.length, s.op, s.detail.register) for s in sites(image, "retpoline_sites")]  # type: ignore[union-attr]
    assert found == branches


def test_returns_of_clang_have_a_prefix(tmp_path: Path) -> None:
    kernel = Kernel(64)
    thunk = kernel.put(0x800, b"\xc3")
    returns = [kernel.branch(b"\x2e\xe9" if n % 2 else b"\xe9", 0x20 * n, thunk) for n in range(10)]
    kernel.relative(".return_sites", returns, 0)
    found = [(s.address, s.length, s.detail) for s in sites(kernel.open(tmp_path), "return_sites")]
    assert found == [(a, 5 + n % 2, Thunk(thunk, None)) for n, a in enumerate(returns)]


def test_endbr_calls_and_wrong_entries(tmp_path: Path) -> None:
    kernel = Kernel(64)
    endbr = [kernel.put(0x20 * n, bytes.fromhex("F30F1EFA")) for n in range(8)]
    kernel.relative(".ibt_endbr_seal", [*endbr, kernel.start + 0x1001], 0)
    calls = [kernel.branch(b"\xe8", 0x400 + 0x20 * n, kernel.start) for n in range(8)]
    kernel.relative(".call_sites", [*calls, kernel.start + 0x900000], 0x1000)
    image = kernel.open(tmp_path)
    sealed, called = scan(image, ["endbr_seal"]), scan(image, ["call_sites"])
    assert [s.address for s in sealed.sites] == endbr
    assert [s.address for s in called.sites] == calls
    assert [(f.id, f.address) for f in sealed.findings] == [("endbr-none", kernel.tables + 32)]
    assert [(f.id, f.address) for f in called.findings] == [("entry-outside-image", kernel.tables + 0x1000 + 32)]


@pytest.mark.parametrize("poison", ["660F1F00", "0F1F40D6"])  # gen_endbr_poison of 6.12 and of 7.3
def test_endbr_that_was_sealed_in_the_file(tmp_path: Path, poison: str) -> None:
    kernel = Kernel(64)
    code = [kernel.put(0x20 * n, bytes.fromhex(poison if n else "F30F1EFA")) for n in range(8)]
    wrong = kernel.put(0x200, bytes.fromhex("0F1F4000"))
    kernel.relative(".ibt_endbr_seal", [*code, wrong], 0)
    found = scan(kernel.open(tmp_path), ["endbr_seal"])
    assert [(s.address, s.length, s.op) for s in found.sites] == [
        (at, 4, "sealed" if n else "endbr") for n, at in enumerate(code)
    ]
    assert [(f.id, f.address) for f in found.findings] == [("endbr-none", kernel.tables + 32)]


RET = "C3CCCCCCCC"


@pytest.mark.parametrize(
    ("section", "family", "codes"),
    [
        (".return_sites", "return_sites", [RET]),
        (".retpoline_sites", "retpoline_sites", ["FFD00F1F00", "FFE0CC6690", "41FFD50F1F"]),
        (".retpoline_sites", "retpoline_sites", ["2E2E2EFFD0", "FFE0CCCCCC", "0FAEE8FFD2", "7504FFE1CCCC"]),
    ],
)
def test_branches_that_were_sealed_in_the_file(tmp_path: Path, section: str, family: str, codes: list[str]) -> None:
    # apply_returns, and emit_indirect of 6.12 and of 6.18, write these; one site in nine was overwritten later.
    kernel = Kernel(64)
    places = [kernel.put(0x20 * n, bytes.fromhex(codes[n % len(codes)])) for n in range(8)]
    kernel.relative(section, [*places, kernel.put(0x200, b"\xcc" * 5)], 0)
    found = scan(kernel.open(tmp_path), [family])
    assert [(t.sealed, t.count) for t in found.tables] == [(True, 9)]
    assert (found.sites, found.findings) == ((), ())


@pytest.mark.parametrize("code", ["C3CCCCCC90", "FF10CCCCCC", "FF24C500000000"])
@pytest.mark.parametrize("section", [".return_sites", ".retpoline_sites"])
def test_what_is_no_final_form_is_not_sealed(tmp_path: Path, section: str, code: str) -> None:
    kernel = Kernel(64)
    kernel.relative(section, [kernel.put(0x20 * n, bytes.fromhex(code)) for n in range(8)], 0)
    found = scan(kernel.open(tmp_path), [section[1:]])
    assert [t.sealed for t in found.tables] == [False]
    assert "table-layout" in {f.id for f in found.findings}


@pytest.mark.parametrize("emptied", [True, False])
def test_calls_where_alternatives_were_sealed(tmp_path: Path, emptied: bool) -> None:
    kernel = Kernel(64)
    calls = [kernel.branch(b"\xe8", 0x400 + 0x20 * n, kernel.start) for n in range(8)]
    popcnt = kernel.put(0x600, bytes.fromhex("F30FB8C790"))
    kernel.relative(".call_sites", [*calls, popcnt, kernel.start + 0x900000], 0x1000)
    where = kernel.tables + 0x2000
    row = struct.pack("<iiIBB", popcnt - where, popcnt - where - 4, 4 * 32 + 23, *((0, 0) if emptied else (5, 5)))
    kernel.elf.section(".altinstructions", row, address=where, flags="a")
    found = scan(kernel.open(tmp_path), ["call_sites"])
    assert [s.address for s in found.sites] == calls
    outside = ("entry-outside-image", kernel.tables + 0x1000 + 36)
    told = [] if emptied else [("call-no-branch", kernel.tables + 0x1000 + 32)]
    assert [(f.id, f.address) for f in found.findings] == [*told, outside]


def test_counted_tables(tmp_path: Path) -> None:
    kernel = Kernel(64)
    code = [kernel.start + 16 * n for n in range(100)]
    kernel.relative(".orc_unwind_ip", code, 0)
    at = kernel.tables + 0x1000
    extable = b"".join(
        struct.pack("<iii", a - at - 12 * i, a + 8 - at - 12 * i - 4, 1) for i, a in enumerate(code[:30])
    )
    kernel.elf.section("__ex_table", extable, address=at, flags="a", align=4)
    at = kernel.tables + 0x2000
    bugs = b"".join(struct.pack("<iiHH", a - at - 12 * i, at - at - 12 * i - 4, 7, 1) for i, a in enumerate(code[:20]))
    kernel.elf.section("__bug_table", bugs + b"\0", address=at, flags="a", align=4)
    found = scan(kernel.open(tmp_path))
    counts = {t.family: t.count for t in found.tables}
    assert (counts["orc"], counts["ex_table"]) == (100, 30)
    assert found.sites == ()
    # 241 bytes are no whole number of entries of any layout.
    assert [(f.id, f.section) for f in found.findings] == [("table-size", "__bug_table")]


BUG_LAYOUTS = {
    "rel16": (64, "iiiHH", 3),
    "rel12": (64, "iiHH", 2),
    "rel12-format": (64, "iiHxx", 2),
    "rel8": (64, "iHxx", 1),
    "abs32-verbose": (32, "IIHH", 0),
    "abs32": (32, "IHxx", 0),
    "abs64-verbose": (64, "QQHHxxxx", 0),
    "abs64": (64, "QHxxxxxx", 0),
}
TRAPS = ("0F0B", "0FB9CC", "67480FB93A", "D6")


def bug_table(kernel: Kernel, layout: str, count: int) -> None:
    """``count`` entries; every fifth of those with a format is the argument of a call and names no trap."""
    _, form, relative = BUG_LAYOUTS[layout]
    at, size = kernel.tables, struct.calcsize("<" + form)
    strings = kernel.tables + 0x10000
    kernel.elf.section(".rodata", b"kernel/sched/core.c\0\0%s: bad\n\0", address=strings, flags="a")
    rows = b""
    for n in range(count):
        argument = layout in ("rel16", "rel12-format") and n % 5 == 4
        code = b"\x90" if argument else bytes.fromhex(TRAPS[n % len(TRAPS)])
        pointers = [kernel.put(0x20 * n, code)]
        if layout in ("rel16", "rel12-format"):
            pointers.append(strings + 20 + n % 2)
        if layout in ("rel16", "rel12", "abs32-verbose", "abs64-verbose"):
            pointers.append(strings)
        here = at + n * size
        fields = [p - here - 4 * i if relative else p for i, p in enumerate(pointers)]
        numbers = [100 + n] if form.count("H") == 2 else []
        rows += struct.pack("<" + form, *fields, *numbers, 0x11 if argument else 1)
    kernel.elf.section("__bug_table", rows, address=at, flags="aw", align=8)


@pytest.mark.parametrize("layout", BUG_LAYOUTS)
# 48 entries of any layout are a whole number of entries of every other one.
@pytest.mark.parametrize("count", [2, 31, 48])
def test_the_size_of_a_bug_entry_is_seen_in_its_bytes(layout: str, count: int, tmp_path: Path) -> None:
    kernel = Kernel(BUG_LAYOUTS[layout][0])
    bug_table(kernel, layout, count)
    found = scan(kernel.open(tmp_path), ["bug_table"])
    assert [(t.layout, t.count) for t in found.tables] == [(layout, count)]
    assert found.findings == ()


def test_a_bug_table_of_other_code_fits_no_layout(tmp_path: Path) -> None:
    kernel = Kernel(64)
    bug_table(kernel, "rel12", 48)
    kernel.text[:] = b"\x90" * len(kernel.text)
    found = scan(kernel.open(tmp_path), ["bug_table"])
    assert [(f.id, f.severity) for f in found.findings] == [("table-layout", "warning")]
    assert [t.layout for t in found.tables] == [None]


def test_data_that_is_executable_by_its_header_is_no_code(tmp_path: Path) -> None:
    kernel = Kernel(64)
    kernel.put(0, b"\xf0\x0f\xb1\x0b")
    data_at, locks = kernel.tables, kernel.tables + 0x1000
    kernel.elf.section(".data", b"\xf0\x0f\xb1\x0b" * 8, address=data_at, flags="awx", align=4096)
    sites = [kernel.start, data_at + 4]
    rows = b"".join(struct.pack("<i", a - locks - 4 * i) for i, a in enumerate(sites))
    kernel.elf.section(".smp_locks", rows, address=locks, flags="a", align=4)
    image = kernel.open(tmp_path)
    # The writer's segment of .data has the flag, as an old kernel's may: it is believed.
    assert [s.name for s in image.code_sections] == [".data", ".text"]
    data = bytearray(image.data)
    for n in range(3):
        flags = 64 + 56 * n + 4
        if struct.unpack_from("<Q", data, flags + 12)[0] == data_at:
            data[flags] &= ~1
    (tmp_path / "vmlinux").write_bytes(data)
    image = open_image(tmp_path / "vmlinux")
    assert [s.name for s in image.code_sections] == [".text"]
    section = image.section(".data")
    assert section is not None
    assert not section.exec
    # A site in it is one all the same.
    found = scan(image, ["smp_locks"])
    assert [s.address for s in found.sites] == sites
    assert found.findings == ()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_a_row_says_all_of_a_family(family: Family) -> None:
    """Each family has its tables, its reader and one who writes it; what the boot writes has a pass."""
    assert load_format(family.name).layouts
    assert family.help.endswith(".")
    if family.module:
        module = import_module(f"vmipatch.annotate.{family.module}")
        assert family.name == module.FAMILY
        assert callable(module.scan)
        assert family.listed or callable(module.count)
    assert (family.written is Written.NEVER) == (not family.module)
    assert family.written is Written.AT_BOOT or family.sealing is Sealing.NONE


@pytest.mark.parametrize("seed", range(8))
def test_noise_gives_no_table(seed: int, tmp_path: Path) -> None:
    chosen = random.Random(seed)
    kernel = Kernel(32 if seed % 2 else 64)
    kernel.text[:] = chosen.randbytes(len(kernel.text))
    for i, name in enumerate((".rodata", ".data", ".init.data")):
        kernel.elf.section(name, chosen.randbytes(20000), address=kernel.tables + 0x8000 * i, flags="aw", align=4096)
    kernel.relative(".return_sites", [kernel.start + 0x400000 + chosen.randrange(1 << 20) for _ in range(50)], 0x40000)
    image = kernel.open(tmp_path)
    for family in FAMILIES:
        assert scan(image, [family]).sites == ()
