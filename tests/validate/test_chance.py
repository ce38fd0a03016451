"""Calls that a guest makes or not by its own randomness: told from calls that a patch lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from vmipatch.validate.boots import TURNS, Boot, judge
from vmipatch.validate.console import known

ALWAYS = ("SetCR3", "IRET")


def boot(kind: str, calls: Iterable[str], reason: str = "poweroff") -> Boot:
    return Boot(kind, reason, True, b"one\n", 1, calls=Counter(calls))


def judged(own: Iterable[str], static: Iterable[str], again: object) -> Boot:
    boots = [boot("native", ()), boot("self", own), boot("static", static)]
    judge(boots, known(None), again)  # type: ignore[arg-type]
    assert boots[0].verdict == boots[1].verdict == "pass"
    return boots[2]


def test_a_call_that_the_same_boot_makes_or_not_is_only_noted() -> None:
    rng = random.Random(4)

    def again(kind: str, turn: int) -> Boot:
        assert 1 <= turn <= TURNS
        return boot(kind, (*ALWAYS, "ReleasePage") if rng.random() < 0.5 else ALWAYS)

    found = judged((*ALWAYS, "ReleasePage"), ALWAYS, again)
    assert (found.verdict, found.problems) == ("pass", [])
    assert len(found.notes) == 1
    assert "calls of chance, not compared: ReleasePage" in found.notes[0]


def test_a_call_that_one_boot_never_makes_is_a_failure() -> None:
    asked = []

    def again(kind: str, turn: int) -> Boot:
        asked.append((kind, turn))
        return boot(kind, (*ALWAYS, "ReleasePage") if kind == "self" else ALWAYS)

    found = judged((*ALWAYS, "ReleasePage"), ALWAYS, again)
    assert (found.verdict, found.notes) == ("fail", [])
    assert found.problems == ["calls made in one boot only: ReleasePage"]
    assert len(asked) == len(set(asked)) == 2 * TURNS


def test_chance_excuses_the_call_of_chance_alone() -> None:
    def again(kind: str, turn: int) -> Boot:
        calls = [*ALWAYS, *(["ReleasePage"] if turn % 2 else []), *(["FlushTLB"] if kind == "static" else [])]
        return boot(kind, calls)

    found = judged((*ALWAYS, "ReleasePage"), (*ALWAYS, "FlushTLB"), again)
    assert found.problems == ["calls made in one boot only: FlushTLB"]
    assert "ReleasePage" in found.notes[0]
    assert "FlushTLB" not in found.notes[0]


def test_a_boot_that_fails_with_another_clock_is_a_failure() -> None:
    found = judged((*ALWAYS, "ReleasePage"), ALWAYS, lambda kind, turn: boot(kind, ALWAYS, "triple fault"))
    assert found.problems == ["with its clocks put forward (1) the self boot ends with triple fault"]


def test_same_calls_are_not_run_again() -> None:
    def again(kind: str, turn: int) -> Boot:
        raise AssertionError("a third boot")

    assert judged(ALWAYS, ALWAYS, again).verdict == "pass"


def test_without_another_boot_a_difference_counts() -> None:
    assert judged((*ALWAYS, "ReleasePage"), ALWAYS, None).problems == ["calls made in one boot only: ReleasePage"]
