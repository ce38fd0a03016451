"""Names of feature bits.

Bits of CPUID words are checked against the manuals (Intel SDM volume 2, CPUID;
AMD APM volume 3, appendix E), Linux's own against the headers of 2.6.24 and 6.1.
"""

from __future__ import annotations

import pytest

from vmipatch import facts
from vmipatch.annotate.features import feature_name, numbers

BY_THE_MANUALS = {
    # CPUID 1, EDX
    (0, 0): "FPU", (0, 3): "PSE", (0, 4): "TSC", (0, 6): "PAE", (0, 8): "CX8", (0, 9): "APIC", (0, 11): "SEP",
    (0, 13): "PGE", (0, 15): "CMOV", (0, 16): "PAT", (0, 19): "CLFLUSH", (0, 23): "MMX", (0, 24): "FXSR",
    (0, 25): "XMM", (0, 26): "XMM2", (0, 28): "HT",
    # CPUID 0x80000001, EDX
    (1, 11): "SYSCALL", (1, 20): "NX", (1, 22): "MMXEXT", (1, 27): "RDTSCP", (1, 29): "LM",
    (1, 30): "3DNOWEXT", (1, 31): "3DNOW",
    # CPUID 1, ECX
    (4, 0): "XMM3", (4, 1): "PCLMULQDQ", (4, 3): "MWAIT", (4, 9): "SSSE3", (4, 13): "CX16", (4, 19): "XMM4_1",
    (4, 20): "XMM4_2", (4, 23): "POPCNT", (4, 25): "AES", (4, 26): "XSAVE", (4, 28): "AVX", (4, 30): "RDRAND",
    (4, 31): "HYPERVISOR",
    # CPUID 0x80000001, ECX
    (6, 0): "LAHF_LM", (6, 2): "SVM", (6, 5): "ABM", (6, 8): "3DNOWPREFETCH",
    # CPUID 7.0, EBX, ECX, EDX
    (9, 0): "FSGSBASE", (9, 5): "AVX2", (9, 7): "SMEP", (9, 9): "ERMS", (9, 18): "RDSEED", (9, 20): "SMAP",
    (9, 23): "CLFLUSHOPT", (16, 2): "UMIP", (16, 16): "LA57", (18, 4): "FSRM", (18, 20): "IBT",
    # CPUID 0xD.1, EAX
    (10, 0): "XSAVEOPT", (10, 1): "XSAVEC", (10, 3): "XSAVES",
}  # fmt: skip
LINUX_S_OWN = {
    (3, 1): "K6_MTRR", (3, 2): "CYRIX_ARR", (3, 3): "CENTAUR_MCR", (3, 4): "K8", (3, 7): "P4",
    (3, 8): "CONSTANT_TSC", (3, 9): "UP", (3, 16): "REP_GOOD", (3, 20): "NOPL", (3, 21): "ALWAYS",
    (3, 28): "APERFMPERF", (7, 11): "PTI", (7, 21): "USE_IBPB", (8, 16): "XENPV", (8, 20): "PVUNLOCK",
    (8, 21): "VCPUPREEMPT", (11, 12): "RETPOLINE", (11, 14): "RETHUNK",
}  # fmt: skip


@pytest.mark.parametrize(("place", "name"), sorted((BY_THE_MANUALS | LINUX_S_OWN).items()))
def test_names(place: tuple[int, int], name: str) -> None:
    number = place[0] * 32 + place[1]
    assert feature_name(number) == name
    assert numbers()[name] == number


@pytest.mark.parametrize(
    ("word", "bit"),
    [
        (3, 5),  # K7, then ZEN5
        (3, 17),  # MFENCE_RDTSC, then AMD_LBR_V2
        (3, 18),  # LFENCE_RDTSC, then CLEAR_CPU_BUF
        (7, 4),  # XSAVEOPT, then CAT_L3
        (7, 12),  # RETPOLINE, then KERNEL_IBRS
        (8, 1),  # VNMI, then FLEXPRIORITY
        (10, 5), (11, 5), (16, 8), (18, 8), (19, 10), (22, 5),  # bugs in some releases
        (0, 10), (0, 20), (2, 31), (31, 31),  # nothing at all
    ],
)  # fmt: skip
def test_bits_without_one_meaning_have_no_name(word: int, bit: int) -> None:
    assert feature_name(word * 32 + bit) == f"{word}*32+{bit}"


