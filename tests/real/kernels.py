"""The kernels that the real tests use: what to ask the package archive for.

Imports packages (this folder) only. Also a command: `python -m tests.real.kernels NAME` prints the bzImage's path,
and ends with status 3 and the reason when the package archive is away.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .packages import RegistryAway, fetch, kernel_image


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel: how its package is named and which QEMU runs it."""

    name: str
    pattern: str  # regular expression over the whole package name
    arch: str  # Debian's name of the architecture
    suite: str
    bits: int

    @property
    def qemu(self) -> str:
        return "qemu-system-i386" if self.bits == 32 else "qemu-system-x86_64"

    def fetch(self) -> Path:
        """The bzImage, fetched when the cache has none. Raises packages.RegistryAway."""
        return kernel_image(fetch(self.pattern, self.arch, self.suite))


def _kernel(name: str, series: str, flavour: str, arch: str, suite: str) -> Kernel:
    # Debian 12 and before number the ABI (6.1.0-50), Debian 13 gives the version (6.12.117+deb13).
    pattern = rf"linux-image-{series}\.[0-9.-]+(\+deb[0-9]+)?-?{flavour}(-unsigned)?"
    return Kernel(name, pattern, arch, suite, 32 if arch == "i386" else 64)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        _kernel("686", r"6\.1", "686", "i386", "bookworm"),
        _kernel("686-pae", r"6\.1", "686-pae", "i386", "bookworm"),
        _kernel("amd64", r"6\.1", "amd64", "amd64", "bookworm"),
        _kernel("5.10-686", r"5\.10", "686", "i386", "bullseye"),
        _kernel("5.10-686-pae", r"5\.10", "686-pae", "i386", "bullseye"),
        _kernel("5.10-amd64", r"5\.10", "amd64", "amd64", "bullseye"),
        _kernel("6.12-amd64", r"6\.12", "amd64", "amd64", "trixie"),
    )
}


def main(arguments: list[str]) -> int:
    """Print where a kernel's bzImage is. Status 2: wrong use, 3: it cannot be had."""
    if len(arguments) != 1 or arguments[0] not in KERNELS:
        print(f"usage: python -m tests.real.kernels NAME, one of {', '.join(KERNELS)}", file=sys.stderr)
        return 2
    try:
        print(KERNELS[arguments[0]].fetch())
    except RegistryAway as away:
        print(f"the package archive gave no kernel: {away}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
