"""Some of the cases of fuzz.py; VMIPATCH_FUZZ_CASES says how many."""

from __future__ import annotations

import os

from tests.explain.modules.fuzz import run

CASES = int(os.environ.get("VMIPATCH_FUZZ_CASES", "400"))


def test_cases_end_in_a_result_or_an_error_of_ours() -> None:
    counts = run(CASES, seed=7)
    assert counts.total() == CASES
    # The cases reach what they are to reach.
    assert {"types", "tables", "findings", "clean", "ImageError"} <= set(counts)