@pytest.mark.parametrize(
    ("word", "bit", "names"),
    [
        # arch/x86/include/asm/cpufeatures.h of each release
        (3, 6, {(6, 1, 50): "P3", (6, 12, 95): "P3", (7, 2, 13): "ZEN6", (7, 3, 0): "ZEN6"}),
        (3, 18, {(6, 1, 50): "LFENCE_RDTSC", (6, 5, 10): "3*32+18", (6, 12, 118): "CLEAR_CPU_BUF"}),
        (3, 18, {(6, 18, 1): "CLEAR_CPU_BUF", (7, 3, 0): "CLEAR_CPU_BUF"}),
        (8, 1, {(6, 1, 192): "VNMI", (6, 12, 118): "FLEXPRIORITY", (7, 3, 0): "FLEXPRIORITY"}),
        (11, 19, {(6, 1, 192): "11*32+19", (6, 12, 118): "CALL_DEPTH", (7, 3, 0): "CALL_DEPTH"}),
        (21, 5, {(6, 1, 192): "INDIRECT_THUNK_ITS", (6, 12, 118): "FAST_CPPC"}),
        (21, 5, {(6, 15, 1): "21*32+5", (7, 2, 13): "AMD_FAST_CPPC"}),
        (21, 6, {(6, 12, 118): "INDIRECT_THUNK_ITS", (7, 2, 13): "AMD_HTR_CORES"}),
        (21, 10, {(6, 12, 118): "21*32+10", (7, 2, 13): "INDIRECT_THUNK_ITS", (7, 3, 0): "INDIRECT_THUNK_ITS"}),
        (14, 24, {(7, 2, 13): "14*32+24", (7, 3, 0): "DPTI"}),
        (23, 5, {(6, 12, 118): "BUG_ITS", (7, 3, 0): "BUG_SPECTRE_V2_USER"}),
        (21, 11, {(6, 5, 10): "21*32+11", (6, 12, 118): "TSA_SQ_NO"}),  # a bug in 6.5
    ],
)  # fmt: skip
def test_bits_that_moved_are_named_as_the_release_has_them(
    word: int, bit: int, names: dict[tuple[int, ...], str]
) -> None:
    for version, name in names.items():
        assert feature_name(word * 32 + bit, version) == name
        if name.isidentifier():
            assert numbers(version)[name] == word * 32 + bit


def test_a_name_that_moved_has_no_number_of_its_own() -> None:
    assert "INDIRECT_THUNK_ITS" not in numbers()
    assert "INDIRECT_THUNK_ITS" not in numbers((6, 15))
    assert numbers((6, 1, 192))["INDIRECT_THUNK_ITS"] == 21 * 32 + 5


def test_what_the_nop_tables_ask_for_has_a_number() -> None:
    asked = {
        row["feature"]
        for n in facts.names("kernels")
        for row in facts.load("kernels", n).get("nops", ())
        if "feature" in row
    }
    assert asked <= numbers().keys()
    assert {name: numbers()[name] for name in ("K8", "K7", "P3", "P4", "NOPL")} == {
        "K8": 100, "K7": 101, "P3": 102, "P4": 103, "NOPL": 116,
    }  # fmt: skip


def test_no_name_twice_and_no_bit_out_of_range() -> None:
    words = facts.load("isa", "features")["words"]
    names = [name for row in words.values() for name in row.values()]
    assert len(set(names)) == len(names)
    assert all(0 <= int(bit) < 32 for row in words.values() for bit in row)
    ranges = facts.load("isa", "features")["ranges"]
    places = [tuple(map(int, place.split("*32+"))) for place in ranges]
    assert all(0 <= word < 32 and 0 <= bit < 32 for word, bit in places)
    assert not [p for p in places if str(p[1]) in words.get(str(p[0]), {})]
    assert all(rows and all(2 <= len(row) <= 3 for row in rows) for rows in ranges.values())
