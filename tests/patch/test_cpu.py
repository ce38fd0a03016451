"""The CPU to patch for: features files, and the models of specs/cpus/.

The words here were read out of running Debian kernels under QEMU 7.2 (TCG),
apart from the ones that the specs were written from where it says so.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmipatch import facts
from vmipatch.annotate.features import numbers
from vmipatch.errors import UsageError
from vmipatch.patch import cpu

WORDS = "078bfbfd 00100000 00000000 02640140\n80982201 00000000 00000001 80082000 00000000\n"
HT, CMP_LEGACY, UP = 28, 6 * 32 + 1, 3 * 32 + 9


def features(path: Path, text: str) -> cpu.Cpu:
    file = path / "features.txt"
    file.write_text(text)
    return cpu.from_features(file)


def refusal(path: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        features(path, text)
    message = str(caught.value)
    assert str(path / "features.txt") in message
    assert "\n" not in message
    return message


# Features files


def test_words_and_identity(tmp_path: Path) -> None:
    text = f"# vendor=GenuineIntel family=6 model=26 stepping=3\n# Nehalem\n{WORDS} 0xFFFFFFFF # the last\n"
    found = features(tmp_path, text)
    assert found.words[:4] == (0x078BFBFD, 0x00100000, 0, 0x02640140)
    assert len(found.words) == 10
    assert found.words[9] == 0xFFFFFFFF
    assert (found.vendor, found.family, found.model, found.stepping) == ("GenuineIntel", 6, 26, 3)
    assert found.complete
    assert found.file == str(tmp_path / "features.txt")


def test_without_identity(tmp_path: Path) -> None:
    found = features(tmp_path, WORDS)
    assert (found.vendor, found.family, found.model, found.stepping) == (None, None, None, None)


def test_has(tmp_path: Path) -> None:
    found = features(tmp_path, WORDS)
    assert [found.has(bit) for bit in (0, 1, 2, 31, 32 + 20, 32 + 21)] == [True, False, True, False, True, False]
    assert found.has(8 * 32) is False
    assert found.has(9 * 32) is False  # beyond the words
    assert found.has(10**9) is False


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("00000001\n12345678g\n", 2, "hexadecimal"),
        ("00000001\n\n123456789\n", 3, "hexadecimal"),
        ("-1\n", 1, "hexadecimal"),
        ("0x\n", 1, "hexadecimal"),
        ("flags : fpu vme de pse\n", 1, "hexadecimal"),
        ("1\n" * 65, 65, "64"),
        ("1\n# family=six\n", 2, "family=six"),
        ("1\n# model=0x1a\n", 2, "model=0x1a"),
        ("# family=6\n1\n# family=15\n", 3, "family=15"),
        ("# vendor=GenuineIntel\n1 # vendor=AuthenticAMD\n", 2, "vendor=AuthenticAMD"),
    ],
)
def test_junk_is_named_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    message = refusal(tmp_path, text)
    assert f"features.txt:{line}:" in message
    assert says in message


@pytest.mark.parametrize("text", ["", "\n \n", "# vendor=GenuineIntel\n"])
def test_no_words(tmp_path: Path, text: str) -> None:
    assert "no feature words" in refusal(tmp_path, text)


def test_a_file_that_is_no_features_file(tmp_path: Path) -> None:
    assert "65536" in refusal(tmp_path, "0 " * 40000)
    file = tmp_path / "vmlinux"
    file.write_bytes(b"\x7fELF\x01\x01\xff\xfe")
    for path in (file, tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=re.escape(str(path))):
            cpu.from_features(path)
    with pytest.raises(UsageError, match="/dev/zero"):
        cpu.from_features(Path("/dev/zero"))


def test_a_wrong_number_of_words_names_file_and_both_counts(tmp_path: Path) -> None:
    found = features(tmp_path, WORDS)
    found.require_words(9)
    found.require_words(8, 10)
    for least, most, wanted in ((24, None, "24"), (10, 12, "10 to 12"), (7, 8, "7 to 8"), (8, None, "8")):
        with pytest.raises(UsageError) as caught:
            found.require_words(least, most)
        message = str(caught.value)
        assert re.search(rf"features\.txt: 9 feature words, .* {wanted}$", message)
    with pytest.raises(UsageError, match="486: 7 feature words"):
        cpu.from_spec("486", (2, 6, 20)).require_words(9)


# Flavours


@pytest.mark.parametrize(
    ("release", "flavour"),
    [
        ("6.1.0-50-686", "686"),
        ("6.1.0-50-686-pae", "686-pae"),
        ("6.1.0-56-amd64", "amd64"),
        ("6.1.0-47-cloud-amd64", "cloud-amd64"),
        ("5.10.0-32-686-pae", "686-pae"),
        ("6.12.117+deb13-amd64", "amd64"),
        ("2.6.32-5-686-bigmem", "686-bigmem"),
        ("2.6.26-2-486", "486"),
        ("5.15.0-91-generic", "generic"),
        ("6.1.55", None),
        ("6.1.0-50", None),
    ],
)
def test_flavour(release: str, flavour: str | None) -> None:
    assert cpu.flavour(f"Linux version {release} (debian-kernel@lists.debian.org) (gcc-12 …) #1 SMP") == flavour


def test_flavour_of_nothing() -> None:
    assert cpu.flavour(None) is None
    assert cpu.flavour("FreeBSD 14.0-RELEASE-amd64") is None


# Models


def test_unknown_model_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'Pentium9'.*Nehalem.*pentium3"):
        cpu.from_spec("Pentium9", (6, 1, 0))


# The first eight words with two CPUs: captures apart from those in the specs.
TWO_CPUS = [
    ("athlon", (6, 1, 176), "686", "1783fbfd c1c3f3fd 00000000 02240000 80000000 00000000 00000102 00082000"),
    ("qemu64", (6, 1, 176), "686", "178bfbfd 0193f3fd 00000000 06250010 80002001 00000000 00000007 00082000"),
    ("qemu64", (6, 1, 192), "amd64", "178bfbfd 2193fbfd 00000000 06354010 80002001 00000000 00000107 00082000"),
    ("Skylake-Client", (6, 1, 192), "amd64", "178bfbfd 28100800 00000000 02758100 fed83203 00000000 00000021 a0082800"),
    ("EPYC", (6, 1, 192), "amd64", "178bfbfd 2dd3fbfd 00000000 06354010 fed8320b 00000000 00000177 110a2000"),
    ("qemu32", (5, 10, 223), "686-pae", "1780abfd 00000000 00000000 02240040 80000001 00000000 00000000 a0082800"),
    ("Nehalem", (6, 1, 176), "686-pae", "178bfbfd 00100000 00000000 02640140 80982201 00000000 00000001 a0082800"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "release", "flavour", "words"), TWO_CPUS)
def test_measured_words_with_two_cpus(name: str, release: tuple[int, ...], flavour: str, words: str) -> None:
    bits = 64 if flavour == "amd64" else 32
    found = cpu.from_spec(name, release, bits=bits, flavour=flavour, cpus=2)
    assert found.complete
    assert found.words[:8] == tuple(int(word, 16) for word in words.split())
    one = cpu.from_spec(name, release, bits=bits, flavour=flavour)
    assert not one.has(HT)
    assert not one.has(CMP_LEGACY)
    assert one.words[8:] == found.words[8:]


@pytest.mark.parametrize(
    ("flavour", "release", "count"),
    [
        ("686", (6, 1, 176), 24),
        ("amd64", (6, 1, 192), 24),
        ("5.10", (5, 10, 223), 24),
        ("5.10-amd64", (5, 10, 262), 25),
    ],
)
def test_number_of_measured_words(flavour: str, release: tuple[int, ...], count: int) -> None:
    """NCAPINTS + NBUGINTS of the kernels' headers: 22 + 2 in 6.1, 23 + 2 in 5.10.262."""
    name = "686" if flavour == "5.10" else flavour.removeprefix("5.10-")
    found = cpu.from_spec("Nehalem", release, bits=64 if "64" in flavour else 32, flavour=name)
    assert found.complete
    assert len(found.words) == count


