"""Real images against GNU binutils, against themselves, and against the kernel's own kallsyms tool.

Containers and sections against readelf; relocated modules against GNU ld; the functions of kallsyms against the
exports, two tables that name the same addresses by different means; KASLR's relocations against the fields that
they name; and kallsyms tables made by the scripts/kallsyms of Debian's linux-kbuild package.
"""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmipatch.image import Image, open_image

from .conftest import RealKernel
from .packages import RegistryAway, fetch

Get = Callable[[str], RealKernel]

I386 = ("686", "686-pae", "5.10-686", "5.10-686-pae")
ALL = (*I386, "amd64", "5.10-amd64", "6.12-amd64")
SECTION = re.compile(
    r"^\s*\[\s*\d+\] (\S+)\s+([A-Z_0-9]+)\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) [0-9a-f]+ +([A-Za-z]*) +\d", re.M
)
LOAD = re.compile(r"^  LOAD +" + r"0x([0-9a-f]+) " * 5 + "([RWE ]+) 0x", re.M)


@pytest.mark.parametrize("name", ALL)
def test_a_bzimage_is_the_elf_that_readelf_reads(real_kernel: Get, name: str) -> None:
    kernel = real_kernel(name)
    image = open_image(kernel.image)
    unpacked = kernel.elf.read_bytes()
    assert image.data[: image.elf_size] == unpacked[: image.elf_size]
    output = subprocess.run(["readelf", "-SWl", kernel.elf], capture_output=True, text=True, check=True).stdout
    rows = SECTION.findall(output)
    assert len(rows) == len(image.sections) > 25
    for (title, kind, address, offset, size, flags), section in zip(rows, image.sections, strict=True):
        theirs = (title, int(address, 16), int(offset, 16), int(size, 16))
        assert (section.name, section.address, section.offset, section.size) == theirs
        assert (section.alloc, section.write, section.exec) == ("A" in flags, "W" in flags, "X" in flags)
        assert (section.type == 8) == (kind == "NOBITS")
    loads = LOAD.findall(output)
    assert len(loads) == len(image.segments)
    for (*numbers, flags), segment in zip(loads, image.segments, strict=True):
        offset, address, physical, file_size, memory_size = (int(n, 16) for n in numbers)
        assert (segment.offset, segment.address, segment.physical) == (offset, address, physical)
        assert (segment.file_size, segment.memory_size) == (file_size, memory_size)
        assert segment.exec == ("E" in flags)
    assert image.page_offset == (0xC0000000 if image.bits == 32 else 0xFFFF888000000000)
    assert image.version is not None
    assert image.version[:2] == kernel.vmlinux.release
    assert str(image.banner).startswith("Linux version ")


@pytest.mark.parametrize("name", ALL)
def test_kallsyms_and_exports_agree_on_every_exported_function(real_kernel: Get, name: str) -> None:
    symbols = open_image(real_kernel(name).image)
    assert symbols.symbols.sources == ("kallsyms", "exports")
    # Told apart by asking two images that lack one of the two tables each.
    exported = _without(symbols, "kallsyms")
    listed: dict[str, set[int]] = {}
    for address, _, function in _without(symbols, "exports").symbols.all():
        listed.setdefault(function, set()).add(address)
    functions = 0
    for address, kind, function in exported.symbols.all():
        if kind == "T":
            assert address in listed[function], function
            functions += 1
    assert functions > 8000
    if symbols.bits == 32:
        # Data, of which an i386 distribution kernel's kallsyms has nothing.
        assert "pv_ops" not in listed
    assert symbols.symbols.lookup("pv_ops") == exported.symbols.lookup("pv_ops")
    assert symbols.symbols.lookup("boot_cpu_data") is not None


