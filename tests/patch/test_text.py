"""Text under patches against a copy that is written byte by byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.elfwriter import ElfWriter
from vmipatch.annotate.site import Place, Site
from vmipatch.errors import AddressError
from vmipatch.image import open_image
from vmipatch.patch.text import Text

TEXT, SIZE = 0xFFFFFFFF81000000, 0x5000


@pytest.mark.parametrize("seed", range(10))
def test_reads_what_was_written_across_pages(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    model = bytearray(dice.randbytes(SIZE))
    path = tmp_path / "vmlinux"
    path.write_bytes(ElfWriter(64).section(".text", bytes(model), address=TEXT, flags="ax").build())
    image = open_image(path)
    text = Text(image)
    whole = dice.randrange(200)
    for turn in range(200):
        if turn in (whole, whole + 9):
            # The first is laid page by page as it is looked at, the second at once.
            places = sorted(dice.sample(range(0, SIZE - 5, 5), 900))
            codes = [dice.randbytes(5) for _ in places]
            text.write_table([TEXT + place for place in places], codes)
            for place, code in zip(places, codes, strict=True):
                model[place : place + 5] = code
        at, length = dice.randrange(SIZE), dice.choice((1, 5, 6, 4096, 9000))
        length = min(length, SIZE - at)
        assert text.read(TEXT + at, length) == model[at : at + length]
        new = dice.randbytes(min(length, dice.choice((1, 5, 5000))))
        more = [(TEXT + at, new), (TEXT + max(0, at - 3), b"abcde"[: SIZE - at])]
        text.write_all(more)
        for place, code in more:
            model[place - TEXT : place - TEXT + len(code)] = code
        sites = [Site("x", TEXT + a, min(5, SIZE - a), "", "", "", 0, Place()) for a in dice.choices(range(SIZE), k=9)]
        assert text.read_all(sites) == [model[s.address - TEXT : s.end - TEXT] for s in sites]
    assert image.read(TEXT, SIZE) != model
    with pytest.raises(AddressError):
        text.read(TEXT + SIZE - 2, 5)
    with pytest.raises(AddressError):
        text.write(TEXT + SIZE - 2, b"12345")


@pytest.mark.parametrize("order", [1, -1])
def test_a_table_may_reach_beyond_the_image_or_be_in_no_order(tmp_path: Path, order: int) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(ElfWriter(64).section(".text", bytes(SIZE), address=TEXT, flags="ax").build())
    text = Text(open_image(path))
    text.write_table([TEXT + 4, TEXT + 2][::order], [b"\1" * 5, b"\2" * 5])
    assert text.read(TEXT + 2, 7) == (b"\2" * 5 + b"\1\1" if order > 0 else b"\1\1" + b"\2" * 5)
    with pytest.raises(AddressError):
        text.write_table([TEXT, TEXT + SIZE - 4], [b"12345", b"12345"])
