"""Names of addresses from symbol table, System.map, kallsyms and exports together."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from elfwriter import ElfWriter
from kallsyms_writer import build, symbols
from test_image_exports import exported, kernel

from vmipatch.errors import ImageError
from vmipatch.image import Image, open_image

TOP = 0xC1000000


def opened(tmp_path: Path, data: bytes, system_map: Path | None = None) -> Image:
    (tmp_path / "vmlinux").write_bytes(data)
    return open_image(tmp_path / "vmlinux", system_map=system_map)


def with_symtab(bits: int = 32) -> ElfWriter:
    top = TOP if bits == 32 else 0xFFFFFFFF81000000
    elf = ElfWriter(bits=bits)
    elf.section(".text", bytes(0x1000), address=top, flags="ax")
    elf.section(".init.text", bytes(0x100), address=top + 0x2000, flags="ax")
    elf.section(".data", bytes(0x1000), address=top + 0x10000, flags="aw")
    elf.section(".rodata", bytes(0x1000), address=top + 0x20000, flags="a")
    elf.section(".bss", address=top + 0x30000, flags="aw", type="nobits", size=0x1000)
    elf.symbol("_text", top, ".text", type="notype")
    elf.symbol("bare_label", top + 0x10, ".text", type="notype")
    elf.symbol("local_alias", top + 0x10, ".text", bind="local")
    elf.symbol("weak_alias", top + 0x10, ".text", bind="weak")
    elf.symbol("native_cli", top + 0x10, ".text", size=2)
    elf.symbol("twice", top + 0x20, ".text", bind="local")
    elf.symbol("twice", top + 0x40, ".text", bind="local")
    elf.symbol("pv_irq_ops", top + 0x10020, ".data", type="object")
    elf.symbol("table", top + 0x20000, ".rodata", type="object", bind="local")
    elf.symbol("zero", top + 0x30000, ".bss", type="object")
    elf.symbol("missing")
    elf.symbol("number", 0x1234, "*ABS*", type="notype")
    elf.symbol("start.c", 0, "*ABS*", type="file", bind="local")
    return elf


@pytest.mark.parametrize("bits", [32, 64])
def test_the_symbol_table_is_that_of_nm(tmp_path: Path, bits: int) -> None:
    if shutil.which("nm") is None:
        pytest.skip("GNU nm (package binutils) is not on this machine: no oracle for symbol tables")
    image = opened(tmp_path, with_symtab(bits).build())
    output = subprocess.run(["nm", "-n", tmp_path / "vmlinux"], capture_output=True, text=True, check=True).stdout
    theirs = {(int(a, 16), k, n) for a, k, n in (line.split() for line in output.splitlines() if line[0] != " ")}
    assert set(image.symbols.all()) == theirs
    assert image.symbols.sources == ("symtab",)


def test_which_of_several_symbols_answers(tmp_path: Path) -> None:
    find = opened(tmp_path, with_symtab().build()).symbols
    assert find.at(TOP + 0x11) == ("native_cli", 1)
    assert find.at(TOP + 0x0F) == ("_text", 0x0F)
    assert find.at(TOP + 0x10024) == ("pv_irq_ops", 4)
    assert find.lookup("twice") == TOP + 0x20
    assert find.lookup("number") == 0x1234
    assert find.lookup("missing") is None
    # Not the last symbol of another section, and nothing below the first.
    assert find.at(TOP + 0x2004) is None
    assert find.at(TOP + 0x10000) is None
    assert find.at(0x1000) is None


def stripped() -> bytes:
    """Functions in kallsyms, some of them and all data in the exports, as in a distribution's i386 kernel."""
    functions = {"fill5": TOP + 0x700050, "exported_alias": TOP + 0x700060}
    rows = [(a, k, n) for a, k, n in symbols(600, TOP + 0x400000) if k in "tT"] + [
        (TOP + 0x700000 + 16 * i, "T", f"fill{i}") for i in range(400)
    ]
    tables = build(rows, bits=32, addresses="relative", era="6.2")
    base = open_image_sections(kernel(32, True, 3, {"__ksymtab": exported(32), "__ksymtab_gpl": functions}))
    base.section(".rodata", tables, address=TOP + 0x200000, flags="a", align=8)
    base.section(".init.text", bytes(0x400000), address=TOP + 0x400000, flags="ax")
    return base.build()


def open_image_sections(data: bytes) -> ElfWriter:
    """The sections of an ELF file, to add others to."""
    import io

    from elftools.elf.elffile import ELFFile

    elf = ElfWriter()
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if section["sh_flags"] & 2:
            flags = "a" + "w" * bool(section["sh_flags"] & 1) + "x" * bool(section["sh_flags"] & 4)
            elf.section(section.name, section.data(), address=section["sh_addr"], flags=flags)
    return elf


