"""This tree against another commit: the same commands on the same input in the same run, alternating.

Both are installed from their sources in the same way, each into a folder of its own with the libraries that it asks
for (`pip install --target`, the emulator uncompiled: no command measured here starts it). Each command is a whole
process; the two take turns, so that what else the machine does falls on both. A ratio is this tree's figure by the
other's of the same turn: its median and its range over all turns are printed, of wall time, of processor time (which
a busy machine changes less) and of peak memory. Imports tests.real for kernels and their dump.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.real import dumps, initramfs  # noqa: E402
from tests.real.conftest import RealKernel  # noqa: E402
from tests.real.kernels import KERNELS  # noqa: E402
from tests.real.packages import RegistryAway  # noqa: E402


@dataclass(frozen=True)
class Turn:
    """One process: wall seconds, processor seconds, peak memory in MiB."""

    wall: float
    cpu: float
    memory: float


@dataclass(frozen=True)
class Work:
    """A command's words, and the bar of its time where there is one (this tree's by the other's)."""

    name: str
    words: tuple[str, ...]
    bar: str = ""


def install(source: Path, target: Path) -> Path:
    """The package of a source tree, installed into the folder `target`."""
    environment = {**os.environ, "VMIPATCH_UNCOMPILED": "1"}
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", target, source], env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{source} was not installed:\n{done.stderr[-2000:]}")
    return target


def checkout(commit: str, target: Path) -> Path:
    """The files of a commit, without touching the work tree. `HEAD` and what is not committed is this tree's."""
    target.mkdir()
    archive = target.with_suffix(".tar")
    with archive.open("wb") as file:
        done = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=file, check=False)
    if done.returncode:
        raise SystemExit(f"no commit {commit} in {ROOT}")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()
    return target


# A child's peak memory begins at its parent's, and this process holds whole kernels: a small one stands between.
BETWEEN = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen([sys.executable, "-m", "vmipatch", *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
wall = time.perf_counter() - began
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def once(installed: Path, work: Work, folder: Path) -> Turn:
    """Run a command of an installed package."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    for stale in folder.glob("out*"):
        stale.unlink()
    command = [sys.executable, "-c", BETWEEN, *work.words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    status, wall, cpu, memory = json.loads(done.stdout)
    if status not in (0, 1):
        raise SystemExit(f"{installed}: vmipatch {' '.join(work.words)}: exit {status}\n{done.stderr}")
    return Turn(wall, cpu, memory)


def is_of(installed: Path, folder: Path) -> None:
    """Stop unless that folder's package is what runs."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import vmipatch; print(vmipatch.__file__)"
    said = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    if not said.stdout.startswith(str(installed)):
        raise SystemExit(f"{said.stdout.strip()} runs instead of {installed}: {said.stderr.strip()}")


def works(folder: Path) -> Iterator[Work]:
    """What is measured: the bars are those of the design, section "speed that comes next"."""
    yield Work("--help", ("--help",))
    small, large, newer = (kernel(name, folder) for name in ("686", "amd64", "6.12-amd64"))
    if small is not None:
        yield Work("scan, 6.1 686 ELF", ("scan", str(small.elf), "--json"), "0.8")
        yield Work("patch, 6.1 686 ELF", ("patch", str(small.elf), "--cpu", "qemu32", "-o", "out"))
    if large is not None:
        yield Work("scan, 6.1 amd64 ELF", ("scan", str(large.elf), "--json"), "0.8")
        dump = folder / "amd64.core"
        try:
            dumps.take(large, lambda bits: initramfs.write(folder, bits), dumps.Run("amd64", "qemu64", 1), dump)
        except FileNotFoundError as missing:
            print(f"explain is NOT MEASURED: {missing}")
        else:
            # Of a bzImage the time to unpack it is in both figures.
            for form, image in (("ELF", large.elf), ("bzImage", large.image)):
                words = ("explain", str(image), "--memory", str(dump), "--json")
                yield Work(f"explain, 6.1 amd64 {form}", words, "0.5")
    if newer is not None:
        for form, image in (("ELF", newer.elf), ("bzImage", newer.image)):
            yield Work(f"audit, 6.12 amd64 {form}", ("audit", str(image), "--json"), "0.33")


def kernel(name: str, folder: Path) -> RealKernel | None:
    """A kernel of the real tests, or the loud word that it is missing."""
    try:
        return RealKernel(KERNELS[name], KERNELS[name].fetch(), folder)
    except RegistryAway as away:
        print(f"kernel {name} is NOT MEASURED: {away}")
        return None


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def table(commit: str, runs: int, folder: Path) -> None:
    """Install both, let them take turns, print the ratios."""
    theirs = install(checkout(commit, folder / "source"), folder / "theirs")
    ours = install(ROOT, folder / "ours")
    for installed in (theirs, ours):
        is_of(installed, folder)
    print(f"this tree by {commit}, {runs} turns each; ratios below 1 are less time, less memory")
    print(f"{'command':<26} {'theirs':>9} {'ours':>9}  {'wall':<22} {'processor':<22} {'memory':<22} bar")
    for work in works(folder):
        once(theirs, work, folder), once(ours, work, folder)  # warm: pages of the input, byte code
        turns = [(once(theirs, work, folder), once(ours, work, folder)) for _ in range(runs)]
        before, after = (statistics.median(pair[i].wall for pair in turns) for i in (0, 1))
        ratios = [spread([getattr(b, what) / getattr(a, what) for a, b in turns]) for what in ("wall", "cpu", "memory")]
        print(
            f"{work.name:<26} {before:>7.2f} s {after:>7.2f} s  {ratios[0]:<22} {ratios[1]:<22} {ratios[2]:<22} "
            f"{work.bar and '≤ ' + work.bar}",
            flush=True,
        )
