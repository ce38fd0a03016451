"""Real programs that nobody here wrote, run unchanged in the emulator: SeaBIOS, memtest86+, iPXE, Linux.

Needs the Debian packages seabios and ipxe-qemu on this machine, and memtest86+ and a kernel from the archive; a
test without its package is skipped and says so.  QEMU, where there is one, runs the same SeaBIOS for comparison.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmipatch.annotate import Site, scan
from vmipatch.emu.cpu import COMPILED
from vmipatch.emu.firmware import boot
from vmipatch.emu.firmware.boot import BootOptions
from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine, Outcome
from vmipatch.image import Image, open_image

from . import initramfs
from .conftest import RealKernel
from .kernels import KERNELS
from .packages import RegistryAway, fetch
from .qemu import Capture, feature_words

SEABIOS = Path("/usr/share/seabios/bios.bin")
SEABIOS_256K = Path("/usr/share/seabios/bios-256k.bin")
VGABIOS = Path("/usr/share/seabios/vgabios-isavga.bin")
IPXE = Path("/usr/lib/ipxe/qemu/pxe-e1000.rom")
MEMTEST = (Path("/boot/memtest86+ia32.bin"), Path("/boot/memtest86+/memtest.bin"))
MIB = 1 << 20

Get = Callable[[str], RealKernel]

pytestmark = pytest.mark.skipif(not COMPILED, reason="NOT TESTED: the engine is not compiled, this would take hours")


def need(path: Path, package: str) -> bytes:
    if not path.is_file():
        pytest.skip(f"NOT TESTED: no {path}; install the Debian package {package}")
    return path.read_bytes()


def bios_machine(image: Path = SEABIOS, *, roms: tuple[bytes, ...] = (), vga: bool = True) -> Machine:
    machine = Machine(BoardOptions(ram_bytes=32 * MIB, roms=roms))
    if vga:
        machine.board.fw_cfg.add_file("vgaroms/vgabios.bin", need(VGABIOS, "seabios"))
    boot.boot(machine, need(image, "seabios"), BootOptions(), str(image))
    return machine


@pytest.mark.parametrize("image", [SEABIOS, SEABIOS_256K])
def test_seabios_through_post(image: Path) -> None:
    machine = bios_machine(image)
    outcome = machine.run(limit=2_000_000_000, until="No bootable device")
    text = machine.board.consoles.debug.decode("latin-1")
    assert outcome.reason == "until", text
    assert "Running on QEMU (i440fx)" in text
    assert "PS2 keyboard initialized" in text
    assert machine.board.vga is not None
    screen = "\n".join(machine.board.vga.text())
    assert "SeaBIOS (version" in screen


def test_seabios_says_what_it_says_in_qemu(tmp_path: Path) -> None:
    """POST's log beside QEMU's, for the lines that do not depend on disks, addresses or QEMU's own cards."""
    if shutil.which("qemu-system-i386") is None:
        pytest.skip("NOT TESTED: no qemu-system-i386")
    machine = bios_machine()
    machine.run(limit=2_000_000_000, until="No bootable device")
    ours = machine.board.consoles.debug.decode("latin-1").splitlines()
    log = tmp_path / "log"
    qemu = subprocess.Popen(
        [
            "qemu-system-i386", "-M", "pc", "-accel", "tcg", "-cpu", "pentium3", "-m", "32", "-bios", SEABIOS,
            "-display", "none", "-nodefaults", "-serial", "null", "-vga", "none", "-debugcon", f"file:{log}", "-global",
            "isa-debugcon.iobase=0x402",
        ]
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.exists() and b"No bootable device" in log.read_bytes()):
            time.sleep(0.2)
    finally:
        qemu.kill()
        qemu.wait()
    theirs = log.read_text("latin-1").splitlines()
    common = [
        "Running on QEMU (i440fx)",
        "Found QEMU fw_cfg",
        "QEMU fw_cfg DMA interface supported",
        "qemu/e820: addr 0x0000000000000000 len 0x0000000002000000 [RAM]",
        "PCI: init bdf=00:00.0 id=8086:1237",
        "PCI: init bdf=00:01.0 id=8086:7000",
        "PIIX3/PIIX4 init: elcr=00 0c",
        "PCI: init bdf=00:01.3 id=8086:7113",
        "Using pmtimer, ioport 0x",
        "Found 1 cpu(s) max supported 1 cpu(s)",
        "Found 1 serial ports",
        "PS2 keyboard initialized",
        "All threads complete.",
        "  0: 0000000000000000 - 000000000009fc00 = 1 RAM",
        "  1: 000000000009fc00 - 00000000000a0000 = 2 RESERVED",
        "  2: 00000000000f0000 - 0000000000100000 = 2 RESERVED",
        "enter handle_18:",
        "No bootable device",
    ]
    for line in common:
        assert any(line in other for other in theirs), f"QEMU does not say: {line}"
        assert any(line in other for other in ours), f"we do not say: {line}"


