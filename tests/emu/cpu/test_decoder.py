"""The decoder: lengths against capstone, and the rules that capstone does not know."""

from __future__ import annotations

import random

import pytest
from differential import NoBus, candidates, encode

from vmipatch.emu.cpu import Cpu, Memory
from vmipatch.emu.cpu.engine import api
from vmipatch.emu.cpu.table import rows

MORE, TOO_LONG, UNDEFINED = -1, -2, -3


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(Memory(1 << 16, 1 << 16), NoBus())


def length(cpu: Cpu, code: bytes, wide: int = 1) -> int:
    return int(api.decode_length(cpu, code + bytes(16 - len(code)) if len(code) < 16 else code, wide))


def test_every_row_has_the_length_that_capstone_gives(cpu: Cpu) -> None:
    import capstone

    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    rng = random.Random(4)
    wrong = []
    for row in candidates():
        for _ in range(12):
            memory = "M" in row.operands or any(o in ("Eb", "Ew", "Ev") for o in row.operands)
            code = encode(row, rng, (memory and rng.random() < 0.5) or "M" in row.operands)
            found = next(disassembler.disasm_lite(code + bytes(15), 0), None)
            if row.mnemonic in ("ud1",) or (found is None and row.mnemonic in ("test", "prefetch", "hintnop")):
                continue  # capstone takes UD1 without its ModRM byte (SDM 2, UD)
            size = found[1] if found else 0
            if not size == length(cpu, code) == len(code):
                wrong.append(f"{code.hex(' ')} {row.mnemonic}: {length(cpu, code)}, capstone {size}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("bits", [16, 32])
def test_random_bytes_have_the_length_that_capstone_gives(cpu: Cpu, bits: int) -> None:
    import capstone

    mode = capstone.CS_MODE_32 if bits == 32 else capstone.CS_MODE_16
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, mode)
    rng = random.Random(bits)
    both = 0
    wrong = []
    for _ in range(20000):
        code = rng.randbytes(15)
        mine = length(cpu, code, int(bits == 32))
        found = next(disassembler.disasm_lite(code, 0), None)
        if mine < 0 or found is None:
            continue
        both += 1
        if mine != found[1] and not code[:4].translate(
            None, b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"
        ).startswith(b"\x0f\xb9"):
            wrong.append(f"{code.hex(' ')}: {mine}, capstone {found[1]} {found[2]} {found[3]}")
    assert both > 10000
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("90", 1),
        ("66 " * 14 + "90", 15),  # the longest instruction there is
        ("66 " * 15 + "90", TOO_LONG),
        ("66 " * 12 + "05 00 00", 15),
        ("66 " * 13 + "05 00 00", TOO_LONG),
        ("0f 0b", 2),
        ("0f ff", UNDEFINED),
        ("0f 01 c1", 3),  # VMCALL
        ("f0 01 00", 3),
        ("f0 01 c0", UNDEFINED),  # LOCK with a register
        ("f0 03 00", UNDEFINED),  # LOCK on a load
        ("f0 39 00", UNDEFINED),  # LOCK CMP
        ("f0 90", UNDEFINED),
        ("8d c0", UNDEFINED),  # LEA of a register
        ("c5 c0", UNDEFINED),  # LDS of a register (VEX elsewhere)
        ("0f c7 c8", UNDEFINED),
        ("0f c7 08", 3),
        ("0f 20 00", 3),  # MOV from CR takes any mod as 11
        ("ff 38", UNDEFINED),
        ("8f c8", UNDEFINED),
        ("c8 00 00 00", 4),
        ("9a 00 00 00 00 08 00", 7),
        ("67 a1 00 00", 4),
        ("66 67 c7 06 00 00 00 00", 8),
    ],
)
def test_length(cpu: Cpu, code: str, expected: int) -> None:
    assert length(cpu, bytes.fromhex(code)) == expected


def test_an_instruction_cut_short_asks_for_more(cpu: Cpu) -> None:
    whole = bytes.fromhex("66 81 84 88 78 56 34 12 34 12")
    for cut in range(len(whole)):
        assert api.decode_length(cpu, whole[:cut], 1) == MORE
    assert api.decode_length(cpu, whole, 1) == len(whole)


def test_rows_do_not_overlap() -> None:
    seen = set()
    for row in rows():
        for form in ("m", "r") if row.group >= 0 else ("",):
            if row.group >= 0 and (
                (form == "m" and row.operands == ("R",)) or (form == "r" and row.operands == ("M",))
            ):
                continue
            key = (row.two_byte, row.opcode, row.group, form)
            assert key not in seen, key
            seen.add(key)
