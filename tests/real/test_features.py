"""Names of feature bits against the headers that Debian's kernels were built with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmipatch.annotate.features import feature_name

from .packages import RegistryAway, fetch

DEFINE = re.compile(r"#\s*define\s+X86_FEATURE_(\w+)\s+\(\s*(\d+)\s*\*\s*32\s*\+\s*(\d+)\s*\)")
SERIES = [
    (r"linux-headers-6\.1\.[0-9.-]+-common", "bookworm"),
    (r"linux-headers-6\.12\.[0-9.]+\+deb13-common", "trixie"),
    (r"linux-headers-7\.2\.[0-9.]+\+deb14-common", "sid"),
    (r"linux-headers-7\.3-common", "experimental"),
]


@pytest.mark.parametrize(("pattern", "suite"), SERIES, ids=[suite for _, suite in SERIES])
def test_every_bit_has_the_name_of_its_kernels_header(pattern: str, suite: str) -> None:
    """No bit has another release's name; one that a stable update added since has none, at the words' ends only."""
    try:
        tree = fetch(pattern, "amd64", suite)
    except RegistryAway as away:
        pytest.skip(f"{pattern}: {away}")
    header = next(tree.rglob("arch/x86/include/asm/cpufeatures.h"))
    version = release(tree)
    wrong, unnamed, right = [], [], 0
    for name, word, bit in DEFINE.findall(header.read_text("utf-8")):
        number = int(word) * 32 + int(bit)
        ours = feature_name(number, version)
        if ours == name:
            right += 1
        elif ours == f"{word}*32+{bit}":
            unnamed.append(name)
        else:
            wrong.append((name, ours))
    assert not wrong
    assert right > 300
    assert len(unnamed) <= (0 if version[:2] == (7, 3) else 20), unnamed


def release(tree: Path) -> tuple[int, ...]:
    """The upstream release that a package's own version names: ``6.1.192-3``, ``7.3~rc7-1~exp1``."""
    found = re.search(r"_(\d+)\.(\d+)(?:\.(\d+))?", tree.name)
    assert found is not None, tree.name
    return tuple(int(part or 0) for part in found.groups())
