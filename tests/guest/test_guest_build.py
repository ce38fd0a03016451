"""The committed files are what the sources give: built again with the same tools, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from guestmachine import FOLDER, FORMS, elf

# No debug information, no local symbols: what is committed is small.
LARGEST = 100_000


def installed() -> list[str]:
    """What the tools of this machine call themselves, as toolchain.txt has it."""
    found = []
    for tool in ("gcc", "ld"):
        path = shutil.which(tool)
        done = subprocess.run([path, "--version"], text=True, capture_output=True, check=False) if path else None
        found.append(done.stdout.splitlines()[0] if done is not None and done.stdout else f"no {tool}")
    return found


def test_the_build_gives_the_same_bytes(tmp_path: Path) -> None:
    wanted = (FOLDER / "toolchain.txt").read_text().splitlines()
    if installed() != wanted or shutil.which("make") is None:
        pytest.skip(
            f"THE GUEST WAS NOT BUILT AGAIN: this machine has {installed()}, the files were made with {wanted}; "
            "tests/real/test_vmi_guest.py fetches those"
        )
    copy = tmp_path / "somewhere else"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("build", "*.elf"))
    done = subprocess.run(["make", "-C", str(copy), "-j2"], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for form in FORMS:
        assert (copy / elf(form).name).read_bytes() == elf(form).read_bytes(), form


@pytest.mark.parametrize("form", FORMS)
def test_the_files_are_small(form: str) -> None:
    assert elf(form).stat().st_size < LARGEST
