"""The integer and x87 instructions, state by state against Unicorn.

``VMIPATCH_UNICORN_CASES`` sets the number of random instructions (200,000 and
more for a full run); the suite takes a few thousand.
"""

from __future__ import annotations

import os

import pytest
from differential import Case, Difference, candidates, compare
from differential_x87 import compare as compare_x87

pytest.importorskip("unicorn")
CASES = int(os.environ.get("VMIPATCH_UNICORN_CASES", "6000"))


def is_unicorns(difference: Difference) -> str:
    """Why a difference is Unicorn's, by the manual; "" if it is not known to be."""
    case: Case = difference.case
    row = case.row
    modrm = case.code[case.code.index(row.opcode) + 1] if row.opcode in case.code[:-1] else 0
    if row.mnemonic == "test" and row.group == 1:
        return "F6 /1 and F7 /1: TEST on every processor since the 8086 (AMD APM 3, appendix A); Unicorn gives #UD"
    if row.mnemonic == "prefetch" and modrm >= 0xC0:
        return "0F 0D is a NOP where PREFETCHW is not there (SDM 2, NOP); Unicorn gives #UD for registers"
    if row.mnemonic == "hintnop" and row.opcode == 0x18 and modrm >= 0xC0:
        return "0F 18..1F are reserved NOPs (SDM 2, table A-3); Unicorn gives #UD for registers of 0F 18"
    if row.mnemonic == "neg" and 0xF0 in case.code[:3]:
        return "LOCK NEG sets flags as NEG does (SDM 2, NEG); Unicorn's QEMU takes the negated value for them"
    return ""


def test_integer_instructions_agree_with_unicorn() -> None:
    differences, seen, _ = compare(CASES, seed=CASES)
    unexplained = [str(d) for d in differences if not is_unicorns(d)]
    assert not unexplained, "\n".join(unexplained[:20])
    unmet = [f"{row.opcode:02x}/{row.group} {row.mnemonic}" for row, count in seen.items() if count == 0]
    assert not unmet, unmet
    assert len(candidates()) > 300


def test_known_differences_are_still_unicorns_own() -> None:
    # Were Unicorn to change its mind, the explanations above would have to go.
    differences, _, _ = compare(3 * len(candidates()), seed=5)
    assert {d.case.row.mnemonic for d in differences} <= {"test", "prefetch", "hintnop", "neg"}


def x87_is_unicorns(line: str) -> bool:
    """Why an x87 difference is Unicorn's (SDM 1, chapter 8; SDM 2 of each instruction).

    FBSTP of a number out of range stores the packed indefinite, and keeps the
    sign of a zero; FCOMI clears OF, SF and AF (AMD APM 5); FST to an empty
    register fills it; FST of a signalling NaN to memory makes it quiet; FSQRT
    leaves C2.
    """
    code = bytes.fromhex(line.split()[0])
    changed = line.split(": ", 1)[1]
    if code[0] == 0xDF and code[1] >> 3 == 6:
        return changed.startswith(("memory ffffc000000000000000/", "memory 80000000000000000000/"))
    if code[0] in (0xD9, 0xDD) and code[1] in (0x13, 0x1B):
        return signalling(line) and changed.startswith("memory ")
    if code[0] in (0xDB, 0xDF) and 0xE8 <= code[1] < 0xF8:
        return changed.startswith("flags ") and "," not in changed.rstrip()
    if code[0] == 0xDD and 0xD0 <= code[1] < 0xE0:
        return changed.startswith("full ")
    return code == b"\xd9\xfa" and changed.startswith("status ")


def signalling(line: str) -> bool:
    """Whether ST(0) was a signalling NaN."""
    words = line.split()
    value = int(words[words.index("st0") + 1], 16)
    return value >> 64 & 0x7FFF == 0x7FFF and value >> 62 & 3 == 2 and value & (1 << 62) - 1 != 0


def test_x87_arithmetic_agrees_with_softfloat() -> None:
    different = [line for line in compare_x87(max(4000, CASES // 4), seed=11) if not x87_is_unicorns(line)]
    assert not different, "\n".join(different[:10])
