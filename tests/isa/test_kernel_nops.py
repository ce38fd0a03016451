"""What Linux's optimiser takes for a nop: by the bytes, hand-assembled, of both versions of its ``insn_is_nop``.

Which instructions do nothing is Intel's (SDM volume 2: NOP, PAUSE, XCHG, MOV, LEA, JMP); which of them the kernel knows
is arch/x86/kernel/alternative.c of 6.12 and arch/x86/lib/insn-eval.c of 7.3.
"""

from __future__ import annotations

import pytest

from vmipatch.isa import nops
from vmipatch.isa.decode import detailed, is_any_nop, is_nop

# code, bits, a nop to 6.12, a nop to 7.3
CASES = [
    ("90", 64, True, True),
    ("6690", 64, True, True),
    ("f390", 32, False, False),  # pause
    ("f390", 64, False, False),
    ("4190", 64, True, False),  # xchg r8, rax
    ("4090", 64, True, True),  # nop with a REX that changes nothing
    ("0f1f440000", 64, True, True),
    ("0f1f40d6", 64, True, True),  # the newer ENDBR poison
    ("660f1f00", 64, True, True),  # the older one
    ("0f1fc8", 64, True, False),  # /1 of the group
    ("440f1f00", 64, True, False),  # /8 with REX.R
    ("89f6", 32, False, True),  # mov esi, esi
    ("89f6", 64, False, False),  # clears the upper half of rsi
    ("4889f6", 64, False, True),  # mov rsi, rsi
    ("4d89f6", 64, False, True),  # mov r14, r14
    ("4989f6", 64, False, False),  # mov r14, rsi
    ("6689f6", 32, False, False),
    ("89fe", 32, False, False),  # mov esi, edi
    ("8936", 32, False, False),  # mov [esi], esi
    ("8d7600", 32, False, True),  # lea esi, [esi + 0]
    ("8d7601", 32, False, False),
    ("8d36", 32, False, False),  # no displacement: unknown to it
    ("8d742600", 32, False, True),  # lea esi, [esi + eiz + 0]
    ("3e8d742600", 32, False, True),
    ("2e8d742600", 32, False, False),  # another prefix than DS
    ("8db600000000", 32, False, True),
    ("8db42600000000", 32, False, True),
    ("8d743600", 32, False, False),  # lea esi, [esi + esi]
    ("8d746600", 32, False, False),  # scaled
    ("488d7600", 64, False, True),
    ("8d7600", 64, False, False),
    ("4d8d7600", 64, False, True),  # lea r14, [r14 + 0]
    ("eb00", 64, False, True),
    ("eb01", 64, False, False),
    ("e900000000", 64, False, True),
    ("e9000000ff", 64, False, False),
    ("c3", 64, False, False),
    ("cc", 32, False, False),
]  # fmt: skip


@pytest.mark.parametrize(("code", "bits", "old", "new"), CASES)
def test_nops(code: str, bits: int, old: bool, new: bool) -> None:
    body = bytes.fromhex(code)
    assert is_nop(body, bits) is old
    assert is_any_nop(body, bits) is new
    found = detailed(body, bits)
    assert found is not None
    assert (found.size, found.nop, found.any_nop) == (len(body), old, new)


@pytest.mark.parametrize(("name", "bits"), [("generic-atomic", 32), ("p6-11", 64)])
def test_the_kernels_own_nops_are_nops_to_7_3(name: str, bits: int) -> None:
    assert all(is_any_nop(code, bits) for code in nops.table(name).sequences)


@pytest.mark.parametrize(
    ("code", "moves"),
    [("e800000000", True), ("e900000000", True), ("eb00", True), ("7200", True), ("0f8200000000", True),
     ("e200", False), ("e300", False), ("c7f800000000", False)],
)  # fmt: skip
def test_what_linux_moves(code: str, moves: bool) -> None:
    """LOOP, JECXZ and XBEGIN are relative too, and not among the opcodes that ``__apply_relocation`` looks at."""
    found = detailed(bytes.fromhex(code), 64)
    assert found is not None
    assert found.branch is moves