def test_ipxe_rom_on_a_card_prints_its_banner() -> None:
    machine = bios_machine(roms=(need(IPXE, "ipxe-qemu"),))
    outcome = machine.run(limit=1_000_000_000, until="iPXE (http")
    assert machine.board.vga is not None
    assert outcome.reason == "until", "\n".join(machine.board.vga.text())
    # Booted from, the ROM unpacks itself to protected mode and finds that its card has no registers.
    outcome = machine.run(limit=1_000_000_000, until="No more network devices")
    assert outcome.reason == "until", "\n".join(machine.board.vga.text())
    assert any("Open Source Network Boot Firmware" in line for line in machine.board.vga.text())


def memtest_image() -> bytes:
    for path in MEMTEST:
        if path.is_file():
            return path.read_bytes()
    try:
        tree = fetch(r"memtest86\+", "amd64")
    except RegistryAway as away:
        pytest.skip(f"NOT TESTED: no memtest86+: {away}")
    return (tree / "boot" / "memtest86+ia32.bin").read_bytes()


def test_memtest_reaches_its_first_running_test() -> None:
    machine = Machine(BoardOptions(ram_bytes=32 * MIB))
    boot.boot(machine, memtest_image(), BootOptions(), "memtest86+")
    outcome = machine.run(limit=3_000_000_000, until="Testing: 0KB")
    assert machine.board.vga is not None
    screen = machine.board.vga.text()
    assert outcome.reason == "until", "\n".join(screen)
    assert "Memtest86+ v" in screen[0]
    assert any("Test #0" in line for line in screen)
    assert any("Errors: 0" in line for line in screen)


@functools.cache
def kernel_image(name: str) -> tuple[bytes, bytes]:
    """The bzImage and the ELF inside it."""
    path = KERNELS[name].fetch()
    return path.read_bytes(), bytes(open_image(path).data)


def boot_linux(name: str, *extra: str, bzimage: bool = False) -> tuple[Machine, Outcome]:
    try:
        image, elf = kernel_image(name)
    except RegistryAway as away:
        pytest.skip(f"NOT TESTED: no kernel {name}: {away}")
    machine = Machine(BoardOptions(ram_bytes=256 * MIB))
    append = " ".join(("console=ttyS0", *extra))
    boot.boot(machine, image if bzimage else elf, BootOptions(append=append, initrd=initramfs.build(32)), name)
    outcome = machine.run(limit=20_000_000_000, until=initramfs.REACHED)
    return machine, outcome


@pytest.mark.parametrize("name", ["686", "686-pae"])
def test_a_real_kernel_boots_to_init(name: str) -> None:
    machine, outcome = boot_linux(name)
    text = machine.board.consoles.serial.decode("latin-1")
    assert outcome.reason == "until", text[-3000:]
    assert "Linux version 6.1." in text
    assert "Run /init as init process" in text
    assert "Call Trace" not in text


@pytest.mark.parametrize("name", ["686", "686-pae"])
def test_two_boots_are_the_same(name: str) -> None:
    """Same instruction count, same console text; without the crypto self-tests, which are most of a boot."""
    first, outcome = boot_linux(name, "cryptomgr.notests")
    second, again = boot_linux(name, "cryptomgr.notests")
    assert outcome.reason == "until"
    assert again == outcome
    assert second.board.consoles.serial == first.board.consoles.serial


def test_a_bzimage_unpacks_itself_and_boots() -> None:
    machine, outcome = boot_linux("686", "cryptomgr.notests", bzimage=True)
    assert outcome.reason == "until", machine.board.consoles.serial[-3000:]


