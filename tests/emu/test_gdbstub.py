"""The gdb stub, driven by a stock gdb, and its packets by hand."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent / "firmware"))

from guests import ENTRY, code, multiboot

from vmipatch.emu.firmware import boot
from vmipatch.emu.firmware.boot import BootOptions
from vmipatch.emu.gdbstub import REGISTERS, GdbServer, target_description
from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine

# loop: inc dword [0x5000]; mov eax, [0x5000]; cmp eax, 1000; jne loop; then soft-off
PROGRAM = (
    "mov esi, 0x5000; mov dword ptr [esi], 0; inc dword ptr [esi]; mov eax, dword ptr [esi]; cmp eax, 1000;"
    "jne 0x10002b; mov edx, 0x604; mov eax, 0x2000; out dx, ax"
)
LOOP = ENTRY + 11


def machine_for(program: str = PROGRAM) -> Machine:
    machine = Machine(BoardOptions(ram_bytes=4 << 20))
    boot.boot(machine, multiboot(code(program)), BootOptions(), "guest")
    return machine


class Served:
    """A server in a thread."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.server = GdbServer(machine, 0)
        self.outcome: object = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        self.outcome = self.server.serve()

    def gdb(self, *commands: str) -> str:
        if shutil.which("gdb") is None:
            pytest.skip("NOT TESTED: gdb is not on this machine")
        words = [
            "gdb",
            "-nx",
            "-batch",
            "-ex",
            "set architecture i386",
            "-ex",
            f"target remote localhost:{self.server.port}",
        ]
        for command in commands:
            words += ["-ex", command]
        run = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        self.thread.join(10)
        assert not self.thread.is_alive()
        return run.stdout + run.stderr


def test_loop_address_is_right() -> None:
    assert code("inc dword ptr [esi]", LOOP) == code(PROGRAM)[11:13]


def test_target_description_matches_the_registers() -> None:
    tree = ElementTree.fromstring(target_description().decode())
    described = [(reg.get("name"), int(reg.get("bitsize") or 0) // 8) for reg in tree.iter("reg")]
    assert described == list(REGISTERS)


def test_registers_memory_and_step() -> None:
    text = Served(machine_for()).gdb(
        "info registers eip eflags cs",
        "stepi",
        "stepi",
        "print/x $esi",
        "print/x $eip",
        "x/2xw 0x100000",
        "set *(int*)0x5000 = 998",
        "set $ecx = 0x1234",
        "print/x $ecx",
        "x/i $eip",
        "continue",
    )
    assert "eip            0x100020" in text
    assert "= 0x5000" in text
    assert f"= {LOOP:#x}" in text
    assert "0x1badb002\t0x00010000" in text
    assert "= 0x1234" in text
    assert "incl   (%esi)" in text or "inc    DWORD PTR" in text
    assert "exited normally" in text


def test_breakpoint_and_watchpoint() -> None:
    served = Served(machine_for())
    text = served.gdb(
        f"break *{LOOP:#x}",
        "continue",
        "print/x $eip",
        "continue",
        "x/dw 0x5000",
        "delete",
        "watch *(int*)0x5000",
        "continue",
        "delete",
        "continue",
    )
    assert f"= {LOOP:#x}" in text
    assert "0x5000:\t1" in text
    assert "Old value = 1" in text
    assert "New value = 2" in text
    assert "exited normally" in text
    assert getattr(served.outcome, "reason", "") == "poweroff"


class Wire:
    """The protocol by hand."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def send(self, payload: bytes) -> None:
        self.socket.sendall(b"$" + payload + b"#%02x" % (sum(payload) & 0xFF))

    def reply(self) -> bytes:
        data = b""
        while b"#" not in data or len(data.partition(b"#")[2]) < 2:
            data += self.socket.recv(4096)
        return data.lstrip(b"+-").partition(b"#")[0].removeprefix(b"$")

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.reply()


@pytest.fixture
def wire() -> Wire:
    served = Served(machine_for("inc eax; jmp 0x100020"))
    return Wire(served.server.port)


def test_interrupt_of_a_guest_that_loops(wire: Wire) -> None:
    wire.send(b"c")
    wire.socket.sendall(b"\x03")
    assert wire.reply().startswith(b"T02")
    assert int(wire.ask(b"p0")[:8], 16) != 0


def test_bad_packets(wire: Wire) -> None:
    wire.socket.sendall(b"junk$g#00")
    assert wire.socket.recv(1) == b"-"
    assert wire.ask(b"m") == b"E01"
    assert wire.ask(b"mzz,1") == b"E01"
    assert wire.ask(b"p999") == b"E01"
    assert wire.ask(b"M100,2:1") == b"E01"
    assert wire.ask(b"nonsense") == b""
    assert wire.ask(b"qXfer:features:read:target.xml:0,20").startswith(b"m<?xml")
    assert wire.ask(b"m100020,2") == b"40eb"
    assert wire.ask(b"M5000,3:414243") == b"OK"
    assert wire.ask(b"m5000,3") == b"414243"
    assert wire.ask(b"X5000,2:}\x03}\x04") == b"OK"
    assert wire.ask(b"m5000,3") == b"232443"
    assert len(wire.ask(b"g")) == 2 * sum(size for _, size in REGISTERS)
    wire.send(b"k")
