"""The integer and x87 instructions, state by state against Unicorn.

``VMIPATCH_UNICORN_CASES`` sets the number of random instructions (200,000 and
more for a full run); the suite takes a few thousand.
"""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
from differential import CODE, DATA, Case, Difference, Ours, Unicorn, candidates, compare
from differential_x87 import compare as compare_x87

from vmipatch.emu.cpu import Exit

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
    register fills it; FST of a signalling NaN to memory and FLD of one from
    memory make it quiet; FSQRT leaves C2; the constants are rounded as the
    control word says (SDM 2, FLD1 and kin), in Unicorn always to nearest.
    """
    code = bytes.fromhex(line.split()[0])
    changed = line.split(": ", 1)[1]
    control = int(line.split()[2], 16)
    if code[0] == 0xDF and code[1] >> 3 == 6:
        return changed.startswith(("memory ffffc000000000000000/", "memory 80000000000000000000/"))
    if code[0] in (0xD9, 0xDD) and code[1] in (0x13, 0x1B):
        return signalling(line) and changed.startswith("memory ")
    if code[0] in (0xDB, 0xDF) and 0xE8 <= code[1] < 0xF8:
        return changed.startswith("flags ") and "," not in changed.rstrip()
    if (code[0] in (0xDD, 0xDF) and 0xD0 <= code[1] < 0xE0) or (code[0] == 0xD9 and 0xD8 <= code[1] < 0xE0):
        return changed.startswith("full ")
    if code[0] in (0xD9, 0xDD) and code[1] == 0x03:
        return quieted(*values_of(changed)) and "," not in changed
    if code[0] == 0xD9 and code[1] in CONSTANTS:
        ours, theirs = values_of(changed)
        return rounded(CONSTANTS[code[1]], control >> 10 & 3) == ours and rounded(CONSTANTS[code[1]], 0) == theirs
    return code == b"\xd9\xfa" and changed.startswith("status ")


# The constants of FLDL2T, FLDL2E, FLDPI, FLDLG2, FLDLN2: exponent, and significand with 64 more bits behind the 64
# (from their values to 40 digits; the bits behind decide how they round).
CONSTANTS = {
    0xE9: (0x4000, Fraction("3.321928094887362347870319429489390175864831393")),
    0xEA: (0x3FFF, Fraction("1.442695040888963407359924681001892137426645954")),
    0xEB: (0x4000, Fraction("3.141592653589793238462643383279502884197169399")),
    0xEC: (0x3FFD, Fraction("0.301029995663981195213738894724493026768189881")),
    0xED: (0x3FFE, Fraction("0.693147180559945309417232121458176568075500134")),
}


def rounded(constant: tuple[int, Fraction], control: int) -> int:
    """A positive constant as an 80-bit number: control 0 rounds to nearest, 1 and 3 down, 2 up."""
    exponent, value = constant
    scaled = value * 2 ** (63 - (exponent - 0x3FFF))
    whole = scaled.numerator // scaled.denominator
    more = (scaled - whole) * 2 > 1 if control == 0 else control == 2
    return exponent << 64 | whole + more


def values_of(changed: str) -> tuple[int, int]:
    """Our value and Unicorn's of the first thing that differs."""
    ours, theirs = changed.split()[1].rstrip(",").split("/")
    return int(ours, 16), int(theirs, 16)


def quieted(ours: int, theirs: int) -> bool:
    """Whether theirs is a signalling NaN and ours the same made quiet."""
    return ours == theirs | 1 << 62 != theirs and theirs >> 64 & 0x7FFF == 0x7FFF


def signalling(line: str) -> bool:
    """Whether ST(0) was a signalling NaN."""
    words = line.split()
    value = int(words[words.index("st0") + 1], 16)
    return value >> 64 & 0x7FFF == 0x7FFF and value >> 62 & 3 == 2 and value & (1 << 62) - 1 != 0


def test_x87_arithmetic_agrees_with_softfloat() -> None:
    different = [line for line in compare_x87(max(4000, CASES // 4), seed=11) if not x87_is_unicorns(line)]
    assert not different, "\n".join(different[:10])


def test_the_same_x87_memory_forms_are_undefined() -> None:
    """D8..DF with each /digit and a memory operand, but FISTTP (SSE3), which Unicorn's processor has."""
    from unicorn.x86_const import UC_X86_REG_EBX

    ours, theirs = Ours(), Unicorn()
    ours.cpu.hook_vector(6)
    apart, undefined = [], 0
    for opcode in range(0xD8, 0xE0):
        for digit in range(8):
            if (opcode, digit) in ((0xDB, 1), (0xDD, 1), (0xDF, 1)):
                continue
            code = bytes((opcode, digit << 3 | 3, 0x90, 0x90))
            ours.memory.write(CODE, code)
            ours.memory.write(DATA, bytes(128))
            ours.cpu.set("ebx", DATA)
            ours.cpu.set("eip", CODE)
            mine = ours.cpu.run(ours.cpu.instructions + 1) == Exit.VECTOR
            theirs.uc.mem_write(CODE, code)
            theirs.uc.mem_write(DATA, bytes(128))
            theirs.uc.ctl_remove_cache(CODE, CODE + 16)
            theirs.uc.reg_write(UC_X86_REG_EBX, DATA)
            other = False
            try:
                theirs.uc.emu_start(CODE, CODE + 2, 0, 1)
            except theirs.unicorn.UcError as error:
                other = error.errno == theirs.unicorn.UC_ERR_INSN_INVALID
            undefined += mine
            if mine != other:
                apart.append(f"{code[:2].hex(' ')}: #UD is {mine} here, {other} in Unicorn")
    assert not apart
    assert undefined == 4


@pytest.mark.parametrize("code", sorted(CONSTANTS))
@pytest.mark.parametrize("rounding", range(4))
def test_constants_are_rounded_as_asked(code: int, rounding: int) -> None:
    """FLDL2T and kin are their values to 64 bits in each of the four roundings (SDM 2, FLD1)."""
    ours = Ours()
    ours.memory.write(CODE, bytes((0xD9, code)))
    ours.cpu.set("eip", CODE)
    ours.cpu.set("fctrl", 0x37F | rounding << 10)
    ours.cpu.set("ftag", 0xFFFF)
    ours.cpu.run(ours.cpu.instructions + 1)
    assert ours.cpu.get("st0") == rounded(CONSTANTS[code], rounding)
