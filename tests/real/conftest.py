"""Fixtures of the tests on real kernels, and the loud word about every test that could not run.

What cannot be had (package archive away, no QEMU, no binutils) skips the tests that need it; the terminal
summary then names each of them and the reason, in any verbosity.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import dumps, initramfs
from .dumps import Run
from .kernels import KERNELS, Kernel
from .packages import RegistryAway
from .qemu import Capture, Machine, capture
from .vmlinux import Vmlinux, unpack

KEPT_DUMPS = 12  # of 256 MiB each


class RealKernel:
    """A fetched kernel: the package's image (a bzImage, for some an ELF) and its unpacked ELF."""

    def __init__(self, kernel: Kernel, image: Path, folder: Path) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self.image = image
        self.vmlinux: Vmlinux = unpack(image, folder / f"{kernel.name}.elf")

    @property
    def elf(self) -> Path:
        return self.vmlinux.path


class Cli:
    """Runs `vmipatch` as a user does: a process of its own."""

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vmipatch", *map(str, words)]
        return subprocess.run(command, text=True, capture_output=True, check=False, timeout=900)

    def json(self, *words: object) -> dict[str, Any]:
        done = self.run(*words, "--json")
        assert done.returncode == 0, f"vmipatch {' '.join(map(str, words))}: {done.returncode}\n{done.stderr}"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def _need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


@pytest.fixture(scope="session")
def real_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RealKernel]:
    """A kernel by its name in kernels.KERNELS; skips, with the reason, when it cannot be had."""
    folder = tmp_path_factory.mktemp("kernels")
    had: dict[str, RealKernel | str] = {}

    def get(name: str) -> RealKernel:
        _need("readelf", "objdump")
        if name not in had:
            try:
                had[name] = RealKernel(KERNELS[name], KERNELS[name].fetch(), folder)
            except RegistryAway as away:
                had[name] = f"kernel {name}: {away}"
        found = had[name]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return get


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The initramfs file for a 32- or 64-bit kernel."""
    folder = tmp_path_factory.mktemp("initramfs")
    return lambda bits: initramfs.write(folder, bits)


@pytest.fixture(scope="session")
def captured(
    real_kernel: Callable[[str], RealKernel], initrd: Callable[[int], Path]
) -> Callable[[str, str, int], Capture]:
    """The running text and features of an untouched kernel on a CPU model and a number of CPUs; taken once."""
    had: dict[tuple[str, str, int], Capture] = {}

    def get(name: str, cpu: str, cpus: int) -> Capture:
        found = real_kernel(name)
        _need(found.kernel.qemu)
        key = (name, cpu, cpus)
        if key not in had:
            bits = found.kernel.bits
            had[key] = capture(Machine(found.image, initrd(bits), bits, cpu, cpus), found.vmlinux)
        return had[key]

    return get


@pytest.fixture(scope="session")
def dumped(
    real_kernel: Callable[[str], RealKernel],
    initrd: Callable[[int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dumps.Dumped]:
    """The memory of a boot as an ELF core; taken once, unless so many others came since that it was deleted."""
    folder = tmp_path_factory.mktemp("dumps")
    had: dict[Run, Path] = {}
    taken = itertools.count()

    def get(run: Run) -> Path:
        if run not in had:
            found = real_kernel(run.kernel)
            if run.kaslr and not found.kernel.movable:
                pytest.skip(f"kernel {run.kernel} has nothing that could move it")
            _need(found.kernel.qemu, *(("mke2fs",) if found.kernel.board != "pc" else ()))
            while len(had) >= KEPT_DUMPS:
                had.pop(next(iter(had))).unlink()
            target = folder / f"{next(taken)}.core"
            try:
                dumps.take(found, initrd, run, target)
            except RegistryAway as away:
                pytest.skip(f"{run}: {away}")
            had[run] = target
        return had[run]

    yield get
    shutil.rmtree(folder, ignore_errors=True)  # pytest keeps the folders of three sessions


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: only `./dev real --all` runs this")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who shares a worker, where several run (`--dist loadgroup`): tests of one kernel, else those of one file.

    Dumps, captures and unpacked kernels are kept by worker, and made once so.
    """
    for item in items:
        spec = getattr(item, "callspec", None)
        kernels = []
        for value in spec.params.values() if spec else ():
            if isinstance(value, Run):
                kernels.append(value.kernel)
                if value.long:
                    item.add_marker(pytest.mark.long)
            elif isinstance(value, str) and value in KERNELS:
                kernels.append(value)
        item.add_marker(pytest.mark.xdist_group(kernels[0] if kernels else item.path.stem))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", ()):
        if "real/" in report.nodeid and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            terminalreporter.write_line(f"SKIPPED REAL: {report.nodeid} because {reason}", red=True, bold=True)