def test_kallsyms_and_exports_complete_each_other(tmp_path: Path) -> None:
    image = opened(tmp_path, stripped())
    find = image.symbols
    assert find.sources == ("kallsyms", "exports")
    assert find.lookup("pv_ops") == exported(32)["pv_ops"]
    assert find.lookup("fill7") == TOP + 0x700070
    assert find.at(TOP + 0x700079) == ("fill7", 9)
    assert find.at(exported(32)["pv_ops"] + 12) == ("pv_ops", 12)
    names = [name for _, _, name in find.all()]
    assert "fill399" in names
    assert "boot_cpu_data" in names
    assert names.count("fill5") == 1
    assert names.count("fill6") == names.count("exported_alias") == 1
    # Of two names for one place that of kallsyms.
    assert find.at(TOP + 0x700061) == ("fill6", 1)
    assert find.lookup("exported_alias") == TOP + 0x700060
    addresses = [a for a, _, _ in find.all()]
    assert addresses == sorted(addresses)


def test_a_system_map_serves_a_stripped_kernel(tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text(
        "00000000 A VDSO32_PRELINK\nc1000000 T _text\nc1000010 t both\nc1000050 t another\n"
        "c1000050 T inner\nc1000070 T both\nc1100050 D pv_ops\n"
        "c1100060 d quiet\nc1fff000 B broken line with spaces\n"
    )
    data = kernel(32, True, 3, {"__ksymtab": exported(32)})
    image = opened(tmp_path, data, system_map=tmp_path / "System.map")
    find = image.symbols
    assert find.lookup("quiet") == 0xC1100060
    assert find.at(0xC1000058) == ("inner", 8)
    assert find.lookup("both") == 0xC1000070
    assert find.sources == ("System.map", "exports")
    assert (0xC1100060, "d", "quiet") in list(find.all())


def test_a_system_map_of_another_kernel_is_refused(tmp_path: Path) -> None:
    lines = [f"{address + 0x40:08x} D {name}" for name, address in exported(32).items()]
    (tmp_path / "System.map").write_text("\n".join(lines) + "\n")
    data = kernel(32, True, 3, {"__ksymtab": exported(32)})
    with pytest.raises(ImageError, match="another kernel") as caught:
        opened(tmp_path, data, system_map=tmp_path / "System.map").symbols.lookup("pv_ops")
    assert caught.value.file == str(tmp_path / "System.map")


@pytest.mark.parametrize(
    "text", ["", "ffffffffffffffff B The real System.map is in the linux-image-dbg package\n", "\0\1\2", "c1 T a\n"]
)
def test_a_placeholder_is_no_system_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "System.map").write_text(text)
    with pytest.raises(ImageError, match=r"not a System\.map"):
        _ = opened(tmp_path, with_symtab().build(), system_map=tmp_path / "System.map").symbols.sources
    with pytest.raises(ImageError, match="cannot read"):
        _ = opened(tmp_path, with_symtab().build(), system_map=tmp_path / "none").symbols.sources


def test_nothing_known(tmp_path: Path) -> None:
    elf = ElfWriter().section(".text", bytes(64), address=TOP, flags="ax")
    find = opened(tmp_path, elf.build()).symbols
    assert find.sources == ()
    assert find.at(TOP) is None
    assert find.lookup("x") is None
    assert list(find.all()) == []


def test_nine_thousand_addresses_are_cheap(tmp_path: Path) -> None:
    """The scan's need, with room for a slow machine: the bar itself is measured on real kernels."""
    rows = [(TOP + 0x400000 + 64 * i, "t", f"function_number_{i}") for i in range(20000)]
    elf = ElfWriter()
    elf.section(".rodata", build(rows, bits=32, addresses="relative", era="6.4"), address=TOP, flags="a", align=8)
    elf.section(".text", bytes(0x200000), address=TOP + 0x400000, flags="ax")
    image = opened(tmp_path, elf.build())
    start = time.process_time()
    found = [image.symbols.at(TOP + 0x400000 + 139 * i) for i in range(9000)]
    spent = time.process_time() - start
    assert found[1] == ("function_number_2", 11)
    assert found[8999] == (f"function_number_{139 * 8999 // 64}", 139 * 8999 % 64)
    assert spent < 0.5


def test_a_system_map_without_end_is_refused(tmp_path: Path) -> None:
    data = with_symtab().build()
    path = tmp_path / "System.map"
    path.write_bytes(b"c1000000 T x\n" * 600_000)
    with pytest.raises(ImageError, match="more than 524288 symbols"):
        opened(tmp_path, data, system_map=path).symbols.lookup("x")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match="bytes are no System"):
        opened(tmp_path, data, system_map=path).symbols.lookup("x")
