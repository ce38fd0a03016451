"""Modules: sections get addresses, relocations are applied as GNU ld applies them, and can be asked for."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
from elfwriter import (
    R_386_32,
    R_386_PC32,
    R_386_PLT32,
    R_X86_64_32S,
    R_X86_64_64,
    R_X86_64_PC32,
    R_X86_64_PLT32,
    ElfWriter,
)

from vmipatch.errors import ImageError
from vmipatch.image import Image, open_image


def module(bits: int) -> ElfWriter:
    ko = ElfWriter(bits=bits, kind="rel")
    ko.section(".text", b"\xe8\xfc\xff\xff\xff\xf0\xff\x05\0\0\0\0" + b"\x90" * 52, flags="ax", align=16)
    ko.section(".init.text", b"\xcc" * 40, flags="ax", align=64)
    ko.section(".smp_locks", bytes(12), flags="a", align=4)
    ko.section(".data", bytes(64), flags="aw", align=32)
    ko.section(".bss", flags="aw", type="nobits", size=0x100, align=32)
    ko.section(".modinfo", b"license=GPL\0vermagic=6.1.0-50-686 SMP mod_unload 686 \0", flags="a")
    ko.symbol("printk").symbol("f", 5, ".text").symbol("init_module", 8, ".init.text")
    ko.symbol("counter", 0x10, ".bss", type="object", bind="local")
    if bits == 32:
        ko.relocation(".text", 1, R_386_PC32, "printk", -4)
        ko.relocation(".text", 8, R_386_32, "counter", 4)
        ko.relocation(".text", 20, R_386_PLT32, "init_module", -4)
        ko.relocation(".text", 60, R_386_PC32, "f", 1)
        ko.relocation(".smp_locks", 0, R_386_PC32, ".text", 5)
        ko.relocation(".smp_locks", 4, R_386_32, ".init.text", 3)
        ko.relocation(".data", 8, R_386_32, "f")
        ko.relocation(".data", 12, R_386_32, "printk", 7)
    else:
        ko.relocation(".text", 1, R_X86_64_PLT32, "printk", -4)
        ko.relocation(".text", 8, R_X86_64_PC32, "counter", -4)
        ko.relocation(".text", 20, R_X86_64_PLT32, "init_module", -4)
        ko.relocation(".text", 60, R_X86_64_PC32, "f", 1)
        ko.relocation(".smp_locks", 0, R_X86_64_PC32, ".text", 5)
        ko.relocation(".smp_locks", 4, R_X86_64_32S, ".init.text", 3)
        ko.relocation(".data", 8, R_X86_64_64, "f")
        ko.relocation(".data", 16, R_X86_64_64, "printk", 7)
    return ko


def opened(tmp_path: Path, data: bytes, name: str = "m.ko") -> Image:
    (tmp_path / name).write_bytes(data)
    return open_image(tmp_path / name)


@pytest.mark.parametrize("bits", [32, 64])
def test_sections_get_addresses_of_their_own(tmp_path: Path, bits: int) -> None:
    data = module(bits).build()
    image = opened(tmp_path, data)
    assert image.container == "module"
    placed = [s for s in image.sections if s.alloc]
    assert [s.name for s in placed] == [".text", ".init.text", ".smp_locks", ".data", ".bss", ".modinfo"]
    for a, b in itertools.pairwise(placed):
        assert a.end <= b.address
    for section in placed:
        assert section.address % section.align == 0
        assert image.section_at(section.address) is section
        if section.name != ".bss":
            assert image.offset_of(section.address) == section.offset
            assert image.address_of(section.offset) == section.address
    assert image.data[:] == data
    assert image.version == (6, 1, 0)
    assert image.banner is None
    with pytest.raises(ImageError, match="where its kernel is"):
        _ = image.page_offset


@pytest.mark.parametrize("bits", [32, 64])
def test_relocated_bytes_are_those_of_gnu_ld(tmp_path: Path, bits: int) -> None:
    """Links the module at the addresses that we give it; ld gives the undefined symbol the value 0."""
    if shutil.which("ld") is None:
        pytest.skip("GNU ld (package binutils) is not on this machine: no oracle for relocations")
    image = opened(tmp_path, module(bits).build())
    placed = [s for s in image.sections if s.alloc]
    script = "".join(f'  "{s.name}" {s.address:#x} : {{ KEEP(*("{s.name}")) }}\n' for s in placed)
    (tmp_path / "script").write_text("SECTIONS {\n" + script + "}\n")
    subprocess.run(
        ["ld", "-m", {32: "elf_i386", 64: "elf_x86_64"}[bits], "-T", "script", "--no-relax", "-e", "0",
         "--unresolved-symbols=ignore-all", "--build-id=none", "-o", "linked", "m.ko"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    linked = open_image(tmp_path / "linked")
    # Fields of the undefined symbol keep what the file has, where ld has 0 and the addend.
    ours_alone = {r.address for r in image.module_relocations() if r.target is None}
    assert len(ours_alone) == 2
    compared = 0
    for section in placed:
        if section.name == ".bss":
            continue
        ours = bytearray(image.read(section.address, section.size))
        theirs = bytearray(linked.read(section.address, section.size))
        for at in ours_alone:
            if at in section:
                width = 8 if bits == 64 and section.name == ".data" else 4
                del ours[at - section.address : at - section.address + width]
                del theirs[at - section.address : at - section.address + width]
        assert ours == theirs, section.name
        compared += len(ours)
    assert compared > 180


@pytest.mark.parametrize("bits", [32, 64])
def test_relocations_can_be_asked_for(tmp_path: Path, bits: int) -> None:
    image = opened(tmp_path, module(bits).build())
    text, locks = image.section(".text"), image.section(".smp_locks")
    assert text is not None
    assert locks is not None
    assert image.undefined == ("printk",)
    call = R_386_PC32 if bits == 32 else R_X86_64_PLT32
    assert image.relocation_at(text.address + 1) == ("printk", -4, call)
    assert image.relocation_at(locks.address) == (".text", 5, R_386_PC32)
    assert image.relocation_at(text.address + 2) is None
    assert [r.symbol for r in image.module_relocations()] == [
        "printk", "counter", "init_module", "f", ".text", ".init.text", "f", "printk"
    ]  # fmt: skip
    # The self-relative lock entry names its site, five bytes into .text.
    field = int.from_bytes(image.read(locks.address, 4), "little", signed=True)
    assert locks.address + field == text.address + 5
    assert image.symbols.at(text.address + 7) == ("f", 2)
    assert image.symbols.sources == ("symtab",)
    assert image.symbols.lookup("printk") is None


def test_compressed_modules(tmp_path: Path) -> None:
    import gzip
    import lzma

    import zstandard

    plain = module(32).build()
    for name, data in {
        "m.ko.xz": lzma.compress(plain, check=lzma.CHECK_CRC32),
        "m.ko.gz": gzip.compress(plain),
        "m.ko.zst": zstandard.ZstdCompressor().compress(plain),
    }.items():
        image = opened(tmp_path, data, name)
        assert image.container == "module"
        assert image.data[:] == plain
        assert image.compression == {"xz": "xz", "gz": "gzip", "zst": "zstd"}[name[5:]]


@pytest.mark.parametrize(
    ("offset", "kind", "words"),
    [(1, 9, "type 9"), (61, R_386_32, r"\.text \+ 0x3d"), (0xFFFFFFF0, R_386_32, "relocation")],
)
def test_relocations_that_cannot_be(tmp_path: Path, offset: int, kind: int, words: str) -> None:
    ko = module(32).relocation(".text", offset, kind, "f")
    with pytest.raises(ImageError, match=words) as caught:
        opened(tmp_path, ko.build())
    assert caught.value.section == ".rel.text"
    assert caught.value.offset is not None


def test_modules_that_cannot_be_placed(tmp_path: Path) -> None:
    for section in (
        ElfWriter(kind="rel").section(".bss", flags="aw", type="nobits", size=0x7FFFFFFF),
        ElfWriter(kind="rel").section(".text", b"\x90", flags="ax", align=3),
    ):
        with pytest.raises(ImageError):
            opened(tmp_path, section.build())


def test_damaged_symbol_tables(tmp_path: Path) -> None:
    ko = module(32)
    ko.section(".broken", bytes(17), type="symtab", link=".text")
    with pytest.raises(ImageError, match="symbol table of 17 bytes"):
        opened(tmp_path, ko.build())
    ko = ElfWriter(kind="rel").section(".symtab", bytes(16), type="symtab", link=60)
    with pytest.raises(ImageError, match="no names"):
        opened(tmp_path, ko.build())
