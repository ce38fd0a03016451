"""Measures what a user waits for, and prints it as one table beside a physical floor of the same run.

    python benchmarks/run.py [--runs N] [--only WORD] [IMAGE ...]
    python benchmarks/run.py --against COMMIT [--runs N]

IMAGE is a kernel (bzImage or vmlinux); without one, the kernels that the real
tests have fetched are used.  Each row is a whole process, started and reaped
here: median wall time and peak memory of N runs, the bar of the design, and the
ratio to the floor named in the row (a plain read of the same file by a fresh
Python, or a bare typer program with as many commands).  The emulator's rows (emu.py)
have tables of their own, beside Unicorn, Bochs and QEMU where they are there; overhead.py's count
guest instructions, which no other load on the machine changes.  With --against another commit is
installed in a folder of its own, and the ratios of time and memory are printed, and nothing else (against.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import emu
import emulators
import overhead

PYTHON = sys.executable


@dataclass(frozen=True)
class Figure:
    """Median wall seconds and peak memory (MiB) of a whole process."""

    seconds: float
    memory: float


def measure(command: list[str], runs: int) -> Figure:
    """Run a command ``runs`` times after one warm-up; its output is thrown away."""
    walls, peaks = [], []
    for turn in range(runs + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{errors.decode()}")
        if turn:
            walls.append(wall)
            peaks.append(usage.ru_maxrss / 1024)
    return Figure(statistics.median(walls), max(peaks))


def bare_typer(commands: int) -> str:
    """A typer program that has as many commands and does nothing."""
    body = "\n".join(
        f"@app.command()\ndef c{i}(x: str, y: int = 1, z: bool = False) -> None: 'Do.'" for i in range(commands)
    )
    return f"import typer\napp = typer.Typer(rich_markup_mode=None)\n{body}\napp()\n"


def row(name: str, figure: Figure, bar: str, floor: str, against: Figure) -> None:
    """One line of the table."""
    ratio = figure.seconds / against.seconds
    memory = f"{figure.memory:>6.0f} MiB" if figure.memory else " " * 10
    print(
        f"{name:<44} {figure.seconds * 1000:>8.0f} ms {memory}  {bar:<22} "
        f"{ratio:>6.1f}x {floor} ({against.seconds * 1000:.0f} ms)",
        flush=True,
    )


UNPACK = """
import sys
from vmipatch.image import open_image
image = open_image(sys.argv[1])
if image.compression is not None:
    open(sys.argv[2], "wb").write(image.data)
