"""Kernels that no package has, built here from Debian's source of the kernel with Debian's clang.

A kernel is what is said of it: the package of its source and the names of the options that are on, every other one
being off. The image is kept in the folder of packages.cache_folder, by the sources', the compiler's and the options'
versions; sources and objects are not. Imports clang, kernels and packages (this folder) only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import packages
from .clang import Clang
from .kernels import Kernel
from .packages import RegistryAway

# What a kernel is built with besides clang, and Debian's package of it.
PROGRAMS = {name: name for name in ("make", "gcc", "flex", "bison", "bc")} | {"ld": "binutils", "xz": "xz-utils"}
LIMIT = 5400  # seconds for one command; a busy machine takes some ten times what an idle one does


@dataclass(frozen=True)
class BuiltKernel(Kernel):
    """An x86-64 kernel with these options (without CONFIG_) and what they bring with them."""

    source: str = ""  # regular expression over the whole name of the package that has the source
    suite: str = ""
    options: tuple[str, ...] = ()

    def fetch(self) -> Path:
        """The bzImage, built when the cache has none. Raises packages.RegistryAway where something cannot be had."""
        source, clang = packages.fetch(self.source, "amd64", self.suite), Clang()
        words = (packages.version_of(source), clang.version, *self.options)
        key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        kept = packages.cache_folder() / "built"
        kept.mkdir(exist_ok=True)
        with packages.locked(kept / "lock"):
            image = kept / f"{self.name}-{key}"
            if not image.exists():
                _need()
                with tempfile.TemporaryDirectory(prefix=".partial-", dir=kept) as folder:
                    _build(source, clang, self.options, Path(folder)).rename(image)
        return image


def _need() -> None:
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if not Path("/usr/include/gelf.h").exists():
        missing.append("libelf-dev")
    if missing:
        raise RegistryAway(f"no kernel can be built here: apt-get install {' '.join(missing)}")


def _build(source: Path, clang: Clang, options: tuple[str, ...], work: Path) -> Path:
    (archive,) = source.glob("usr/src/linux-source-*.tar.xz")
    tree = work / "source"
    tree.mkdir()
    _run(["tar", "-xf", str(archive), "-C", str(tree), "--strip-components=1"])
    fragment = work / "options"
    fragment.write_text("".join(f"CONFIG_{name}=y\n" for name in options))
    make = ["make", "-C", str(tree), f"CC={clang.write(work / 'clang')}", f"-j{min(2, os.cpu_count() or 1)}"]
    _run([*make, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"])
    on = set((tree / ".config").read_text().splitlines())
    lost = [name for name in options if f"CONFIG_{name}=y" not in on]
    assert lost == [], f"the kernel's configuration refused {lost}"
    _run([*make, "bzImage"])
    return tree / "arch/x86/boot/bzImage"


def _run(command: list[str]) -> None:
    done = subprocess.run(
        ["nice", "-n", "10", *command],
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}"
