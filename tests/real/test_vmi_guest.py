"""The example guest in QEMU, and its files built again with the very tools that made them.

QEMU is the oracle of the guest's console: natively, on a ROM that SeaBIOS loads, and patched on disk for that ROM.
Tools of other versions are replaced by Debian's packages, fetched by name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Cli
from .packages import RegistryAway, fetch

FOLDER = Path(__file__).parents[2] / "examples" / "vmi-guest"
ABI = {"rfc-v1": "vmi-13.0", "v2": "vmi-3.0", "mainline": "vmi-3.0", "mainline-pae": "vmi-3.0"}
ONLY_RFC = ("page table entry calls: ok", "long entry calls: ok")
BACKEND = "vmi-guest: backend "

# The compiler, the assembler and the linker, and the libraries that they need.
TOOLS = (
    *("gcc-12", "cpp-12", "libisl23", "libmpc3", "libmpfr6", "libgmp10", "libzstd1", "zlib1g"),
    *("binutils", "binutils-x86-64-linux-gnu", "libbinutils", "libctf0", "libctf-nobfd0", "libjansson4"),
)


def elf(form: str) -> Path:
    return FOLDER / f"vmi-guest-{form}.elf"


def expected(form: str) -> list[str]:
    lines = (FOLDER / "console.txt").read_text().splitlines()
    return [line for line in lines if form == "rfc-v1" or line not in ONLY_RFC]


def run_qemu(image: Path, rom: Path | None = None) -> tuple[list[str], str, int]:
    """The guest's console without the line of the back end, that line, and QEMU's exit status (0: powered off)."""
    if shutil.which("qemu-system-i386") is None:
        pytest.skip("qemu-system-i386 is not installed")
    command = ["qemu-system-i386", "-accel", "tcg", "-m", "64", "-kernel", str(image), "-display", "none"]
    command += ["-vga", "none", "-net", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none"]
    command += ["-device", "isa-debug-exit,iobase=0xf4"]
    if rom is not None:
        command += ["-option-rom", str(rom)]
    done = subprocess.run(command, capture_output=True, timeout=240, check=False, stdin=subprocess.DEVNULL)
    text = done.stdout.decode("latin-1").replace("\r\n", "\n")
    # A ROM says its name when SeaBIOS runs it.
    lines = text[text.find("vmi-guest: start") :].splitlines()
    backends = [line for line in lines if line.startswith(BACKEND)]
    assert len(backends) == 1, text[-2000:] + done.stderr.decode("latin-1")
    return [line for line in lines if line not in backends], backends[0].removeprefix(BACKEND), done.returncode


def native_rom(form: str, cli: Cli, folder: Path) -> Path:
    rom = folder / "native.rom"
    done = cli.run("rom", "build", "native", "--abi", ABI[form], "-o", rom)
    assert done.returncode == 0, done.stderr
    return rom


@pytest.mark.parametrize("form", ABI)
def test_native_console_in_qemu(form: str) -> None:
    lines, backend, status = run_qemu(elf(form))
    assert lines == expected(form)
    assert backend.startswith("native, ring 0, features ")
    assert status == 0


@pytest.mark.parametrize("form", ABI)
def test_native_rom_in_qemu(form: str, cli: Cli, tmp_path: Path) -> None:
    """SeaBIOS loads the ROM; the guest finds it, starts it and patches itself, then one patched on disk does."""
    rom = native_rom(form, cli, tmp_path)
    lines, backend, status = run_qemu(elf(form), rom)
    assert lines == expected(form)
    place = re.match(r"vmipatch native VMI ROM at ([0-9a-f]+), ring 0, ", backend)
    assert place is not None, backend
    assert status == 0

    output = tmp_path / "patched.elf"
    done = cli.run("patch", elf(form), "-o", output, "--rom", rom, "--rom-base", f"0x{place[1]}")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() != elf(form).read_bytes()
    assert run_qemu(output, rom) == (lines, backend, 0)


@pytest.mark.parametrize("form", ABI)
@pytest.mark.parametrize("cpu", ["pentium3", "core2duo"])
def test_the_same_in_the_emulator(form: str, cpu: str, cli: Cli) -> None:
    """`vmipatch run` prints what QEMU's other processors do, too."""
    done = cli.run("run", elf(form), "--memory", "64")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(BACKEND)]
    assert lines == expected(form)
    if shutil.which("qemu-system-i386") is None:
        pytest.skip("qemu-system-i386 is not installed")
    command = ["qemu-system-i386", "-accel", "tcg", "-cpu", cpu, "-m", "64", "-kernel", str(elf(form))]
    command += ["-display", "none", "-net", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none"]
    shown = subprocess.run(command, capture_output=True, timeout=240, check=False, stdin=subprocess.DEVNULL).stdout
    printed = shown.decode("latin-1").replace("\r\n", "\n").splitlines()
    assert [line for line in printed if not line.startswith(BACKEND)] == lines


def installed() -> list[str]:
    found = []
    for tool in ("gcc", "ld"):
        path = shutil.which(tool)
        done = subprocess.run([path, "--version"], text=True, capture_output=True, check=False) if path else None
        found.append(done.stdout.splitlines()[0] if done is not None and done.stdout else f"no {tool}")
    return found


def fetched_tools(folder: Path) -> dict[str, str]:
    """Debian 12's tools for amd64, merged into one folder; the environment in which they work."""
    if os.uname().machine != "x86_64":
        pytest.skip("the tools that made the files are those of amd64")
    for package in TOOLS:
        try:
            shutil.copytree(fetch(re.escape(package), "amd64"), folder, symlinks=True, dirs_exist_ok=True)
        except RegistryAway as away:
            pytest.skip(f"package {package}: {away}")
    programs = folder / "usr" / "bin"
    (programs / "gcc").symlink_to("x86_64-linux-gnu-gcc-12")
    libraries = ":".join(str(folder / p / "x86_64-linux-gnu") for p in ("usr/lib", "lib"))
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}


@pytest.mark.parametrize("tools", ["installed", "fetched"])
def test_the_build_gives_the_same_bytes(tools: str, tmp_path: Path) -> None:
    """Debian 12's gcc and binutils, those of this machine where they are these, and fetched ones in any case."""
    wanted = (FOLDER / "toolchain.txt").read_text().splitlines()
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = dict(os.environ)
    if tools == "fetched":
        environment = fetched_tools(tmp_path / "tools")
        for tool, line in zip(("gcc", "ld"), wanted, strict=True):
            done = subprocess.run([tool, "--version"], env=environment, text=True, capture_output=True, check=False)
            assert done.stdout.splitlines()[:1] == [line], done.stderr
    elif installed() != wanted:
        pytest.skip(f"this machine has {installed()}, the files were made with {wanted}; the fetched ones are tried")
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("build", "*.elf"))
    done = subprocess.run(
        ["make", "-C", str(copy)], env=environment, text=True, capture_output=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for form in ABI:
        assert (copy / elf(form).name).read_bytes() == elf(form).read_bytes(), form
