"""Work that is done ahead: its result or its error, once; and the hash of an image that was begun early."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from elfwriter import ElfWriter

from vmipatch.ahead import Ahead
from vmipatch.errors import ImageError
from vmipatch.image import open_image


def test_a_result_as_often_as_it_is_asked_for() -> None:
    calls: list[int] = []
    work = Ahead(lambda: calls.append(1) or len(calls))
    assert [work.result(), work.result()] == [1, 1]


def test_an_error_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    work = Ahead(lambda: open_image(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(ImageError, match="none"):
            work.result()


def test_a_hash_that_was_begun_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(ElfWriter(bits=64).build())
    image = open_image(path)
    image.hash_ahead()
    image.hash_ahead()
    assert image.sha256() == open_image(path).sha256() == sha256(path.read_bytes()).hexdigest()
