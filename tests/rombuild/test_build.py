"""Built ROMs: the same bytes every time, within limits, clean, with symbols that binutils read."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from romguest import PAIRS, rom

from vmipatch.rombuild import abi as abis
from vmipatch.rombuild import hypervisor
from vmipatch.rombuild.build import build, build_many
from vmipatch.rombuild.check import check
from vmipatch.rombuild.inspect import images, relocations
from vmipatch.rombuild.symbols import as_elf, as_map


def test_every_pair_there_is() -> None:
    """3.0 and 13.0 for all six, 6.1 for native and l4ka, the extensions for l4ka, nothing else."""
    made = {
        (h, a) for h in hypervisor.names() for a in abis.names() if hypervisor.load(h).supports(abis.load(a)) is None
    }
    assert made == set(PAIRS)
    assert len(made) == 16


@pytest.mark.parametrize(("name", "abi"), PAIRS)
def test_clean_and_within_the_limits(name: str, abi: str) -> None:
    data = rom(name, abi).data
    assert check(data) == []
    assert build(name, abi).data == data
    assert len(data) == 512 * data[2]
    assert sum(data) & 0xFF == 0
    # A guest of the RFC panics beyond 16 KiB and reads the length as a signed byte.
    assert len(data) <= 16384
    assert data[2] < 128


@pytest.mark.parametrize(("name", "abi"), PAIRS)
def test_headers_as_a_bios_reads_them(name: str, abi: str) -> None:
    """PCI firmware specification 3.0 and Plug and Play BIOS 1.0a, read here without our reader."""
    data = rom(name, abi).data
    assert data[:2] == b"\x55\xaa"
    assert data[8:12] == struct.pack("<I", 0x696D5663)
    pci, pnp = struct.unpack_from("<HH", data, 0x18)
    assert pci % 4 == 0
    signature, vendor, device, _, length, _, interface, sub, base, units = struct.unpack_from("<4sHHHHBBBBH", data, pci)
    assert (signature, vendor, device, length, units) == (b"PCIR", 0x15AD, 0x0801, 0x18, len(data) // 512)
    assert (base, sub, interface) == (5, 0x80, 0)
    assert data[pci + 0x14] == 0
    assert data[pci + 0x15] == 0x80
    assert pnp % 16 == 0
    assert data[pnp : pnp + 4] == b"$PnP"
    assert sum(data[pnp : pnp + 16 * data[pnp + 5]]) & 0xFF == 0
    maker, product = struct.unpack_from("<HH", data, pnp + 0x0E)
    assert data[maker : data.index(b"\0", maker)] == b"vmipatch"
    assert name.encode() in data[product : data.index(b"\0", product)].lower()
    if abi == "vmi-3.0":
        # What mainline Linux asks of the licence and of virtual_top.
        licence = struct.unpack_from("<H", data, 0x16)[0]
        assert data[licence:].startswith(b"GPL\0")
        assert struct.unpack_from("<I", data, 0x10)[0] == (0 if name == "native" else 0xFC000000)


def test_a_fresh_process_makes_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "vmipatch", "rom", "build", "xen", "--abi", "vmi-13.0", "-o", str(out)]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}, cwd=Path(__file__).parents[2])
        assert out.read_bytes() == rom("xen", "vmi-13.0").data
    for suffix in (".map", ".elf"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


def test_no_small_stub_crosses_a_line() -> None:
    for pair in PAIRS:
        made = rom(*pair)
        code = [s for s in made.symbols if s.name in abis.load(pair[1]).calls and not s.name.endswith(".slot")]
        assert code
        for symbol in code:
            if symbol.size <= 32:
                assert symbol.offset // 32 == (symbol.offset + symbol.size - 1) // 32, (pair, symbol)


def test_symbols_do_not_overlap_and_cover_the_code() -> None:
    for pair in PAIRS:
        made = rom(*pair)
        end = 0
        for symbol in made.symbols:
            assert symbol.offset >= end, (pair, symbol)
            end = symbol.offset + symbol.size
        table = relocations(made.data)
        starts = {s.offset for s in made.symbols}
        assert all(a.offset in starts for a in table.calls.values() if a.type)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed: nothing reads the ELF file")
def test_the_elf_file_for_debuggers(tmp_path: Path) -> None:
    made = rom("xen", "vmi-3.0")
    elf = tmp_path / "rom.elf"
    elf.write_bytes(as_elf(made.data, [(0, made.abi, made.symbols)], 0xC8000))
    said = subprocess.run(["readelf", "-a", "-W", elf], check=True, text=True, capture_output=True)
    assert said.stderr == ""
    assert "warning" not in said.stdout.lower()
    names = subprocess.run(["nm", "-n", elf], check=True, text=True, capture_output=True).stdout.split("\n")
    for symbol in made.symbols:
        assert f"{0xC00C8000 + symbol.offset:08x} T {symbol.name}" in names
    code = subprocess.run(["objcopy", "-O", "binary", "-j", ".text", elf, tmp_path / "text"], check=True)
    assert code.returncode == 0
    assert (tmp_path / "text").read_bytes() == made.data
    lines = as_map([(0, made.abi, made.symbols)], 0xC8000).split("\n")
    assert sum(not line.startswith("#") for line in lines if line) == len(made.symbols)


def test_several_images() -> None:
    """Each where a guest's scan in 2 KiB steps finds it, chained for a BIOS by PCIR."""
    parts = build_many("l4ka", ["vmi-3.0", "vmi-13.0", "vmi-6.1"])
    data = b"".join(p.data for p in parts)
    assert check(data) == []
    found = images(data)
    assert [i.vmi.abi if i.vmi else None for i in found] == ["vmi-3.0", "vmi-13.0", "vmi-6.1"]
    assert all(i.offset % 2048 == 0 for i in found)
    assert [data[i.offset + i.pci.offset + 0x15] for i in found if i.pci] == [0, 0, 0x80]
    for generation, part in ((3, 0), (13, 1), (6, 2)):
        answers = relocations(data, generation)
        assert answers.generation == generation
        assert answers.image_offset == found[part].offset
        assert answers.calls == relocations(parts[part].data).calls
