"""Boot a kernel in QEMU (TCG), wait for a line on its console, read its memory.

The oracle of the patcher: what a running kernel has made of its own text. Uses the standard library and QEMU's
QMP protocol; knows nothing of the package under test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .initramfs import REACHED
from .vmlinux import Vmlinux

VENDORS = (b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine")


class BootFailure(Exception):
    """The guest ended or fell silent before the awaited line; the message carries the end of its console."""


@dataclass(frozen=True)
class Machine:
    """What QEMU is asked to be."""

    kernel: Path  # a bzImage, or an ELF with a PVH note
    initrd: Path  # an initramfs; on the board microvm an ext4 file system, whose /init is run
    bits: int
    cpu: str
    cpus: int = 1
    append: str = ""
    memory: int = 256  # MiB
    kaslr: bool = False  # let the kernel choose where it goes
    boot_timeout: float = 240.0  # seconds; TCG on a busy machine is slow, a dead kernel ends QEMU by itself
    board: str = "pc"  # or microvm

    def command(self, qmp: Path) -> list[str]:
        program = "qemu-system-i386" if self.bits == 32 else "qemu-system-x86_64"
        # panic=-1 and -no-reboot: a panic or a triple fault ends QEMU at once.
        placed = "" if self.kaslr else "nokaslr "
        append = f"{placed}panic=-1 {self.append}".strip()
        return [
            *(program, "-accel", "tcg", "-cpu", self.cpu, "-smp", str(self.cpus), "-m", str(self.memory)),
            *("-kernel", str(self.kernel), *(self._pc(append) if self.board == "pc" else self._microvm(append))),
            *("-display", "none", "-no-reboot", "-qmp", f"unix:{qmp},server=on,wait=off", "-monitor", "none"),
        ]

    def _pc(self, append: str) -> list[str]:
        return [
            *("-initrd", str(self.initrd), "-append", f"console=ttyS0 {append}"),
            *("-vga", "none", "-net", "none", "-serial", "stdio"),
        ]

    def _microvm(self, append: str) -> list[str]:
        # Without ACPI QEMU names the virtio-mmio devices on the command line, for kernels that have no ACPI either.
        return [
            *("-machine", "microvm,acpi=off,isa-serial=off", "-nodefaults", "-serial", "none"),
            *("-append", f"console=hvc0 root=/dev/vda init=/init {append}"),
            *("-chardev", "stdio,id=console", "-device", "virtio-serial-device"),
            *("-device", "virtconsole,chardev=console"),
            *("-drive", f"id=root,file={self.initrd},format=raw,if=none,readonly=on"),
            *("-device", "virtio-blk-device,drive=root"),
        ]


class Guest:
    """A running QEMU. Made by `boot`."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._folder = folder
        self._console = bytearray()
        self._grown = threading.Condition()
        qmp = folder / "qmp"
        command = machine.command(qmp)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()
        self._monitor = _Monitor(qmp, self._process)

    def _read_console(self) -> None:
        assert self._process.stdout is not None
        while chunk := os.read(self._process.stdout.fileno(), 4096):
            with self._grown:
                self._console += chunk
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    @property
    def console(self) -> str:
        with self._grown:
            return self._console.decode("latin-1").replace("\r\n", "\n")

    def wait_for(self, text: str, timeout: float | None = None) -> None:
        """Return when `text` stands on the console. Raises BootFailure."""
        deadline = time.monotonic() + (self.machine.boot_timeout if timeout is None else timeout)
        wanted = text.encode()
        with self._grown:
            while wanted not in self._console:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._reader.is_alive():
                    break
                self._grown.wait(min(remaining, 1.0))
            if wanted in self._console:
                return
        self._reader.join(0.5)
        ended = "QEMU ended" if self._process.poll() is not None else "nothing more came"
        tail = self.console[-1500:]
        raise BootFailure(f"{text!r} did not come on the console, {ended}; the console's end:\n{tail}")

    def send_line(self) -> None:
        """Press Enter on the serial console."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def ended(self, timeout: float) -> bool:
        """Whether QEMU ends (the guest powered off) within `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Halt the virtual CPUs; memory stays readable."""
        self._monitor.execute("stop")

    def resume(self) -> None:
        self._monitor.execute("cont")

    def physical(self, address: int, length: int) -> bytes:
        """Guest memory at a physical address, through the monitor's pmemsave."""
        target = self._folder / "memory"
        self._monitor.execute("pmemsave", val=address, size=length, filename=str(target))
        data = target.read_bytes()
        target.unlink()
        return data

    def dump(self, target: Path, *, paging: bool = False, form: str = "elf") -> None:
        """The whole memory; with `paging` by virtual address, through the guest's page tables.

        `form` is one of QEMU's formats: `elf`, or `kdump-zlib`, which is compressed and flattened.
        """
        self._monitor.execute("dump-guest-memory", paging=paging, protocol=f"file:{target}", format=form)
        target.chmod(0o600)

    def settled(self, address: int, length: int, pause: float = 1.0, attempts: int = 20) -> bytes:
        """Guest memory once two looks `pause` seconds apart agree; the guest is left stopped.

        Raises BootFailure when it never does.
        """
        last = b""
        for _ in range(attempts):
            self.stop()
            now = self.physical(address, length)
            if now == last:
                return now
            last = now
            self.resume()
            time.sleep(pause)
        raise BootFailure(f"memory at {address:#x} still changed after {attempts} looks")

    def close(self) -> None:
        self._monitor.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class _Monitor:
    """QEMU's machine protocol: one JSON object a line."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 30
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    self._socket.close()
                    raise BootFailure("QEMU did not open its monitor") from None
                time.sleep(0.05)
        self._socket.settimeout(60)
        self._stream = self._socket.makefile("rwb")
        self._stream.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._stream.flush()
        while line := self._stream.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise BootFailure(f"QEMU refused {command}: {answer['error'].get('desc')}")
        raise BootFailure(f"QEMU ended during {command}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def boot(machine: Machine) -> Iterator[Guest]:
    """QEMU running `machine`; ended and cleaned up whatever happens. Raises BootFailure."""
    folder = Path(tempfile.mkdtemp(prefix="vmipatch-qemu-"))
    guest = None
    try:
        guest = Guest(machine, folder)
        yield guest
    finally:
        if guest is not None:
            guest.close()
        shutil.rmtree(folder, ignore_errors=True)


def reaches(machine: Machine, text: str = REACHED) -> tuple[bool, str]:
    """Whether the machine prints `text` before it ends or its time is over, and its console."""
    with boot(machine) as guest:
        try:
            guest.wait_for(text)
        except BootFailure as failure:
            return False, str(failure)
        return True, guest.console


@dataclass(frozen=True)
class Identity:
    """Who the CPU is, as boot_cpu_data has it."""

    vendor: str
    family: int
    model: int
    stepping: int

    def __str__(self) -> str:
        return f"vendor={self.vendor} family={self.family} model={self.model} stepping={self.stepping}"


@dataclass(frozen=True)
class Capture:
    """A settled kernel's text [_text, _etext) at virtual address `base`, its CPU as it sees it, its console."""

    text: bytes
    base: int
    features: tuple[int, ...]
    identity: Identity
    console: str

    def write_features(self, path: Path) -> Path:
        """Words and identity in the form that `vmipatch patch --features` reads."""
        rows = [self.features[i : i + 8] for i in range(0, len(self.features), 8)]
        words = "".join(" ".join(f"{word:08x}" for word in row) + "\n" for row in rows)
        path.write_text(f"# {self.identity}\n{words}")
        return path


def capture(machine: Machine, vmlinux: Vmlinux) -> Capture:
    """Boot, wait for init, and take text and features once the text has settled. Raises BootFailure."""
    section = vmlinux.text
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        text = guest.settled(vmlinux.physical(section.address), section.size)
        where = vmlinux.physical(vmlinux.exports["boot_cpu_data"])
        cpu_data = guest.physical(where, 512)
        guest.resume()
        guest.send_line()
        if not guest.ended(60):
            raise BootFailure(f"the guest did not power off; the console's end:\n{guest.console[-1500:]}")
        console = guest.console
    identity = cpu_identity(cpu_data, vmlinux.release)
    return Capture(text, section.address, feature_words(cpu_data), identity, console)


def feature_words(cpu_data: bytes) -> tuple[int, ...]:
    """x86_capability out of struct cpuinfo_x86 (arch/x86/include/asm/processor.h).

    The array ends where x86_vendor_id begins and starts behind extended_cpuid_level (0x8000xxxx, or 0 on a CPU
    without that range) and cpuid_level (the highest basic leaf); its first word is CPUID leaf 1's EDX, which
    has bit 0 (FPU) set on every machine here. Evidence in the bytes, so that no table of sizes is trusted.
    On x86-64 the array is aligned and padded to 8 bytes: a word of zeros may stand before it (left out here)
    and, where the number of words is odd, behind it (not told apart from a last word without a bit set).
    """
    end = _vendor_at(cpu_data)
    words = [int.from_bytes(cpu_data[at : at + 4], "little") for at in range(end % 4, end, 4)]
    for has_extended in (True, False):
        for at in range(len(words) - 3):
            extended, level, *following = words[at : at + 4]
            start = at + 2 if following[0] else at + 3
            right = extended >> 16 == 0x8000 if has_extended else extended == 0
            if right and 0 < level <= 0x40 and words[start] & 1:
                return tuple(words[start:])
    raise BootFailure("x86_capability was not found in boot_cpu_data")


def cpu_identity(cpu_data: bytes, release: tuple[int, int]) -> Identity:
    """The head of struct cpuinfo_x86: family, vendor, model, stepping; from 6.10 model, family, two more, stepping."""
    at = _vendor_at(cpu_data)
    vendor = cpu_data[at : at + 12].decode()
    if release >= (6, 10):
        return Identity(vendor, cpu_data[1], cpu_data[0], cpu_data[4])
    return Identity(vendor, cpu_data[0], cpu_data[2], cpu_data[3])


def _vendor_at(cpu_data: bytes) -> int:
    found = [at for vendor in VENDORS if (at := cpu_data.find(vendor)) >= 0]
    if not found:
        raise BootFailure("no CPU vendor's name in boot_cpu_data")
    return min(found)
