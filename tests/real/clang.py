"""A clang of Debian's archive, unpacked beside the system and run by its own C library.

So a compiler that is newer than this machine can be used, and nothing is installed. Imports packages (this folder)
only.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from .packages import fetch, version_of

MAJOR = 21  # the first that tells kCFI's preambles how many arguments a function has (-fsanitize-kcfi-arity)
SUITE = "sid"
# What the compiler is linked with, and what that is linked with.
LIBRARIES = (
    *(f"libclang-cpp{MAJOR}", f"libllvm{MAJOR}", "libc6", r"libstdc\+\+6", "libgcc-s1", "libedit2", "libffi8"),
    *("zlib1g", "libzstd1", "libxml2(-16)?", "libtinfo6", "libbsd0", "libmd0", "libz3-4", "liblzma5"),
)
MULTIARCH = "usr/lib/x86_64-linux-gnu"


class Clang:
    """The unpacked compiler. Raises packages.RegistryAway where a package of it cannot be had."""

    def __init__(self) -> None:
        self._tree = fetch(f"clang-{MAJOR}", "amd64", SUITE)
        self._headers = fetch(f"libclang-common-{MAJOR}-dev", "amd64", SUITE)
        self._libraries = [fetch(name, "amd64", SUITE) for name in LIBRARIES]

    @property
    def version(self) -> str:
        """The package's version."""
        return version_of(self._tree)

    def write(self, path: Path) -> Path:
        """A shell script at `path` that is the compiler.

        Clang starts itself once more for a file that is preprocessed and then assembled, by the path that it finds in
        its first argument; that is the script again.
        """
        llvm = f"usr/lib/llvm-{MAJOR}"
        folders = ":".join(str(tree / MULTIARCH) for tree in self._libraries)
        loader = next(tree for tree in self._libraries if tree.name.startswith("libc6_")) / MULTIARCH
        resources = shlex.quote(str(self._headers / llvm / "lib/clang" / str(MAJOR)))
        command = shlex.join([str(loader / "ld-linux-x86-64.so.2"), "--library-path", folders])
        path.write_text(
            "#!/bin/sh\n"
            f'case "$1" in -cc1*) ;; *) set -- -no-canonical-prefixes -resource-dir {resources} "$@" ;; esac\n'
            f'exec {command} --argv0 "$0" {shlex.quote(str(self._tree / llvm / "bin/clang"))} "$@"\n'
        )
        path.chmod(0o755)
        return path
