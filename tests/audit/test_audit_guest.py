"""Audits of the example guest in its forms: counts against objdump and nm; ROMs that it can and cannot take."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.audit.oracle import Covered, Expected, disassemble
from vmipatch.audit import Audit, Finding, audit
from vmipatch.image import open_image
from vmipatch.rombuild.build import build

GUEST = Path(__file__).resolve().parents[2] / "examples" / "vmi-guest"
FORMS = ("mainline", "mainline-pae", "v2", "rfc-v1")
NOT_KERNEL = (".user", ".vmi.translation")  # ring 3's; copied into sites, never run where it stands
BLOCK, TABLE_FIELD, ENTRY = 0x20, 0x28, 8  # docs/abis.md: the private block and its table of answers


def elf(form: str) -> Path:
    return GUEST / f"vmi-guest-{form}.elf"


def section(path: Path, name: str) -> bytes:
    out = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    match = re.search(rf"\] {re.escape(name)}\s+\S+\s+\w+ (\w+) (\w+)", out)
    if match is None:
        return b""
    return path.read_bytes()[int(match[1], 16) :][: int(match[2], 16)]


def sites(path: Path) -> Covered:
    """By the layouts of the ABI notes: 16-byte entries of .vmi.annotation, 8-byte ones of .parainstructions."""
    vmi = struct.iter_unpack("<IIIBBbB", section(path, ".vmi.annotation"))
    paravirt = section(path, ".parainstructions")
    found = [(row[1], row[3]) for row in vmi]
    return Covered([*found, *((row[0], row[2]) for row in struct.iter_unpack("<IBBH", paravirt))])


def slots(path: Path) -> list[tuple[int, int]]:
    """The paravirt objects: address and size, from the symbol table."""
    out = subprocess.run(["nm", "-S", path], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(\w+) (\w+) \w pv_\w+_ops$", out, re.MULTILINE)
    return [(int(a, 16), int(size, 16)) for a, size in found]


@cache
def expected(form: str) -> Expected:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed: the counts have no oracle")
    return disassemble(elf(form), 32, NOT_KERNEL)


@cache
def audited(form: str) -> Audit:
    return audit(open_image(elf(form)))


def addresses(form: str, id: str) -> list[int | None]:
    return [f.address for f in audited(form).findings if f.id == id]


@pytest.mark.parametrize("form", FORMS)
def test_sensitive_instructions(form: str) -> None:
    covered = sites(elf(form))
    for id, all_of in (
        ("sensitive-unannotated", expected(form).silent),
        ("privileged-unannotated", expected(form).traps),
    ):
        bare = sorted(a for a in all_of if a not in covered)
        print(f"{form}: {id}: {len(bare)} of objdump's {len(all_of)}")
        assert addresses(form, id) == bare
        assert audited(form).covered[id] == len(all_of) - len(bare)
        symbols = Counter(expected(form).symbols[a] for a in bare)
        counts = {f.symbol: f.count for f in audited(form).functions if f.id == id}
        assert sorted(counts.values()) == sorted(symbols.values())
    if form in ("v2", "rfc-v1"):
        assert audited(form).covered["privileged-unannotated"] > 100, "annotated sites hold their native code"


@pytest.mark.parametrize("form", FORMS)
def test_paravirt_slots(form: str) -> None:
    covered, objects = sites(elf(form)), slots(elf(form))
    through = {a for a, slot in expected(form).slots.items() if any(b <= slot < b + n for b, n in objects)}
    bare = sorted(a for a in through if a not in covered)
    print(f"{form}: pv-slot-unannotated: {len(bare)} of objdump's {len(through)}")
    assert addresses(form, "pv-slot-unannotated") == bare
    assert bool(bare) == form.startswith("mainline")


@pytest.mark.parametrize("form", FORMS)
def test_branches(form: str) -> None:
    inward = sites(elf(form)).entered(expected(form).branches)
    assert addresses(form, "branch-into-site") == sorted(inward)


def rom_findings(form: str, data: bytes, folder: Path) -> list[Finding]:
    file = folder / "x.rom"
    file.write_bytes(data)
    return [f for f in audit(open_image(elf(form)), rom=file).findings if f.id.startswith("rom-")]


@pytest.mark.parametrize("hypervisor", ["native", "xen", "kvm", "lguest", "vmware"])
@pytest.mark.parametrize(("form", "abi"), [("mainline", "vmi-3.0"), ("v2", "vmi-3.0"), ("rfc-v1", "vmi-13.0")])
def test_our_roms_fit(form: str, abi: str, hypervisor: str, tmp_path: Path) -> None:
    """The guest runs on all of them: nothing worse than a call that stays native."""
    found = rom_findings(form, build(hypervisor, abi).data, tmp_path)
    assert {f.id for f in found} <= {"rom-call-missing"}, [f.message for f in found]


Change = Callable[[bytearray], None]


def answer(number: int, type: int, stub: bytes | None = None) -> Change:
    """Another answer for a call of a 3.0 ROM; with a stub of its own in a part of the ROM that is free."""

    def change(rom: bytearray) -> None:
        table = int.from_bytes(rom[TABLE_FIELD : TABLE_FIELD + 2], "little")
        at = table + ENTRY * number
        if stub is not None:
            place = len(rom)
            rom += stub + bytes(512 - len(stub))
            rom[2] += 1
            rom[at : at + 4] = place.to_bytes(4, "little")
        rom[at + 4] = type
        if type == 0:
            rom[at : at + 4] = bytes(4)
        elif rom[at : at + 4] == bytes(4):
            rom[at : at + 4] = (0x90).to_bytes(4, "little")

    return change


def poke(at: int, value: bytes) -> Change:
    def change(rom: bytearray) -> None:
        rom[at : at + len(value)] = value

    return change


def license_of(text: bytes) -> Change:
    def change(rom: bytearray) -> None:
        at = int.from_bytes(rom[0x16:0x18], "little")
        rom[at : at + len(text) + 1] = text + b"\0"

    return change


NONE, CALL, JUMP, NOP = range(4)
IRET, SYSEXIT, CLI, CLTS, CPUID, SETPXE, FREQUENCY, COUNTER, ALARM = 33, 34, 30, 28, 0, 38, 66, 67, 68


@pytest.mark.parametrize(
    ("change", "id", "severity", "word"),
    [
        (answer(IRET, NONE), "rom-call-required", "error", "IRET"),
        (answer(SYSEXIT, NONE), "rom-call-required", "error", "SYSEXIT"),
        (answer(IRET, CALL, b"\xcf"), "rom-return-address", "error", "IRET"),
        (answer(IRET, CALL, b"\x50\x58\xeb\x00\xcf"), "rom-return-address", "error", "IRET"),
        (answer(IRET, CALL, b"\x83\xc4\x04\xcf"), None, None, None),
        (answer(IRET, CALL, b"\x8d\x64\x24\x04\xcf"), None, None, None),
        (answer(IRET, NOP), "rom-relocation", "error", "IRET"),
        (answer(CLI, JUMP), "rom-relocation", "error", "DisableInterrupts"),
        (answer(CLTS, JUMP), "rom-relocation", "warning", "CLTS"),
        (answer(CPUID, JUMP), "rom-relocation", "error", "CPUID"),
        (answer(SETPXE, JUMP), "rom-relocation", "error", "SetPxE"),
        (answer(CLTS, NONE), "rom-call-missing", "warning", "CLTS"),
        (answer(CLI, NOP), None, None, None),
        (answer(FREQUENCY, CALL), "rom-timer", "error", "SetAlarm"),
        (license_of(b"BSD"), "rom-license", "error", "BSD"),
        (poke(0x16, b"\0\0"), "rom-license", "error", "none"),
        (poke(0x18, b"\0\0"), "rom-pci", "error", "PCIR"),
        (poke(0x0D, b"\x02"), "rom-api", "error", "3.0"),
        (poke(0x08, b"XXXX"), "rom-unreadable", "error", "VMI"),
        (poke(0x00, b"XX"), "rom-unreadable", "error", "option ROM"),
        (poke(0x20, b"XXXX"), "rom-unreadable", "error", "not ours"),
    ],
)
def test_what_mainline_cannot_take(
    change: Change, id: str | None, severity: str | None, word: str | None, tmp_path: Path
) -> None:
    """Each from a ROM that fits but for one thing (ABI notes, sections 1.5, 1.6, 4.3, 8.8 and 10)."""
    rom = bytearray(build("native", "vmi-3.0").data)
    before = {(f.id, f.message) for f in rom_findings("mainline", bytes(rom), tmp_path)}
    change(rom)
    new = [f for f in rom_findings("mainline", bytes(rom), tmp_path) if (f.id, f.message) not in before]
    if id is None:
        assert new == []
        return
    assert id in {f.id for f in new}, [(f.id, f.message) for f in new]
    assert word is not None
    assert any(f.id == id and f.severity == severity and word in f.message for f in new)


def test_pae_asks_for_the_long_calls(tmp_path: Path) -> None:
    rom = bytearray(build("native", "vmi-3.0").data)
    answer(39, JUMP)(rom)  # SetPxELong
    assert "rom-relocation" in {f.id for f in rom_findings("mainline-pae", bytes(rom), tmp_path)}
    assert "rom-relocation" not in {f.id for f in rom_findings("mainline", bytes(rom), tmp_path)}
    rom = bytearray(build("native", "vmi-3.0").data)
    answer(SETPXE, JUMP)(rom)
    assert "rom-relocation" not in {f.id for f in rom_findings("mainline-pae", bytes(rom), tmp_path)}


def test_a_slot_that_is_missing(tmp_path: Path) -> None:
    """13.0: every slot that a site names is called as it stands."""
    rom = bytearray(build("native", "vmi-13.0").data)
    assert rom_findings("rfc-v1", bytes(rom), tmp_path) == []
    answer(35, NONE)(rom)  # EnableInterrupts
    found = rom_findings("rfc-v1", bytes(rom), tmp_path)
    assert [f.id for f in found] == ["rom-call-required"]
    assert "EnableInterrupts" in found[0].message


def test_a_kernel_without_a_back_end(tmp_path: Path) -> None:
    from tests.kernelmaker import KernelMaker

    maker = KernelMaker(bits=64)
    maker.code(b"\xc3")
    kernel, rom = tmp_path / "vmlinux", tmp_path / "rom"
    kernel.write_bytes(maker.build())
    rom.write_bytes(build("native", "vmi-3.0").data)
    assert [f.id for f in audit(open_image(kernel), rom=rom).findings] == ["rom-api"]


def test_damaged_roms(tmp_path: Path) -> None:
    import random

    good = build("xen", "vmi-3.0").data
    rng = random.Random(1)
    for _ in range(40):
        data = bytearray(good)
        for _ in range(rng.choice((1, 10, 200))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        rom_findings("mainline", bytes(data), tmp_path)
