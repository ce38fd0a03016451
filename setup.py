"""Builds the emulator's engine (vmipatch/emu/cpu) as an extension module, where that is possible.

The system's C compiler does it if there is one, else the one in the ``ziglang``
wheel.  Where neither works, or Python's headers are missing, the package is
installed all the same: the engine then runs as plain Python, and one line says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

FLAGS = [
    "-O2",
    "-g0",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-foptimize-sibling-calls",  # handlers call the next one in tail position: this makes it a jump
    "-DCYTHON_INLINE=inline __attribute__((always_inline))",
    "-w",
]


def has_headers() -> bool:
    """Whether Python can be extended here at all."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def system_compiler() -> str | None:
    """The C compiler that the environment or Python's own build names, or cc, gcc or clang."""
    names = [os.environ.get("CC", ""), sysconfig.get_config_var("CC") or "", "cc", "gcc", "clang"]
    for name in names:
        words = name.split()
        if words and shutil.which(words[0]):
            return name
    return None


class BuildEngine(build_ext):
    """Makes the C source of the engine's parts and compiles it, or says why not and goes on."""

    def run(self) -> None:
        if os.environ.get("VMIPATCH_UNCOMPILED"):
            return self.give_up("VMIPATCH_UNCOMPILED is set")
        if not has_headers():
            return self.give_up("Python's headers are missing")
        if system_compiler() is None and importlib.util.find_spec("ziglang") is None:
            return self.give_up("no C compiler was found")
        try:
            super().run()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            return self.give_up(reason or type(error).__name__)

    def give_up(self, reason: str) -> None:
        """Install without the extension."""
        self.extensions = []
        print(f"vmipatch: the emulator is installed uncompiled, some hundred times slower: {reason}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        from Cython.Build import cythonize

        from vmipatch.emu.cpu.amalgam import DIRECTIVES, write

        folder = Path(self.build_temp).resolve() / "engine"
        for parent in ("vmipatch", "vmipatch/emu", "vmipatch/emu/cpu"):
            (folder / parent).mkdir(parents=True, exist_ok=True)
            (folder / parent / "__init__.py").touch()
        source = write(folder / "vmipatch" / "emu" / "cpu")
        before = Path.cwd()
        os.chdir(folder)
        try:
            made = cythonize(
                [Extension(ext.name, [str(source.relative_to(folder))])],
                compiler_directives=DIRECTIVES,
                quiet=True,
                show_all_warnings=False,
            )
        finally:
            os.chdir(before)
        ext.sources = [str(folder / made[0].sources[0])]
        if system_compiler() is None:
            zig = f"{sys.executable} -m ziglang cc"
            self.compiler.set_executables(
                compiler=zig, compiler_so=f"{zig} -fPIC", linker_so=f"{zig} -shared", linker_exe=zig
            )
        super().build_extension(ext)


setup(
    ext_modules=[Extension("vmipatch.emu.cpu._core", ["vmipatch/emu/cpu/api.py"], extra_compile_args=FLAGS)],
    cmdclass={"build_ext": BuildEngine},
    setup_requires=["ziglang"] if has_headers() and system_compiler() is None else [],
)
