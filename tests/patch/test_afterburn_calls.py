"""Afterburn sites rewritten into ROM calls, run under Unicorn: the effect must be the instruction's own.

The called stub is a recorder: it notes the registers that the call gets, changes
everything that the ABI lets a call change, and answers a known value.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.elfwriter import ElfWriter
from vmipatch.annotate import scan
from vmipatch.errors import PatchError
from vmipatch.image import open_image
from vmipatch.patch import OnRom, plan
from vmipatch.patch.rom import place
from vmipatch.rombuild.relocations import Relocation, Relocations, RelocationType

TEXT, LINEAR, STACK, NOTES = 0xC0100000, 0xC00C0000, 0xC0300800, 0xC0310000
ANSWER = 0x5A5A0200

RELOCATIONS = Relocations(
    "vmi-13.0", 13, "test", {n: Relocation(RelocationType.CALL_REL, 32 * n) for n in range(85)}, 32, image_size=0xAC0
)

START = {
    "eax": 0x11111111, "ecx": 0x22222222, "edx": 0x33333333, "ebx": 0x44444444,
    "ebp": 0x55555555, "esi": 0x66666666, "edi": 0x77777777,
}  # fmt: skip

# Site (an instruction and nops as the afterburner's default padding gives), call number of the March 2006 list,
# what must be in which register at the call, which registers the answer must end in.
CASES = [
    ("fa" + "90" * 7, 36, {}, {}),
    ("fb" + "90" * 23, 35, {}, {}),
    ("9d" + "90" * 21, 38, {"eax": 0x00000246}, {}),
    ("f4" + "90" * 6, 42, {}, {}),
    ("0f06" + "90" * 14, 34, {}, {}),
    ("0f22d8" + "90" * 12, 22, {"eax": START["eax"]}, {}),
    ("0f22df" + "90" * 12, 22, {"eax": START["edi"]}, {}),
    ("0f20d0" + "90" * 12, 25, {}, {"eax": ANSWER}),
    ("0f20d6" + "90" * 12, 25, {}, {"esi": ANSWER}),
    ("0f0113" + "90" * 9, 8, {"eax": START["ebx"]}, {}),
    ("0f015e10" + "90" * 9, 10, {"eax": START["esi"] + 0x10}, {}),
    ("0f013d78563412" + "90" * 6, 55, {"eax": 0x12345678}, {}),
    ("0f00d3" + "90" * 16, 9, {"eax": START["ebx"] & 0xFFFF}, {}),
    ("0f00d9" + "90" * 16, 11, {"eax": START["ecx"] & 0xFFFF}, {}),
    ("0f00cb" + "90" * 9, 15, {}, {"ebx": ANSWER}),
    ("ec" + "90" * 13, 60, {"edx": START["edx"]}, {"eax": START["eax"] & 0xFFFFFF00 | ANSWER & 0xFF}),
    ("66ed" + "90" * 13, 61, {"edx": START["edx"]}, {"eax": START["eax"] & 0xFFFF0000 | ANSWER & 0xFFFF}),
    ("e4f8" + "90" * 13, 60, {"edx": 0xF8}, {"eax": START["eax"] & 0xFFFFFF00 | ANSWER & 0xFF}),
    ("ee" + "90" * 16, 66, {"eax": START["eax"], "edx": START["edx"]}, {}),
    ("e680" + "90" * 16, 66, {"eax": START["eax"], "edx": 0x80}, {}),
    ("ef" + "90" * 16, 65, {"eax": START["eax"], "edx": START["edx"]}, {}),
]


def patched_site(folder: Path, code: bytes) -> bytes:
    """The site's bytes after planning."""
    elf = ElfWriter(bits=32)
    elf.section(".text", code, address=TEXT, flags="ax")
    elf.section(".afterburn", struct.pack("<II", TEXT, TEXT + len(code)), address=TEXT + 0x1000, flags="a")
    path = folder / "image"
    path.write_bytes(elf.build())
    image = open_image(path)
    (patch,) = plan(image, scan(image), OnRom(place(image, "test", RELOCATIONS, 0xC0000))).patches
    assert len(patch.new) == len(code)
    return patch.new