def test_another_update_of_the_series_is_not_called_measured() -> None:
    exact = cpu.from_spec("pentium3", (6, 1, 176), flavour="686")
    near = cpu.from_spec("pentium3", (6, 1, 190), flavour="686")
    assert exact.complete
    assert not near.complete
    assert near.words == exact.words


def test_identity() -> None:
    found = cpu.from_spec("core2duo", (6, 1, 176), flavour="686")
    assert (found.vendor, found.family, found.model, found.stepping) == ("GenuineIntel", 6, 15, 11)
    found = cpu.from_spec("EPYC", None)
    assert (found.vendor, found.family, found.model, found.stepping) == ("AuthenticAMD", 0x17, 1, 2)


# Kernels for which nothing was measured: what x86_capability of 2.6.32 says by its own rules, by hand.


@pytest.mark.parametrize(
    ("name", "bits", "on", "off"),
    [
        ("pentium3", 32, {"P3", "XMM", "CMOV", "UP"}, {"P4", "K7", "K8", "NOPL", "ALWAYS", "XMM2", "HT"}),
        ("athlon", 32, {"K7", "3DNOW", "MMXEXT", "UP"}, {"P3", "P4", "K8", "NOPL"}),
        ("qemu64", 32, {"K8", "XMM2", "UP"}, {"P3", "P4", "K7", "REP_GOOD"}),
        ("qemu64", 64, {"K8", "NOPL", "REP_GOOD", "SYSCALL32", "LM"}, {"P3", "SYSENTER32"}),
        ("Nehalem", 64, {"NOPL", "REP_GOOD", "SYSENTER32", "XMM4_2"}, {"P3", "K8", "SYSCALL32"}),
        ("486", 32, {"FPU", "UP"}, {"TSC", "CX8", "CMOV", "P3", "P4"}),
        ("pentium", 32, {"TSC", "CX8", "MMX"}, {"CMOV", "SEP", "P3"}),
    ],
)
def test_computed_words(name: str, bits: int, on: set[str], off: set[str]) -> None:
    found = cpu.from_spec(name, (2, 6, 32), bits=bits)
    assert not found.complete
    known = numbers()
    assert {feature for feature in on | off if found.has(known[feature])} == on