print(image.bits, sys.argv[1] if image.compression is None else sys.argv[2])
"""


def unpacked(image: Path, folder: Path) -> tuple[Path, int]:
    """The ELF inside a bzImage as a file (an ELF as it is), and its bits.

    In a process of its own: a child's peak memory begins at its parent's.
    """
    target = folder / (image.name + ".elf")
    done = subprocess.run([PYTHON, "-c", UNPACK, str(image), str(target)], check=True, capture_output=True, text=True)
    bits, path = done.stdout.split(maxsplit=1)
    return Path(path.strip()), int(bits)


def fetched() -> list[Path]:
    """Kernels in the cache of the real tests, one of a name."""
    cache = Path(os.environ.get("VMIPATCH_CACHE", Path.home() / ".cache" / "vmipatch"))
    return sorted({p.name: p for p in cache.glob("**/boot/vmlinuz-*") if p.is_file()}.values())


def benchmark_image(image: Path, runs: int, folder: Path) -> None:
    """Scan and patch of one kernel."""
    elf, bits = unpacked(image, folder)
    size = elf.stat().st_size
    read = measure([PYTHON, "-c", f"open({str(elf)!r}, 'rb').read()"], runs)
    bar = "≤ 500 ms, ≤ 150 MiB" if bits == 32 else "≤ 3000 ms, ≤ 500 MiB"
    vmipatch = [PYTHON, "-m", "vmipatch"]
    label = f"{elf.name[:24]} ({size / 1e6:.0f} MB)"
    figure = measure([*vmipatch, "scan", str(elf), "--json"], runs)
    row(f"scan {label}", figure, bar, "read", read)
    cpu = "qemu32" if bits == 32 else "qemu64"
    out = folder / "patched"
    figure = measure([*vmipatch, "patch", str(elf), "--cpu", cpu, "-o", str(out)], runs)
    row(f"patch {label}", figure, "≤ 700 ms" if bits == 32 else "", "read", read)


def benchmark_explain(runs: int, folder: Path) -> None:
    """The text of a kernel that our emulator has booted, explained."""
    kernel = emu.kernel_elf(folder)
    if kernel is None:
        return
    dump = emulators.emulate_file("dump", kernel)
    read = measure([PYTHON, "-c", f"open({str(dump['file'])!r}, 'rb').read()"], runs)
    words = [str(kernel), "--memory", str(dump["file"]), "--base", hex(int(dump["base"])), "--json"]
    figure = measure([PYTHON, "-m", "vmipatch", "explain", *words], runs)
    row(f"explain {kernel.name}'s 9.5 MB of running text", figure, "≤ 2000 ms", "read", read)


def benchmark_build(folder: Path) -> None:
    """The engine made from its parts and compiled, as an installation does it; once."""
    bare = measure([PYTHON, "-c", "import setuptools"], 1)
    began = time.perf_counter()
    command = [PYTHON, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "t")]
    done = subprocess.run(command, cwd=emulators.ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode or not list(folder.glob("vmipatch/emu/cpu/_core*")):
        print(f"the engine was not built: {done.stderr.strip().splitlines()[-1:]}")
        return
    row("build the engine", Figure(seconds, 0), "≤ 90000 ms", "import setuptools", bare)


def main() -> None:
    """Parse arguments, run everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--only", default="", help="only rows whose group is named so: start, rom, image, explain, build, emu, overhead"
    )
    parser.add_argument("--against", metavar="COMMIT", help="only the ratios to another commit of this repository")
    given = parser.parse_args()
    if given.against:
        import against

        with tempfile.TemporaryDirectory() as name:
            against.table(given.against, given.runs, Path(name))
        return
    if given.only not in ("emu", "overhead"):
        print(f"{'whole process':<44} {'median':>11} {'peak':>10}  {'bar':<22} {'ratio':>7} to")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.only in ("", "start"):
            listing = subprocess.run(
                [PYTHON, "-m", "vmipatch", "--help"], capture_output=True, text=True, check=True
            ).stdout
            count = len(listing.partition("Commands:")[2].split("\n\n")[0].strip().splitlines())
            script = folder / "bare.py"
            script.write_text(bare_typer(count))
            bare = measure([PYTHON, str(script), "--help"], given.runs)
            row(
                "vmipatch --help",
                measure([PYTHON, "-m", "vmipatch", "--help"], given.runs),
                "≤ 1.3x",
                "bare typer",
                bare,
            )
        if given.only in ("", "rom"):
            bare = measure([PYTHON, "-c", "import typer"], given.runs)
            command = [PYTHON, "-m", "vmipatch", "rom", "build", "native", "-o", str(folder / "native.rom")]
            row("rom build native", measure(command, given.runs), "≤ 400 ms", "import typer", bare)
        if given.only in ("", "image"):
            images = given.images or fetched()
            if not images:
                print("no kernel: name one, or let the real tests fetch some")
            for image in images:
                benchmark_image(image, given.runs, folder)
        if given.only in ("", "explain"):
            benchmark_explain(given.runs, folder)
        if given.only in ("", "build"):
            benchmark_build(folder)
        if given.only in ("", "emu"):
            emu.table(given.runs, folder)
        if given.only in ("", "overhead"):
            print()
            overhead.print_tables(overhead.HYPERVISORS)


if __name__ == "__main__":
    main()
