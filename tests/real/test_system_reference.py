"""The system guest's ROM made again from its source, and its reference made again by Bochs 2.7."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SYSTEM = Path(__file__).parent.parent / "emu" / "system"

CONFIGURATION = """\
megs: 16
romimage: file={rom}, address=0xffff0000
vgaromimage: file={vga}
vga: extension=none
port_e9_hack: enabled=1
display_library: term
cpu: model=p3_katmai, ips=50000000
speaker: enabled=0
plugin_ctrl: speaker=0, gameport=0, parallel=0, e1000=0
log: {log}
panic: action=fatal
clock: sync=none
boot: disk
"""


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
    shutil.copy(SYSTEM / "guest.rom", tmp_path / "guest.rom")
    vga = bytearray(b"\x55\xaa\x04\xcb" + bytes(2044))  # Bochs wants a VGA BIOS: one that only returns
    vga[-1] = -sum(vga) & 0xFF
    (tmp_path / "vga.rom").write_bytes(vga)
    settings = CONFIGURATION.format(rom=tmp_path / "guest.rom", vga=tmp_path / "vga.rom", log=tmp_path / "log")
    (tmp_path / "bochsrc").write_text(settings)
    (tmp_path / "commands").write_text("c\nquit\n")
    output = on_a_terminal(["bochs", "-q", "-f", "bochsrc", "-rc", "commands"], tmp_path)
    if "term_gui" in output and "could not" in output.lower():
        pytest.skip("Bochs has no terminal display here (package bochs-term)")
    lines = [line.rsplit("\x1b", 1)[-1].partition("m")[2] if "\x1b" in line else line for line in output.splitlines()]
    found = [line.strip("\r") for line in lines if " vec=" in line]
    expected = (SYSTEM / "reference.txt").read_text().splitlines()
    assert len(found) == len(expected), output[-2000:]
    # The first line may follow terminal control on its line.
    assert [line[line.find("load ds") :] if i == 0 else line for i, line in enumerate(found)] == expected


def on_a_terminal(command: list[str], folder: Path, limit: float = 120.0) -> str:
    """Run a program that wants a terminal; everything that it prints."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    output, end = b"", time.monotonic() + limit
    while time.monotonic() < end:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side is closed: the program has ended
            break
        if not piece:
            break
        output += piece
    process.kill()
    process.wait()
    os.close(ours)
    return output.decode("latin-1")
