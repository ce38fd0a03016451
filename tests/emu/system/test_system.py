"""Every case of the system guest, on our emulator, against what Bochs 2.7 printed for the same ROM.

``guest.S`` and ``cases.S`` are the guest, ``guest.rom`` what they assemble to, and
``reference.txt`` is Bochs's output, line for line; tests/real/test_system_reference.py
makes both again and compares.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REFERENCE = (HERE / "reference.txt").read_text().splitlines()


@cache
def printed() -> dict[str, str]:
    """What our emulator prints, by the name of the case."""
    command = [sys.executable, "-m", "vmipatch", "run", str(HERE / "guest.rom"), "--boot", "bios"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    lines = [line for line in done.stderr.splitlines() if " vec=" in line]
    assert "end of cases" in done.stderr, f"the guest stopped after {len(lines)} cases:\n{done.stderr[-2000:]}"
    return {name_of(line): line for line in lines}


def name_of(line: str) -> str:
    """The case's own name, in front of what happened."""
    return line.partition(" vec=")[0]


def test_there_are_as_many_cases_as_the_reference_has() -> None:
    assert len(REFERENCE) >= 150
    assert len({name_of(line) for line in REFERENCE}) == len(REFERENCE)
    assert set(printed()) == {name_of(line) for line in REFERENCE}


@pytest.mark.parametrize("line", REFERENCE, ids=[name_of(line) for line in REFERENCE])
def test_case(line: str) -> None:
    assert printed()[name_of(line)] == line