def _without(image: Image, origin: str) -> Image:
    """The image again, its tables of one origin overwritten."""
    data = bytearray(image.data[:])
    if origin == "kallsyms":
        for match in re.finditer(rb"0\x001\x002\x003\x004\x005\x00", data):
            data[match.start()] = 1
    else:
        for section in image.sections:
            if section.name in ("__ksymtab", "__ksymtab_gpl"):
                data[section.offset : section.offset + section.size] = b"\x7f" * section.size
    return Image(
        path=image.path, container=image.container, bits=image.bits, data=bytes(data), file=b"",
        sections=image.sections, segments=image.segments, elf_size=image.elf_size,
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_kaslr_relocations_name_fields_that_hold_addresses_of_the_kernel(real_kernel: Get, name: str) -> None:
    image = open_image(real_kernel(name).image)
    table = image.relocations
    assert table is not None
    assert len(table) > 200_000
    low = min(s.address for s in image.segments if s.address)
    high = max(s.end for s in image.segments if s.address)
    dice = random.Random(7)
    mask = (1 << image.bits) - 1
    for fields, width in ((table.absolute32, 4), (table.absolute64, 8)):
        values = []
        for address in dice.sample(fields, min(3000, len(fields))):
            values.append(int.from_bytes(image.read(address, width), "little", signed=True) & mask)
        # A pointer may be to an element before an array, early code uses physical addresses, and the
        # places of functions that the linker dropped are 0.
        inside = [v for v in values if low - 0x1000000 <= v <= high + 0x1000000]
        early = [v for v in values if low <= v + image.text_map <= high]
        assert len(inside) + len(early) >= 0.99 * len(values), width
        assert len(early) <= 0.01 * len(values), width
    assert (image.bits == 64) == bool(table.absolute64) == bool(table.inverse32)
    for address in table.inverse32:
        image.read(address, 4)


@pytest.mark.parametrize("name", ["686", "5.10-686", "amd64", "6.12-amd64"])
def test_relocated_modules_are_those_of_gnu_ld(real_kernel: Get, name: str, tmp_path: Path) -> None:
    kernel = real_kernel(name)
    if shutil.which("ld") is None:
        pytest.skip("ld is not installed")
    modules = sorted(p for p in kernel.image.parent.parent.rglob("*.ko*") if p.stat().st_size < 300_000)
    assert len(modules) > 50
    compared = 0
    for path in random.Random(3).sample(modules, 15):
        image = open_image(path)
        assert image.container == "module"
        assert image.version is not None
        assert image.version[:2] == kernel.vmlinux.release
        linked = open_image(_linked(image, tmp_path))
        open_fields = {r.address + i for r in image.module_relocations() if r.target is None for i in range(8)}
        for section in image.sections:
            # ld makes its own build ID.
            if section.alloc and section.file_size and section.name != ".note.gnu.build-id":
                theirs = linked.read(section.address, section.size)
                ours = image.read(section.address, section.size)
                different = {section.address + i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b}
                assert different <= open_fields, (path.name, section.name)
                compared += section.size
    assert compared > 50_000


def _linked(image: Image, folder: Path) -> Path:
    """GNU ld's image of a module with every section at the address that ours has."""
    placed = [s for s in image.sections if s.alloc]
    lines = [f'  "{s.name}" {s.address:#x} : {{ KEEP(*("{s.name}")) }}' for s in placed]
    (folder / "script").write_text("SECTIONS {\n" + "\n".join(lines) + "\n /DISCARD/ : { *(*) }\n}\n")
    data = bytearray(image.data[:])
    # Without SHF_MERGE and SHF_STRINGS, or ld would drop and reorder strings.
    word, shoff, shnum, header = ("<I", 32, 48, 40) if image.bits == 32 else ("<Q", 40, 60, 64)
    table, count = struct.unpack_from(word, data, shoff)[0], struct.unpack_from("<H", data, shnum)[0]
    for at in range(table + 8, table + count * header, header):
        struct.pack_into(word, data, at, struct.unpack_from(word, data, at)[0] & ~0x30)
    (folder / "in.o").write_bytes(data)
    emulation = "elf_i386" if image.bits == 32 else "elf_x86_64"
    subprocess.run(
        ["ld", "-m", emulation, "-T", "script", "--no-relax", "--unresolved-symbols=ignore-all", "--build-id=none",
         "-z", "norelro", "-o", "linked", "in.o"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "linked"


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (32, []),
        (32, ["--base-relative"]),
        (64, []),
        (64, ["--base-relative"]),
        (64, ["--base-relative", "--absolute-percpu"]),
    ],
)
def test_tables_of_the_kernels_own_tool_read_back(bits: int, options: list[str], tmp_path: Path) -> None:
    for tool in ("gcc", "ld", "strip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    try:
        kallsyms = next(fetch(r"linux-kbuild-6\.1", "amd64").rglob("scripts/kallsyms"))
    except RegistryAway as away:
        pytest.skip(f"linux-kbuild-6.1: {away}")
    text = 0xC1000000 if bits == 32 else 0xFFFFFFFF81000000
    rows = _made_up(text, percpu="--absolute-percpu" in options)
    (tmp_path / "map").write_text("".join(f"{a:x} {k} {n}\n" for a, k, n in rows))
    command = [str(kallsyms), "--all-symbols", *options, str(tmp_path / "map")]
    source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The tool's output wants one kernel header, for the size of a long.
    source = source.replace("#include <asm/bitsperlong.h>", f"#define BITS_PER_LONG {bits}")
    (tmp_path / "k.S").write_text(f".globl _text\n.set _text, {text:#x}\n{source}")
    emulation = "elf_i386" if bits == 32 else "elf_x86_64"
    for words in (
        ["gcc", f"-m{bits}", "-c", "-o", "k.o", "k.S"],
        ["ld", "-m", emulation, f"-Trodata-segment={text + 0x1000000:#x}", "-e", "0", "-o", "k", "k.o"],
        ["strip", "-s", "k"],
    ):
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    image = open_image(tmp_path / "k")
    assert image.symbols.sources == ("kallsyms",)
    assert {(a, n) for a, _, n in image.symbols.all()} == {(a, n) for a, _, n in rows}
    letters = {(a, n): k for a, k, n in rows}
    assert all(k == letters[a, n] for a, k, n in image.symbols.all() if a >= text)


def _made_up(text: int, *, percpu: bool) -> list[tuple[int, str, str]]:
    dice = random.Random(11)
    words = ["kernel", "do", "sys", "init", "page", "alloc", "irq", "x86", "native", "pv", "ops", "lock", "tcp", "read"]
    rows = [(text, "T", "_text"), (text, "T", "_stext")]
    if percpu:
        rows = [(64 * i, "D", f"percpu_{i}") for i in range(1, 40)] + rows
        rows = [(0, "D", "__per_cpu_start"), *rows, (0x35000, "D", "__per_cpu_end")]
    address = text
    for i in range(3000):
        name = "_".join(dice.choice(words) for _ in range(dice.randint(1, 6))) + f"_{i}"
        if i % 97 == 0:
            name += "".join(dice.choice("abcdefXYZ0123456789_$.") for _ in range(300))
        rows.append((address, dice.choice("tTdDwW"), name))
        address += dice.choice((0, 16, 32, 4096))
    return [*rows, (address + 16, "T", "_etext")]