@pytest.mark.parametrize(("code", "call", "arguments", "results"), CASES, ids=[c[0][:8] for c in CASES])
def test_the_call_has_the_effect_of_the_instruction(
    tmp_path: Path, code: str, call: int, arguments: dict[str, int], results: dict[str, int]
) -> None:
    import unicorn
    from unicorn import x86_const as x86

    site = patched_site(tmp_path, bytes.fromhex(code))
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
    for start in (TEXT, LINEAR, STACK & ~0xFFF, NOTES):
        machine.mem_map(start, 0x2000)
    machine.mem_write(TEXT, site)
    # PUSHAD, copy the eight words to NOTES, POPAD; then spoil what a call may: EAX, ECX, EDX and the flags.
    stub = b"\x60\x8d\x3d" + struct.pack("<I", NOTES) + b"\x89\xe6\xb9\x08\0\0\0\xfc\xf3\xa5\x61"
    if call not in (35, 36, 37, 38):
        stub += b"\xb8" + struct.pack("<I", ANSWER) + b"\xb9\xef\xbe\xad\xde\xba\xef\xbe\xad\xde\xf9"
    machine.mem_write(LINEAR + 0x1000, stub + b"\xc3")
    for number in range(5, 85):
        at = LINEAR + 32 * number
        jump = b"\xe9" + struct.pack("<i", LINEAR + 0x1000 - (at + 5))
        machine.mem_write(at, jump if number == call else b"\xf4")
    machine.mem_write(STACK, struct.pack("<I", 0x246))
    registers = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in (*START, "esp", "eip")}
    for name, value in START.items():
        machine.reg_write(registers[name], value)
    machine.reg_write(registers["esp"], STACK)
    machine.emu_start(TEXT, TEXT + len(site), count=200)
    assert machine.reg_read(registers["eip"]) == TEXT + len(site)
    order = ("edi", "esi", "ebp", "esp", "ebx", "edx", "ecx", "eax")
    at_call = dict(zip(order, struct.unpack("<8I", machine.mem_read(NOTES, 32)), strict=True))
    for name, value in arguments.items():
        assert at_call[name] == value, f"{name} at the call"
    for name, value in {**START, **results}.items():
        assert machine.reg_read(registers[name]) == value, f"{name} after the site"
    popped = 4 if code.startswith("9d") else 0
    assert machine.reg_read(registers["esp"]) == STACK + popped


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("9c" + "90" * 5, "9 bytes, the site has 6"),
        ("0f00c0" + "90" * 6, "11 bytes, the site has 9"),
        ("cd80" + "90" * 11, "no VMI call does this"),
        ("8ed8" + "90" * 12, "no VMI call does this"),
        ("0f011424" + "90" * 9, "operand on the stack"),
        ("0f20d4" + "90" * 12, "not with esp"),
        ("1f" + "90" * 5, "no VMI call does this"),
    ],
)
def test_what_cannot_call_is_refused(tmp_path: Path, code: str, why: str) -> None:
    with pytest.raises(PatchError, match=why):
        patched_site(tmp_path, bytes.fromhex(code))


def test_iret_and_cpuid_are_plain_calls(tmp_path: Path) -> None:
    iret = patched_site(tmp_path, bytes.fromhex("cf" + "90" * 4))
    assert iret == b"\xe8" + struct.pack("<i", LINEAR + 32 * 39 - TEXT - 5)
    cpuid = patched_site(tmp_path, bytes.fromhex("0fa2" + "90" * 8))
    assert cpuid[:5] == b"\xe8" + struct.pack("<i", LINEAR + 32 * 5 - TEXT - 5)
