"""The pytest plugin, used as a stranger's tests would use it; and what its asserts say of a wrong image."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.testing import assert_patched_like, assert_sites

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "regression-tests"
XMM2, LOCK, ALTERNATIVE = 26, 0xC1000010, 0xC1000020


def kernel(path: Path, *, locks: int = 2, feature: int = XMM2) -> Path:
    """A kernel with some locks and one alternative of five bytes, all at known places."""
    maker = KernelMaker(bits=32, release="6.1.0")
    maker.code(b"\x90" * 16)
    first = maker.code(b"\xf0\xff\x00" * 4 + b"\xc3" + b"\x90" * 3, "first")
    site = maker.code(bytes.fromhex("F083042400") + b"\xc3", "second")
    assert (first, site) == (LOCK, ALTERNATIVE)
    fence = maker.replacement(b"\x0f\xae\xf0")
    maker.locks("rel32", [first + 3 * i for i in range(locks)])
    maker.alternatives("rel12", [(site, fence, feature, 5, 3, {})])
    path.write_bytes(maker.build())
    return path


def patched(image: Path, out: Path, cpus: int = 1) -> Path:
    words = ["patch", image, "-o", out, "--cpu", "pentium3", "--cpus", cpus]
    subprocess.run([sys.executable, "-m", "vmipatch", *map(str, words)], check=True, capture_output=True)
    return out


@pytest.fixture
def example(pytester: pytest.Pytester) -> Path:
    """The example of examples/, with a kernel beside it."""
    shutil.copytree(EXAMPLE, pytester.path, dirs_exist_ok=True)
    kernel(pytester.path / "vmlinux")
    return pytester.path


def test_the_example(pytester: pytest.Pytester, example: Path) -> None:
    new = pytester.runpytest_subprocess()
    new.assert_outcomes(passed=2, failed=2)
    new.stdout.fnmatch_lines(["*no snapshot at *run pytest once with --vmi-update*"])
    pytester.runpytest_subprocess("--vmi-update").assert_outcomes(passed=4)
    kept = sorted(p.relative_to(example).as_posix() for p in example.glob("snapshots/**/*.json"))
    assert kept == [
        "snapshots/test_kernel/test_the_site_table_is_the_one_that_was_reviewed.json",
        "snapshots/test_kernel/test_what_boot_will_write_on_one_cpu-pentium3.json",
    ]
    pytester.runpytest_subprocess().assert_outcomes(passed=4)
    # One lock less: the first row that differs is named, with its bytes and its instruction.
    kernel(example / "vmlinux", locks=1)
    fewer = pytester.runpytest_subprocess()
    fewer.assert_outcomes(passed=2, failed=2)
    fewer.stdout.fnmatch_lines(
        ["*1 rows differ; the first: 0xc1000013 first+0x3, smp_locks lock", "*kept*f0*", "*now*(none)"]
    )
    # Elsewhere, and by another name, it is the same kernel.
    kernel(example / "vmlinux")
    (example / "vmlinux").rename(example / "other")
    pytester.runpytest_subprocess("--vmi-image", "other").assert_outcomes(passed=4)


def test_images_by_marker_option_and_ini(pytester: pytest.Pytester) -> None:
    kernel(pytester.path / "a")
    kernel(pytester.path / "b", locks=1)
    kernel(pytester.path / "c", locks=3)
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.mark.vmi_image("a")
        def test_marked(vmi_image, assert_sites):
            assert_sites(vmi_image, "smp_locks", count=2)

        def test_option(vmi_image, assert_sites):
            assert_sites(vmi_image, "smp_locks", count=1)

        def test_ini(vmi_image, assert_sites):
            assert_sites(vmi_image, "smp_locks", count=3)

        @pytest.mark.vmi_image("nowhere")
        def test_away(vmi_image):
            pass

        @pytest.mark.vmi_image
        def test_nameless(vmi_image):
            pass
        """
    )
    strict = ("--strict-markers", "-W", "error")
    pytester.runpytest_subprocess(*strict, "--vmi-image", "b", "-k", "marked or option").assert_outcomes(passed=2)
    pytester.runpytest_subprocess(*strict, "-o", "vmi_image=c", "-k", "marked or ini").assert_outcomes(passed=2)
    none = pytester.runpytest_subprocess(*strict, "-k", "option or away or nameless")
    none.assert_outcomes(errors=3)
    none.stdout.fnmatch_lines(["*no kernel image is named*--vmi-image*", "*no kernel image at*nowhere*", "*one path*"])
    none.stdout.no_fnmatch_line("*Traceback*")


def test_sites_that_are_not_as_expected(tmp_path: Path) -> None:
    image = kernel(tmp_path / "vmlinux")
    assert len(assert_sites(image, "smp_locks", count=2, at_least=2, ops=["lock"], addresses=[LOCK, LOCK + 3])) == 2
    assert_sites(image, "smp_locks", ops={"lock": 2})
    for wrong, says in (
        ({"count": 3}, "2 sites, expected 3"),
        ({"at_least": 3}, "2 sites, expected at least 3"),
        ({"ops": ["unlock"]}, r"lock: 2 sites, not expected; the first: 0xc1000010 first\+0x0\n  unlock: no site"),
        ({"ops": {"lock": 1}}, "lock: 2 sites, expected 1"),
        ({"addresses": [LOCK, LOCK + 6]}, r"no site at 1 of 2 addresses\n  0xc1000016 first\+0x6"),
    ):
        with pytest.raises(AssertionError, match=says):
            assert_sites(image, "smp_locks", **wrong)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="2 sites, expected 0"):
        assert_sites(image, "smp_locks", count=0)


def test_patched_like(tmp_path: Path) -> None:
    image = kernel(tmp_path / "vmlinux")
    out = patched(image, tmp_path / "out")
    assert_patched_like(image, out, cpu="pentium3")
    with pytest.raises(AssertionError) as caught:
        assert_patched_like(image, out, cpu="pentium3", cpus=2)
    text = str(caught.value).splitlines()
    assert text[0].endswith("2 bytes are not as expected; the first:")
    assert text[1] == "  0xc1000010 first+0x0, smp_locks lock"
    assert text[2].split() == ["original", "f0", "lock", "inc", "dword", "ptr", "[eax]"]
    assert text[3].split()[:2] == ["found", "3e"]
    assert text[4].split()[:3] == ["expected", "f0", "lock"]


def test_a_byte_outside_all_sites_is_found(tmp_path: Path) -> None:
    image = kernel(tmp_path / "vmlinux")
    out = patched(image, tmp_path / "out")
    data = bytearray(out.read_bytes())
    at = data.index(b"\xc3\x90\x90\x90")
    data[at] = 0xCC
    out.write_bytes(data)
    with pytest.raises(AssertionError, match=r"1 bytes are not as expected(.|\n)*0xc100001c first\+0xc, in no site"):
        assert_patched_like(image, out, cpu="pentium3")
    out.write_bytes(data + b"\0")
    with pytest.raises(AssertionError, match=r"bytes, .* has"):
        assert_patched_like(image, out, cpu="pentium3")


def test_who_does_not_use_it_does_not_pay(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_nothing_heavy():
            heavy = {"capstone", "elftools", "keystone", "lief", "typer", "vmipatch.image", "vmipatch.patch"}
            assert "vmipatch.pytest_plugin" in sys.modules
            assert not heavy & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:xdist").assert_outcomes(passed=1)
