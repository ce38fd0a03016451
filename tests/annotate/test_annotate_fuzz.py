"""A few thousand of the cases of fuzz.py, with a fixed seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.annotate import fuzz


def test_mutated_tables_give_an_error_of_ours_or_a_result(tmp_path: Path) -> None:
    counts = Counter(fuzz.outcome(tmp_path / "image", data) for _, data in fuzz.cases(2000, 7, []))
    assert sum(counts.values()) == 2000
    assert counts["planned"] > 100  # the mutations do not all die at the first check
    assert counts["TableError"] > 100
