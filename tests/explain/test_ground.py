"""The ground's counts against a count byte by byte."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import cast

import pytest

from vmipatch.explain.ground import Ground
from vmipatch.image import Image

BASE = 0xFFFFFFFF81000000
SIZE = 20_000
CAUSES = ("mcount", "return_sites", "smp_locks")


@pytest.mark.parametrize("seed", range(20))
def test_counts_and_differences_are_those_of_every_byte(seed: int) -> None:
    dice = random.Random(seed)
    disk = bytes(dice.choices(range(4), k=SIZE))
    expected, pristine, by = bytearray(disk), bytearray(disk), ["pristine"] * SIZE
    ground = Ground(cast(Image, None), BASE, disk, b"")
    for _ in range(300):
        name = dice.choice(CAUSES)
        # Some of them share bytes, some reach past an end and are let go.
        places = [
            (dice.randint(-10, SIZE + 10), bytes(dice.choices(range(4), k=dice.choice((1, 5, 300))))) for _ in "12"
        ]
        ground.lay_all(((BASE + at, code) for at, code in places), ground.cause(name))
        for at, code in places:
            if at >= 0 and at + len(code) <= SIZE:
                expected[at : at + len(code)] = code
                by[at : at + len(code)] = [name] * len(code)
    fields = dice.sample(range(0, SIZE - 4, 4), 40)
    ground.relocate_pristine([BASE + at for at in fields[:30]], 4, 0x01000000)
    ground.add([BASE + at for at in fields[10:]], 4, 0x01000000)
    for text, moved in ((pristine, fields[:30]), (expected, fields[10:])):
        for at in moved:
            text[at + 3] = text[at + 3] + 1 & 0xFF
    found = bytearray(expected)
    if seed % 2:
        start = dice.randrange(SIZE - 10_000)
        for at in (*dice.sample(range(SIZE), 60), *range(start, start + 9_000)):
            found[at] ^= 0x80
    ground.found = bytes(found)

    counted = Counter(by[i] for i in range(SIZE) if expected[i] != pristine[i] and expected[i] == found[i])
    assert ground.counts() == counted
    wrong = [i for i in range(SIZE) if expected[i] != found[i]]
    runs = list(ground.differences())
    assert [a - BASE + i for a, length in runs for i in range(length)] == wrong
    assert all(a + length < b for (a, length), (b, _) in pairwise(runs))
