"""``vmipatch run`` and a hypervisor that the guest cannot or does not reach: one line, and the exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pagedguest import rom

from vmipatch.validate.demonstration import guest

OPTION_ROM = b"\x55\xaa\x01\xcb" + bytes(507) + b"\x35"  # RETF, and the byte that makes the sum 0


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmipatch", "run", guest("mainline"), "--memory", "32", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("image", "hypervisor", "line"),
    [
        (None, "xen", "a guest reaches xen through its ROM: give --rom"),
        (("xen", "vmi-3.0"), "kvm", "made for xen, not for kvm"),
        (("xen", "vmi-3.0"), "zen", "no hypervisor named 'zen'"),
        (OPTION_ROM, "vmware", "no VMI ROM: a guest does not find vmware through it"),
    ],
)
def test_wrong_use(image: bytes | tuple[str, str] | None, hypervisor: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "rom"
    arguments: list[object] = ["--hypervisor", hypervisor]
    if image is not None:
        file.write_bytes(image if isinstance(image, bytes) else rom(*image).data)
        arguments += ["--rom", file]
    done = run(*arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("abi", "limit", "status"), [("vmi-13.0", (), 1), ("vmi-3.0", (), 0), ("vmi-13.0", (10**6,), 0)]
)
def test_a_hypervisor_that_is_never_called(abi: str, limit: tuple[int, ...], status: int, tmp_path: Path) -> None:
    """A mainline kernel takes 3.0 only: it runs natively, and that is not what was asked for."""
    file = tmp_path / "rom"
    file.write_bytes(rom("lguest", abi).data)
    extra = [word for n in limit for word in ("--max-instructions", n)]
    done = run("--rom", file, "--hypervisor", "lguest", *extra)
    assert done.returncode == status, done.stderr
    assert ("lguest was never started" in done.stderr) == (abi == "vmi-13.0")
    assert limit or "vmi-guest: done" in done.stdout


def test_a_rom_without_its_hypervisor(tmp_path: Path) -> None:
    """On the bare machine the ROM says no and the kernel stays native, as it would there."""
    file = tmp_path / "rom"
    file.write_bytes(rom("xen", "vmi-3.0").data)
    done = run("--rom", file)
    assert done.returncode == 0, done.stderr
    assert "this ROM is for xen, and nothing stands by as it: see --hypervisor" in done.stderr
