"""The package in bare Debian roots: README's first command, and a guest that runs, whatever can be compiled there.

Each root is Debian's minimal set with python3, python3-venv and git, and what the case adds; the work tree's last
commit is cloned into it, and an ordinary user, who may install nothing outside of the clone, does the rest.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import roots

TREE = Path(__file__).resolve().parents[2]
BASE = ("python3", "python3-venv", "git")
GUEST = "tests/emu/system/guest.rom"  # protected mode: 422 cases of rings, gates, paging, tasks
REFERENCE = (TREE / "tests/emu/system/reference.txt").read_text().splitlines()

Make = Callable[[str, tuple[str, ...]], roots.Root]


@pytest.fixture(scope="module")
def root_with(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A root with the base packages and others; debootstrap runs once."""
    folder = tmp_path_factory.mktemp("roots")
    base: list[roots.Root] = []

    def make(name: str, packages: tuple[str, ...]) -> roots.Root:
        try:
            if not base:
                began = time.monotonic()
                base.append(roots.make(folder / "base", "bookworm", BASE))
                print(f"debootstrap: {time.monotonic() - began:.0f} s")
            root = base[0].copy(folder / name)
            if packages:
                root.install(*packages)
        except roots.NoRoots as why:
            pytest.skip(f"NOT TESTED: no bare Debian root: {why}")
        return root

    return make


def first_command() -> str:
    """The first command that README tells to type."""
    readme = (TREE / "README.md").read_text()
    start = readme.partition("## Quick start")[2]
    line = next(line for line in start.splitlines() if line.startswith("$ "))
    return line[2:].partition("#")[0].strip()


@pytest.mark.parametrize(
    ("name", "packages", "engine", "compiler"),
    [
        ("gcc", ("gcc", "libc6-dev", "python3-dev"), "compiled", "gcc"),
        ("ziglang", ("python3-dev",), "compiled", "ziglang"),
        ("neither", (), "uncompiled (slow)", ""),
    ],
)
def test_readme_s_first_command_and_a_guest(
    name: str,
    packages: tuple[str, ...],
    engine: str,
    compiler: str,
    root_with: Make,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = root_with(name, packages)
    assert (root.run("command -v cc gcc clang").returncode == 0) == (compiler == "gcc")
    assert (root.run("ls /usr/include/python3*/Python.h").returncode == 0) == bool(compiler)
    tree = roots.clone(TREE, root, "vmipatch")
    began = time.monotonic()
    installed = root.run(first_command(), tree)
    took = time.monotonic() - began
    assert installed.returncode == 0, installed.stdout[-4000:]
    said = [line for line in installed.stdout.splitlines() if "uncompiled" in line]
    assert len(said) == (0 if compiler else 1), installed.stdout[-4000:]
    began = time.monotonic()
    ran = root.run(f".venv/bin/vmipatch run {shlex.quote(GUEST)} --boot bios", tree)
    seconds = time.monotonic() - began
    lines = ran.stdout.splitlines()
    assert f"engine: {engine}" in lines, ran.stdout[-4000:]
    assert [line for line in lines if " vec=" in line] == REFERENCE
    assert "end of cases" in ran.stdout
    built = root.run(".venv/bin/python -c 'import vmipatch.emu.cpu._core as c; print(c.__file__)'", tree)
    assert (built.returncode == 0) == bool(compiler), built.stdout
    if built.returncode == 0:
        comment = root.run(f"grep -aom1 'GCC: ([^)]*)\\|clang version [0-9.]*' {built.stdout.strip()}").stdout
        assert ("GCC" in comment) == (compiler == "gcc"), comment
    with capsys.disabled():
        print(
            f"\n{name}: {first_command()} {took:.0f} s; the guest's {len(REFERENCE)} cases {seconds:.1f} s; "
            f"engine: {engine}{' by ' + compiler if compiler else ': ' + said[0] if said else ''}"
        )
