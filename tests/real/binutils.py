"""objdump, this machine's and a newer one: what it takes for instructions.

The newer one is Debian sid's, unpacked beside with the libraries that it needs and run by their own loader: nothing is
installed.  Imports packages (this folder) only; what is disassembled is an ELF file that the caller names.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .packages import fetch

_PARTS = ("libbinutils", "libctf0", r"libsframe\d+", "libc6", "zlib1g", r"libzstd1")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Objdump:
    """A command that is objdump, and its version as a pair of numbers."""

    command: tuple[str, ...]
    version: tuple[int, int]


@cache
def installed() -> Objdump:
    """This machine's."""
    return _told(("objdump",))


@cache
def newest() -> Objdump:
    """Debian sid's. Raises packages.RegistryAway."""
    libraries = [fetch(name, "amd64", "sid") / _LIBRARIES for name in _PARTS]
    loader = next(folder / "ld-linux-x86-64.so.2" for folder in libraries if (folder / "libc.so.6").exists())
    program = fetch("binutils-x86-64-linux-gnu", "amd64", "sid") / "usr/bin/x86_64-linux-gnu-objdump"
    return _told((str(loader), "--library-path", ":".join(map(str, libraries)), str(program)))


def _told(command: tuple[str, ...]) -> Objdump:
    out = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", out.splitlines()[0])
    assert match is not None, out
    return Objdump(command, (int(match[1]), int(match[2])))


def disassemble(objdump: Objdump, path: Path) -> Iterator[tuple[int, str]]:
    """Every instruction of a file's code: its virtual address, and the rest of the line as objdump prints it."""
    command = [*objdump.command, "-d", "-z", "-w", "--no-show-raw-insn", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            head, colon, text = line.partition(":\t")
            if colon:
                yield int(head, 16), text
    assert process.returncode == 0
