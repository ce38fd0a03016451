"""Lengths of instructions: random bytes against capstone, the sweep's expression against one instruction at a time.

VMIPATCH_FUZZ multiplies the number of cases.  SDM is Intel's "64 and IA-32 Architectures Software Developer's Manual".
"""

from __future__ import annotations

import os
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import capstone
import pytest

from vmipatch.isa import opcodes, sensitive, sweep

CASES = 20_000 * int(os.environ.get("VMIPATCH_FUZZ", "1"))
MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
LEADS = [bytes.fromhex(text) for text in ("0f", "0f38", "0f3a", "660f", "f30f", "f20f38", "c4", "c5", "62", "8f", "")]

# Where capstone 5.0 is wrong: opcode, the prefix with which (0: any), size of code (0: any).
EXCEPTIONS = {
    ("0f", 0xB9, 0, 0): "UD1 has a ModRM byte (SDM 2, UD: 0F B9 /r)",
    ("0f", 0xFF, 0, 0): "UD0 has a ModRM byte (SDM 2, UD: 0F FF /r)",
    (
        "0f",
        0x80,
        0x66,
        64,
    ): "the size of a near branch is fixed in 64-bit mode (SDM 2, Jcc; appendix A, f64), as it is to "
    "capstone for the fourteen others",
    ("0f", 0x81, 0x66, 64): "as 0F 80",
    (
        "0f",
        0x78,
        0x66,
        0,
    ): "EXTRQ is /0 and has two immediate bytes (APM 4, EXTRQ); capstone has it with any register, or never",
}


def excused(parts: opcodes.Parts, bits: int) -> bool:
    place, opcode = parts.opcode
    return any(
        (place, opcode) == (m, o) and (not prefix or prefix in parts.prefixes) and size in (0, bits)
        for m, o, prefix, size in EXCEPTIONS
    )


def cases(seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    return [(rng.choice(LEADS) + rng.randbytes(16))[:16] for _ in range(count)]


def disagreeing(bits: int, count: int) -> tuple[int, Counter[str]]:
    """How many both take for an instruction, and where they give it another length."""
    engine: Any = capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])
    compared, wrong = 0, Counter[str]()
    for code in cases(bits, count):
        theirs = next(engine.disasm_lite(code, 0), None)
        ours = opcodes.parts(code, bits)
        if theirs is None or ours is None:
            # What capstone knows, the maps have: what they lack would be passed over as data.
            if theirs is not None:
                wrong[f"{code.hex(' ')}: {theirs[2]}, none to us"] += 1
            continue
        compared += 1
        if ours.size != theirs[1] and not excused(ours, bits):
            wrong[f"{code.hex(' ')}: {theirs[2]}, {theirs[1]} bytes, ours {ours.size}"] += 1
    return compared, wrong


@pytest.mark.parametrize("bits", MODES)
def test_random_bytes_have_capstones_lengths(bits: int) -> None:
    compared, wrong = disagreeing(bits, CASES)
    assert compared > CASES // 4
    assert not wrong


@pytest.mark.parametrize("change", [("one", 0x89), ("one", 0x69), ("0f", 0xB6), ("0f38", 0x00), ("0f3a", 0x0F)])
def test_a_wrong_table_is_seen(change: opcodes.Opcode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One opcode with an immediate byte too many, and none at all: random bytes tell."""
    true = opcodes.tables(64)
    (form,) = true.opcodes[change]
    lead = opcodes.MAPS[change[0]] + bytes((change[1],))
    monkeypatch.setitem(globals(), "LEADS", [lead])
    for forms in ((form._replace(parts=form.parts + "b"),), ()):
        wrong = true._replace(opcodes={**true.opcodes, change: forms})
        monkeypatch.setattr(opcodes, "tables", lambda bits, wrong=wrong: wrong)
        assert disagreeing(64, 200)[1]


@pytest.mark.parametrize("bits", MODES)
@pytest.mark.parametrize("wanted", ["nothing", "sensitive"])
def test_the_expression_takes_instructions_as_the_maps_do(bits: int, wanted: str) -> None:
    """Random bytes swept by the expression: it stops where a sweep by single instructions does."""
    asked = sensitive.wanted(bits) if wanted == "sensitive" else {}
    data = b"".join(cases(bits + 1, CASES // 10))
    cuts = [0, len(data) // 3, len(data)]
    expected, starts = [], []
    for first, end in pairwise(cuts):
        at = first
        while at < end:
            starts.append(at)
            if prefix := opcodes.emulated(data, bits, at, end):
                at += prefix
                continue
            parts = opcodes.parts(data, bits, at, end)
            if parts is None:
                expected.append((sweep.BAD, at, at + 1))
                at += 1
                continue
            if parts.branch:
                expected.append((sweep.BRANCH, at, at + parts.size))
            elif parts.opcode in asked and (
                asked[parts.opcode] is None or data[at + parts.after] in asked[parts.opcode]
            ):
                expected.append((sweep.WANTED, at, at + parts.size))
            at += parts.size
    found = [stop[:3] for stop in sweep.sweep(data, 0, cuts, bits, asked, b"\1" * len(data))]
    assert found == expected
    assert list(sweep.starts(data, cuts, bits)) == starts
