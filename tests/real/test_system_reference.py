"""The system guest's ROM made again from its source, and its reference made again by Bochs 2.7."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from . import bochs

SYSTEM = Path(__file__).parent.parent / "emu" / "system"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def test_the_rom_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    need("as", "ld", "objcopy")
    guest, elf, rom = tmp_path / "guest.o", tmp_path / "guest.elf", tmp_path / "guest.rom"
    for command in (
        ["as", "--32", "-o", str(guest), "guest.S"],
        ["ld", "-m", "elf_i386", "-T", "guest.ld", "-o", str(elf), str(guest)],
        ["objcopy", "-O", "binary", str(elf), str(rom)],
    ):
        subprocess.run(command, cwd=SYSTEM, check=True)
    assert rom.read_bytes() == (SYSTEM / "guest.rom").read_bytes()


def test_bochs_prints_the_reference(tmp_path: Path) -> None:
    need("bochs")
    output = bochs.run((SYSTEM / "guest.rom").read_bytes(), tmp_path)
    if "term_gui" in output and "could not" in output.lower():
        pytest.skip("Bochs has no terminal display here (package bochs-term)")
    lines = [line.rsplit("\x1b", 1)[-1].partition("m")[2] if "\x1b" in line else line for line in output.splitlines()]
    found = [line.strip("\r") for line in lines if " vec=" in line]
    expected = (SYSTEM / "reference.txt").read_text().splitlines()
    assert len(found) == len(expected), output[-2000:]
    # The first line may follow terminal control on its line.
    assert [line[line.find("load ds") :] if i == 0 else line for i, line in enumerate(found)] == expected
