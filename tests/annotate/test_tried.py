"""A kernel that is newer than all that was tried: every command says so, once, and none does for older ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.kernelmaker import KernelMaker
from vmipatch.annotate.tried import newer, newest
from vmipatch.cli import app
from vmipatch.patch.rules import eras


def test_the_newest_era_says_what_was_tried() -> None:
    """It is found by its file's name alone: no later one may be overlooked."""
    assert ".".join(map(str, newest())) == eras()[-1].spec["tried"]
    assert eras()[-1].since <= newest()


def test_newer_than_tried() -> None:
    series = newest()
    after = (*series[:-1], series[-1] + 1)
    assert newer(None) == newer((2, 6, 32)) == newer(series) == newer((*series, 99)) == ""
    assert "newer than any that was tried" in newer(after)
    assert "newer than any that was tried" in newer((99, 0, 1))


@pytest.mark.parametrize(("release", "count"), [("99.1.0", 1), ("6.1.50", 0)])
@pytest.mark.parametrize("command", ["scan", "audit", "legal", "patch"])
def test_commands_say_so_once(command: str, release: str, count: int, tmp_path: Path) -> None:
    maker = KernelMaker(bits=64, release=release)
    site = maker.code(b"\x90" * 8)
    maker.alternatives("rel14" if count else "rel12", [(site, maker.replacement(b"\x0f\xae\xe8"), 26, 3, 3, {})])
    path, features = tmp_path / "vmlinux", tmp_path / "features"
    path.write_bytes(maker.build())
    features.write_text(" ".join(["0"] * 24))
    arguments = {
        "scan": ["scan", path],
        "audit": ["audit", path],
        "legal": ["explain", path, "--legal", tmp_path / "legal"],
        "patch": ["patch", path, "-o", tmp_path / "out", "--features", features],
    }[command]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.stderr.count("newer than any that was tried") == count
    assert "newer than any" not in done.stdout
