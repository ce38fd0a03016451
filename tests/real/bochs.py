"""Runs a BIOS image in Bochs 2.7 without a display. Imports the standard library only."""

from __future__ import annotations

import os
import pty
import subprocess
import time
from pathlib import Path

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


def run(rom: bytes, folder: Path, limit: float = 120.0) -> str:
    """A 64 KiB BIOS image, until it writes "Shutdown" to port 0x8900 or ``limit`` seconds are over.

    Returns everything that was printed, the guest's port 0xE9 among it; `folder` takes Bochs's files.
    """
    (folder / "guest.rom").write_bytes(rom)
    vga = bytearray(b"\x55\xaa\x04\xcb" + bytes(2044))  # Bochs wants a VGA BIOS: one that only returns
    vga[-1] = -sum(vga) & 0xFF
    (folder / "vga.rom").write_bytes(vga)
    settings = CONFIGURATION.format(rom=folder / "guest.rom", vga=folder / "vga.rom", log=folder / "log")
    (folder / "bochsrc").write_text(settings)
    (folder / "commands").write_text("c\nquit\n")
    return on_a_terminal(["bochs", "-q", "-f", "bochsrc", "-rc", "commands"], folder, limit)


def on_a_terminal(command: list[str], folder: Path, limit: float) -> str:
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