def test_computed_words_change_with_the_release_and_the_cpus() -> None:
    always, cpuid = 3 * 32 + 21, 3 * 32 + 25
    for release, on in (((3, 6, 0), set()), ((3, 16, 7), {always}), ((4, 19, 9), {always, cpuid})):
        found = cpu.from_spec("pentium3", release)
        assert {bit for bit in (always, cpuid) if found.has(bit)} == on
    assert cpu.from_spec("athlon", (3, 6, 0)).has(UP)
    assert not cpu.from_spec("athlon", (3, 7, 0)).has(UP)
    two = cpu.from_spec("athlon", (3, 6, 0), cpus=2)
    assert (two.has(UP), two.has(HT), two.has(CMP_LEGACY)) == (False, True, True)
    two = cpu.from_spec("pentium3", (3, 6, 0), cpus=2)
    assert (two.has(UP), two.has(HT), two.has(CMP_LEGACY)) == (False, True, False)


@pytest.mark.parametrize(
    # NCAPINTS of asm-i386/cpufeature.h, asm-x86/cpufeature.h or asm/cpufeature.h in these releases.
    ("release", "count"),
    [
        ((2, 6, 16), 7),
        ((2, 6, 20), 7),
        ((2, 6, 24), 8),
        ((2, 6, 27), 8),
        ((2, 6, 28), 9),
        ((2, 6, 32), 9),
        ((3, 2, 0), 10),
    ],
)
def test_computed_words_are_as_many_as_the_kernel_has(release: tuple[int, ...], count: int) -> None:
    assert len(cpu.from_spec("core2duo", release).words) == count


def test_rules_agree_with_every_measured_kernel() -> None:
    """The bits of word 3 that follow from identity are those that running kernels had."""
    rules = facts.load("isa", "features")["synthetic"]
    checked = 0
    for name in facts.names("cpus"):
        for kernel, row in facts.load("cpus", name).get("measured", {}).items():
            bits = 64 if kernel.endswith("amd64") else 32
            release = tuple(map(int, row["release"].split(".")))
            measured = [int(word, 16) for word in row["words"].split()]
            computed = cpu.from_spec(name, release, bits=bits)
            assert not computed.complete
            # What a bit means after its last release is not decided by the rule.
            decided = sum(
                {1 << r["bit"][1] for r in rules if release < tuple(map(int, r.get("until", "99").split(".")))}
            )
            assert computed.words[3] & decided == measured[3] & decided, (name, kernel)
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("name", facts.names("cpus"))
def test_spec(name: str) -> None:
    spec = facts.load("cpus", name)
    assert set(spec["features"]) <= numbers().keys()
    assert len(set(spec["features"])) == len(spec["features"])
    for kernel, row in spec.get("measured", {}).items():
        assert row["release"].startswith(kernel.split("-")[0] + ".")
        assert re.fullmatch(r"linux-image-\S+ \S+", row["package"])
        words = [int(word, 16) for word in row["words"].split()]
        assert 20 <= len(words) <= 28
        assert words[0] & 1
        assert not words[0] >> HT & 1
