"""Our devices against QEMU's, register by register: the same random port accesses on both.

QEMU runs with its processor stopped and its ``qtest`` channel open, so nothing but the test touches the
devices and no time passes.  Where the two differ by design, the test keeps out of the way and says why:

* UART: QEMU's interrupt ignores OUT2 (a PC gates it: OUT2 stays set here), starts with OUT2 set, sets no modem
  status deltas in loop-back (the PC16550D data sheet does), and its character time-out needs time to pass.
* PIC: QEMU keeps a request whose line fell (Intel's data sheet: the line must stay until the acknowledge), and
  its non-specific EOI ends a masked level in special mask mode (the data sheet: it does not).
* DMA: QEMU has no page registers at 0x84-0x86, 0x88, 0x8C-0x8E (PIIX3 has), and reads back a mask register.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine

QEMU = "qemu-system-i386"
STEPS = 400


class Qemu:
    """QEMU's side of the comparison."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                QEMU, "-M", "pc", "-cpu", "pentium3", "-m", "64", "-accel", "tcg", "-S", "-qtest", "stdio",
                "-qtest-log", "/dev/null", "-display", "none", "-nodefaults", "-serial", "null",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def _ask(self, command: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("OK"):
            assert line.startswith("IRQ"), f"{command}: {line!r}"
        words = line.split()
        return int(words[1], 0) if len(words) > 1 else 0

    def port_read(self, port: int, size: int) -> int:
        return self._ask(f"in{'bwl'[size // 2]} {port:#x}")

    def port_write(self, port: int, size: int, value: int) -> None:
        self._ask(f"out{'bwl'[size // 2]} {port:#x} {value:#x}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Both:
    """Every access to both machines; reads are compared."""

    def __init__(self) -> None:
        self.qemu = Qemu()
        self.machine = Machine(BoardOptions(ram_bytes=64 << 20))
        self.log: list[str] = []

    def write(self, port: int, value: int, size: int = 1) -> None:
        self.log.append(f"out {port:#x} {value:#x}")
        self.qemu.port_write(port, size, value)
        self.machine.bus.port_write(port, size, value)

    def read(self, port: int, mask: int = 0xFFFFFFFF, size: int = 1) -> None:
        theirs = self.qemu.port_read(port, size) & mask
        ours = self.machine.bus.port_read(port, size) & mask
        self.log.append(f"in {port:#x} {ours:#x}")
        assert ours == theirs, f"port {port:#x}: ours {ours:#x}, QEMU {theirs:#x}, after {self.log[-12:]}"


@pytest.fixture
def both() -> Iterator[Both]:
    if shutil.which(QEMU) is None:
        pytest.skip(f"NOT TESTED: {QEMU} is not on this machine")
    pair = Both()
    yield pair
    pair.qemu.close()


@pytest.mark.parametrize("seed", range(5))
def test_uart(both: Both, seed: int) -> None:
    choose = random.Random(seed)
    both.write(0x3FB, 3)
    both.write(0x3FC, 8)
    for _ in range(STEPS):
        register, value = choose.choice([0, 1, 2, 3, 4, 7]), choose.randrange(256)
        if register == 1:
            value &= 7
        elif register == 2:
            value = value & 0x3E | choose.randrange(2)
        elif register == 3:
            value = value & 0x9F | 3
        elif register == 4:
            value = value & 0x1F | 8
        both.write(0x3F8 + register, value)
        for _ in range(3):
            register = choose.randrange(8)
            empty = not both.machine.board.uart.fifo and not both.machine.board.uart.lcr & 0x80
            if register == 0 and empty:
                continue  # what an empty receiver shows is not defined
            both.read(0x3F8 + register, 0xF0 if register == 6 else 0xFF)


@pytest.mark.parametrize("seed", range(5))
def test_pic(both: Both, seed: int) -> None:
    choose = random.Random(seed)
    for base, vector, third in ((0x20, 8, 4), (0xA0, 0x70, 2)):
        for port, value in ((base, 0x11), (base + 1, vector), (base + 1, third), (base + 1, 1)):
            both.write(port, value)
    both.write(0x3FC, 8)
    both.write(0x3F9, 2)
    both.write(0x64, 0xD2)
    both.write(0x60, choose.randrange(256))  # a byte in the keyboard buffer: IRQ 1 stays up
    for _ in range(STEPS):
        what = choose.random()
        base = choose.choice([0x20, 0xA0])
        level = choose.randrange(8)
        if what < 0.4:
            both.write(0x3F8, 65)  # a byte sent is a new edge of IRQ 4
        elif what < 0.6:
            both.write(base + 1, choose.choice([0, 0x10, 0xFF, choose.randrange(256)]))
        elif what < 0.85:
            both.write(base, choose.choice([0x20, 0x60 | level, 0xA0, 0xE0 | level, 0xC0 | level, 0x80, 0]))
        else:
            both.write(base, 0x0C)
            both.read(base)
        for port, lines in ((0x20, 0xFA), (0xA0, 0xFE)):  # less IRQ 0 and 8, which QEMU's timers drive
            both.write(port, 0x0A)
            both.read(port, lines)
            both.write(port, 0x0B)
            both.read(port)
            both.read(port + 1)


@pytest.mark.parametrize("seed", range(3))
def test_dma(both: Both, seed: int) -> None:
    choose = random.Random(seed)
    pages = [0x81, 0x82, 0x83, 0x87, 0x89, 0x8A, 0x8B, 0x8F]
    for _ in range(STEPS):
        port = choose.choice([*range(8), *range(0xC0, 0xD0, 2), *pages])
        if port in pages:
            both.write(port, choose.randrange(256))
            both.read(port)
            continue
        flip_flop = 0x0C if port < 8 else 0xD8
        both.write(flip_flop, 0)
        both.write(port, choose.randrange(256))
        both.write(port, choose.randrange(256))
        both.write(flip_flop, 0)
        both.read(port)
        both.read(port)


def test_host_bridge_and_power_management_registers(both: Both) -> None:
    for function in (0x80000000, 0x80000800, 0x80000B00):
        for offset in (0x00, 0x08, 0x0C):
            both.write(0xCF8, function | offset, 4)
            both.read(0xCFC, size=4)
    both.write(0xCF8, 0x80000058, 4)
    for value in (0, 0x33333030, 0xFFFFFF00, 0x11223300):
        both.write(0xCFC, value & 0x33333000, 4)
        both.read(0xCFC, 0xFFFFFF00, size=4)
    both.write(0xCF8, 0x80000072 & ~3, 4)
    both.read(0xCFE)
    both.write(0xCF8, 0x80000B40, 4)
    both.write(0xCFC, 0x601, 4)
    both.read(0xCFC, size=4)
    both.write(0xCF8, 0x80000B80, 4)
    both.write(0xCFC, 1)
    both.read(0x600, 0xFFFE, size=2)  # QEMU's timer status is set before the timer ever overflowed
    both.read(0x602, size=2)
    both.read(0x604, size=2)
    both.write(0x602, 0x0121, 2)
    both.read(0x602, size=2)
    both.write(0xB2, 0xF1)
    both.read(0x604, size=2)
    both.write(0xB2, 0xF0)
    both.read(0x604, size=2)


def test_ports_where_nothing_answers(both: Both) -> None:
    for port in (0x0100, 0x02E8, 0x0300, 0x1234, 0xC100, 0xFFFF):
        for size in (1, 2, 4):
            both.read(port, size=size)
