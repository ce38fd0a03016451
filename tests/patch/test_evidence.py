"""What an image tells of its own patcher: made-up kernels whose code and constants are hand-assembled.

The constants are those of the kernel's sources: gen_endbr_poison (arch/x86/include/asm/ibt.h of 6.12 and 7.3), x86nops
(arch/x86/include/asm/nops.h), the forms of arch/x86/kernel/static_call.c, cpufeatures.h.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import scan
from vmipatch.image import Image, open_image
from vmipatch.patch import evidence
from vmipatch.patch.rules import choose

OLD, NEW = 0x001F0F66, 0xD6401F0F
"""``nopw (%rax)`` and ``nopl -42(%rax)``, as ``gen_endbr_poison`` of 6.12 and 7.3 returns them."""

P6 = bytes.fromhex("9066900f1f000f1f40000f1f440000660f1f4400000f1f80000000000f1f840000000000")
P6_11 = P6 + bytes.fromhex("2e0f1f840000000000662e0f1f84000000000066662e0f1f840000000000")
# ASM_K8_NOP1 to 8 of arch/x86/include/asm/nops.h up to 5.12.
K8 = bytes.fromhex("90 6690 666690 66666690 6666906690 666690666690 66666690666690 6666669066666690")
GENERIC = bytes.fromhex("9089f68d76008d7426003e8d7426008db6000000008db426000000003e8db42600000000")


def compare_eax(value: int) -> bytes:
    return b"\x3d" + struct.pack("<I", value) + b"\x0f\x94\xc0\xc3"  # cmp eax, value; sete al; ret


def compare_edx(value: int) -> bytes:
    return b"\x81\xfa" + struct.pack("<I", value) + b"\x0f\x94\xc0\xc3"


def move_ecx(value: int) -> bytes:
    return b"\xb9" + struct.pack("<I", value) + b"\xc3"


def made(maker: KernelMaker, folder: Path) -> Image:
    path = folder / "vmlinux"
    path.write_bytes(maker.build())
    return open_image(path)


def kernel(release: str, *code: bytes, bits: int = 64) -> KernelMaker:
    maker = KernelMaker(bits=bits, release=release)
    for part in code:
        maker.code(part)
    return maker


@pytest.mark.parametrize("form", [compare_eax, compare_edx, move_ecx])
@pytest.mark.parametrize(("value", "poison"), [(OLD, "660F1F00"), (NEW, "0F1F40D6")])
def test_the_poison_is_what_the_code_compares_with(form, value: int, poison: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = evidence.poison(made(kernel("6.12.118", form(value)), tmp_path))
    assert found is not None
    assert found["poison"] == poison


def test_the_same_bytes_as_an_instruction_are_no_evidence(tmp_path: Path) -> None:
    """Padding that a compiler writes looks like either; one stray immediate does not outvote the functions."""
    assert evidence.poison(made(kernel("6.12.118", bytes.fromhex("eb040f1f40d6c3")), tmp_path)) is None
    mixed = kernel("6.12.118", compare_eax(OLD), move_ecx(NEW), compare_eax(NEW), bytes.fromhex("660f1f00c3"))
    found = evidence.poison(made(mixed, tmp_path))
    assert found is not None
    assert found["poison"] == "0F1F40D6"


@pytest.mark.parametrize(
    ("tables", "bits", "name"),
    [
        ((P6,), 64, "p6"),
        ((P6_11,), 64, "p6-11"),
        ((GENERIC,), 32, "generic-atomic"),
        ((P6, K8), 64, None),  # several: the CPU decides
        ((GENERIC, K8), 32, None),
        ((P6_11, GENERIC), 64, "p6-11"),  # no 64-bit kernel has had the other
        ((), 64, None),
        ((P6[:20],), 64, None),
    ],
)  # fmt: skip
def test_the_nop_table_that_stands_in_the_data(
    tables: tuple[bytes, ...], bits: int, name: str | None, tmp_path: Path
) -> None:
    maker = kernel("6.12.118", b"\xc3", bits=bits)
    maker.data += b"\x11" * 24 + b"\x11".join(tables)
    assert evidence.nop_table(made(maker, tmp_path)) == name


RETURN0, WARN, UNLOCK = "2E2E2E31C0", "67480FB93A", "3E3EC60700"
FUNCTIONS = ("__static_call_return0", "__WARN_trap", "__raw_callee_save___native_queued_spin_unlock")


@pytest.mark.parametrize(
    ("release", "functions", "constants", "wanted"),
    [
        ("7.3.0", FUNCTIONS, (RETURN0, WARN, UNLOCK), {RETURN0, WARN, UNLOCK}),
        ("7.3.0", FUNCTIONS[:2], (RETURN0, WARN, UNLOCK), {RETURN0, WARN}),  # the function is not there
        ("7.3.0", FUNCTIONS, (RETURN0, WARN), {RETURN0, WARN}),  # its form is not
        ("6.1.0", FUNCTIONS, (RETURN0, WARN, UNLOCK), {RETURN0, WARN, UNLOCK}),  # a backport: bytes before version
        ("6.12.0", FUNCTIONS, (), {RETURN0, "66664831C0"}),  # nothing told: as old as the version
        ("6.19.0", FUNCTIONS, (), {RETURN0, "66664831C0", WARN}),
    ],
)  # fmt: skip
def test_forms_of_static_calls(
    release: str, functions: tuple[str, ...], constants: tuple[str, ...], wanted: set[str], tmp_path: Path
) -> None:
    maker = KernelMaker(bits=64, release=release)
    for name in functions:
        maker.code(b"\xc3" * 16, name)
    maker.data += b"\x11" + b"".join(map(bytes.fromhex, constants))
    assert {row["code"] for row in evidence.call_forms(made(maker, tmp_path))} == wanted


ALWAYS, HYPERVISOR = 3 * 32 + 21, 4 * 32 + 31


def asking(features: list[int], name: str, *, far: int = 0, release: str = "6.18.1") -> KernelMaker:
    """A kernel whose function ``name`` has one five-byte site for each feature."""
    maker = KernelMaker(bits=64, release=release)
    maker.code(b"\xc3" * 16, "before")
    sites = [maker.code(bytes(far) + bytes.fromhex("e900000000"), name) + far]
    sites += [maker.code(bytes.fromhex("e900000000")) for _ in features[1:]]
    maker.code(b"\xc3" * 16, "behind")
    maker.replacement(b"\x90" * 5)
    rows = [(site, 0xFFFFFFFFC1080000, feature, 5, 0, {}) for site, feature in zip(sites, features, strict=True)]
    maker.alternatives("rel14", rows)  # type: ignore[arg-type]
    return maker


@pytest.mark.parametrize(
    ("features", "name", "wanted"),
    [
        ([ALWAYS, 682], "its_init_mod", {"INDIRECT_THUNK_ITS": 682}),
        ([ALWAYS, 366], "cpu_wants_rethunk", {"RETHUNK": 366}),
        ([ALWAYS, 682, HYPERVISOR], "its_init_mod", {}),  # two features: which one?
        ([ALWAYS], "its_init_mod", {}),
        ([ALWAYS, 682], "another", {}),
    ],
)  # fmt: skip
def test_a_function_that_tests_one_feature_gives_its_bit_away(
    features: list[int], name: str, wanted: dict[str, int], tmp_path: Path
) -> None:
    image = made(asking(features, name), tmp_path)
    found = scan(image, ("altinstructions",))
    assert not found.findings
    assert evidence.feature_bits(image, found.sites) == wanted


def test_rules_are_settled_by_the_image_and_say_so(tmp_path: Path) -> None:
    """A kernel that calls itself 6.12 with the poison and the bit of 6.18, as a backport would make it."""
    maker = asking([ALWAYS, 682], "its_init_mod", release="6.12.118")
    maker.code(compare_eax(NEW))
    maker.data += P6_11
    maker.table(".ibt_endbr_seal", struct.pack("<i", 0xFFFFFFFFC1000000 - maker.next_table()))
    image = made(maker, tmp_path)
    found = scan(image, ("altinstructions",))
    rules, _ = choose(image.version, found.tables, image.path)
    settled = evidence.settle(image, rules, found.sites)
    assert rules.section("endbr")["poison"] == "660F1F00"
    assert settled.rules.section("endbr")["poison"] == "0F1F40D6"
    assert settled.rules.section("retpolines")["form"] == "prefixes"
    assert settled.rules.bit("INDIRECT_THUNK_ITS") == 682
    assert rules.bit("INDIRECT_THUNK_ITS") is None
    assert any("0F1F40D6" in line and rules.name in line for line in settled.told)
    assert any("21*32+10" in line for line in settled.told)
    assert not settled.warnings


def test_what_the_image_does_not_tell_is_named(tmp_path: Path) -> None:
    maker = kernel("6.12.118", bytes.fromhex("f30f1efac3"))
    here = maker.next_table()
    maker.table(".ibt_endbr_seal", struct.pack("<i", 0xFFFFFFFFC1000000 - here))
    image = made(maker, tmp_path)
    rules, _ = choose(image.version, (), image.path)
    settled = evidence.settle(image, rules, ())
    assert settled.rules.section("endbr") == rules.section("endbr")
    assert len(settled.warnings) == 1
    assert "ENDBR" in settled.warnings[0]
