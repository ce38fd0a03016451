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
    for _ in range(200):
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