def test_a_snapshot_of_a_running_kernel_goes_on_the_same() -> None:
    machine, _ = boot_linux("686", "cryptomgr.notests")
    base = machine.snapshot()
    runs = []
    for _ in range(2):
        outcome = machine.run(limit=machine.cpu.instructions + 30_000_000)
        runs.append((outcome, machine.cpu.get("eip"), machine.cpu.get("esp"), machine.memory.read(0x1000000, 0x100000)))
        machine.restore(base)
    assert runs[0] == runs[1]


def test_the_kernel_powers_the_machine_off() -> None:
    """Input on the serial line wakes init, which asks for power-off: ACPI S5."""
    machine, _ = boot_linux("686", "cryptomgr.notests")
    machine.board.uart.receive(b"\n")
    outcome = machine.run(limit=machine.cpu.instructions + 500_000_000)
    text = machine.board.consoles.serial.decode("latin-1")
    assert outcome.reason == "poweroff", text[-1000:]
    assert "Power down" in text


# QEMU's model with what ours has not got taken away.
SAME_CPU = "pentium3,-sse,-vme,-mtrr,-mca,-mmx,-mce,-hypervisor"
FEAT_CTL = (7, 1 << 31)  # QEMU answers RDMSR 0x3A on any model; a Pentium III has no such register


# The static keys and static calls that may stand otherwise than in QEMU, and why.
OTHERWISE = {
    "crng_make_state": "the key of a seeded random generator (drivers/char/random.c): QEMU's time, which runs with its "
    "host's, has given entropy enough by now; ours, which runs with the instructions, not yet",
    "x86_pmu": "the driver of the performance counters: QEMU's model does not hold what is written to a counter, so "
    "the kernel leaves them alone; ours holds it",
}


def reason_for(site: Site, image: Image, keys: dict[str, set[str]]) -> str:
    """The entry of OTHERWISE that a site belongs to, by its call's name or by a function that asks the same key."""
    named = keys[site.op] if site.family == "jump_labels" else {site.op}
    return next((reason for word, reason in OTHERWISE.items() if any(name.startswith(word) for name in named)), "")


def test_running_text_equals_qemus(
    captured: Callable[[str, str, int], Capture], real_kernel: Get, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the boot the kernel has patched itself the same way: 0 bytes apart outside jump labels and static calls.

    Those that differ are listed, each with its reason of OTHERWISE.
    """
    theirs = captured("686", SAME_CPU, 1)
    vmlinux = real_kernel("686").vmlinux
    machine, outcome = boot_linux("686", "nokaslr", "panic=-1")
    assert outcome.reason == "until"
    machine.run(limit=machine.cpu.instructions + 300_000_000)
    place = vmlinux.physical(vmlinux.exports["boot_cpu_data"])
    words = list(feature_words(machine.memory.read(place, 512)))
    words[FEAT_CTL[0]] |= theirs.features[FEAT_CTL[0]] & FEAT_CTL[1]
    assert words == list(theirs.features)
    ours = machine.memory.read(vmlinux.physical(theirs.base), len(theirs.text))
    image = open_image(vmlinux.path)
    sites = {site.address: site for site in scan(image, ["jump_labels", "static_calls"]).sites}
    keys: dict[str, set[str]] = {}
    for site in sites.values():
        function = image.symbols.at(site.address)
        keys.setdefault(site.op, set()).add(function[0] if function else "")
    apart = {theirs.base + at for at, (a, b) in enumerate(zip(ours, theirs.text, strict=True)) if a != b}
    listed: dict[str, list[str]] = {}
    left = set(apart)
    for start, site in sorted(sites.items()):
        mine = set(range(start, start + site.length))
        if left & mine:
            at = start - theirs.base
            change = f"{start:#x} {ours[at : at + 5].hex(' ')} here, {theirs.text[at : at + 5].hex(' ')} in QEMU"
            listed.setdefault(reason_for(site, image, keys), []).append(f"{change} ({site.family} {site.op})")
            left -= mine
    with capsys.disabled():
        print(f"\n{len(apart)} of {len(ours)} bytes differ, all of jump labels and static calls")
        for reason, lines in listed.items():
            print(f"  {reason or 'NO REASON KNOWN'}:", *lines, sep="\n    ")
    assert not left, [(hex(address), image.symbols.at(address)) for address in sorted(left)]
    assert "" not in listed
