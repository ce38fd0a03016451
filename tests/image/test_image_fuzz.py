"""Mutated images: an error of ours or a result, never a traceback, in bounded time (see fuzz.py for long runs)."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmipatch.image import open_image

# VMIPATCH_FUZZ_CASES raises it, for long runs.
CASES = int(os.environ.get("VMIPATCH_FUZZ_CASES", "1000"))


def test_the_images_that_are_mutated_open_whole(tmp_path: Path) -> None:
    whole = [data for _, data, _, _ in fuzz.seeds() if data[:4] == b"\x7fELF" or data[0x202:0x206] == b"HdrS"]
    assert len(whole) >= 12
    path = tmp_path / "case"
    for data in whole:
        path.write_bytes(data)
        image = open_image(path)
        assert image.sections
        if image.reconstructed:
            assert image.symbols.sources == (("kallsyms", "exports") if image.bare_base else ("kallsyms",))
        elif image.container != "module":
            assert image.symbols.sources == ("symtab", "kallsyms", "exports")


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_images(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "case"
    accepted = 0
    for data, base in itertools.islice(fuzz.cases(seed, fuzz.seeds()), CASES):
        path.write_bytes(data)
        start = time.process_time()
        accepted += fuzz.exercise(path, base)
        assert time.process_time() - start < fuzz.MAX_SECONDS
    # Damage that is refused at the door tries nothing behind it.
    assert CASES // 10 < accepted < CASES


@pytest.mark.parametrize("kind", ["kallsyms", "pe"])
def test_one_reader_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "case"
    images = [image for image in fuzz.seeds() if image.kind == kind and image.end is not None]
    assert images
    for data, base in itertools.islice(fuzz.cases(3, images, kind), CASES // 5):
        # The rest of the image stays as it was.
        assert any(
            len(data) == len(whole) and data[:start] == whole[:start] and data[end:] == whole[end:]
            for _, whole, start, end in images
        )
        path.write_bytes(data)
        fuzz.exercise(path, base)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from([b"", b"\x7fELF\1\1\1", b"\x7fELF\2\1\1", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd",
                          b"\x02\x21\x4c\x18", b"BZh9", b"\x5d\0\0\x80\0"]),
    body=st.binary(max_size=2000),
    base=st.sampled_from([None, 0, 0xC0000000, 0xFFFFFFFFFFFFF000]),
)  # fmt: skip
def test_any_bytes(tmp_path: Path, head: bytes, body: bytes, base: int | None) -> None:
    path = tmp_path / "case"
    path.write_bytes(head + body or b"\0")
    fuzz.exercise(path, base)
