"""Dumps that cannot be used: each refused in one line, with how it was noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corewriter import core
from tests.explain import running as made
from tests.explain.running import Machine
from vmipatch.errors import VmipatchError
from vmipatch.explain import Memory, explain
from vmipatch.image import Image, open_image

TEXT_SIZE = 0x3000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return open_image(made.build(tmp_path_factory.mktemp("kernel")))


def refused(image: Image, folder: Path, data: bytes, base: int | None = None) -> str:
    dump = folder / "dump"
    dump.write_bytes(data)
    with pytest.raises(VmipatchError) as caught:
        explain(image, Memory(dump, base))
    text = str(caught.value)
    assert caught.value.exit_status == 2
    assert "\n" not in text
    assert text.startswith(str(dump))
    return text


def banner(old: bytes, new: bytes, *, text: bool = True) -> bytes:
    """Memory with another banner, and the text of another kernel unless told otherwise."""
    machine = Machine()
    machine.put(made.RODATA, made.BANNER.replace(old, new))
    if text:
        machine.put(made.TEXT, random.Random(1).randbytes(TEXT_SIZE))
    return bytes(machine.bytes)


def test_another_release_is_told_by_its_banner(image: Image, tmp_path: Path) -> None:
    said = refused(image, tmp_path, banner(b"-99-", b"-98-"), made.PHYSICAL)
    assert "another kernel: its banner is 'Linux version 6.1.0-98-686" in said
    assert "'Linux version 6.1.0-99-686" in said


def test_another_build_of_the_release_is_told_by_what_differs_in_the_banner(image: Image, tmp_path: Path) -> None:
    for text in (True, False):
        said = refused(image, tmp_path, banner(b"#1 SMP", b"#2 SMP", text=text), made.PHYSICAL)
        assert (
            "another build of 6.1.0-99-686: its banner says '#2 SMP for a test' where the image's says '#1 SMP" in said
        )


def test_another_build_is_told_by_its_build_id(image: Image, tmp_path: Path) -> None:
    machine = Machine()
    machine.put(made.RODATA + 0x1000 + 16, bytes(range(100, 120)))
    said = refused(image, tmp_path, bytes(machine.bytes), made.PHYSICAL)
    assert (
        f"another build: its build id is {bytes(range(100, 120)).hex()}, the image's {bytes(range(20)).hex()}" in said
    )


def test_the_wrong_text_under_the_right_banner_is_told_by_its_share(image: Image, tmp_path: Path) -> None:
    machine = Machine()
    machine.put(made.TEXT, random.Random(1).randbytes(TEXT_SIZE))
    said = refused(image, tmp_path, bytes(machine.bytes), made.PHYSICAL)
    assert "not the memory of this kernel: only " in said
    assert "% of the text's bytes" in said


def test_zeros(image: Image, tmp_path: Path) -> None:
    size = len(Machine().bytes)
    assert "text is all zeros" in refused(image, tmp_path, bytes(size), made.PHYSICAL)
    assert "nothing but zeros" in refused(image, tmp_path, bytes(size), 0x40000000)
    assert "nothing but zeros" in refused(image, tmp_path, core([(0, 0x40000000, bytes(size))]))
    machine = Machine()
    machine.put(made.TEXT, bytes(TEXT_SIZE))
    assert "text is all zeros" in refused(image, tmp_path, bytes(machine.bytes), made.PHYSICAL)


def test_what_is_cut_short(image: Image, tmp_path: Path) -> None:
    memory = bytes(Machine().bytes)
    assert "8192 of the 12288 bytes" in refused(image, tmp_path, memory[:0x2000], made.PHYSICAL)
    assert "8192 of the 12288 bytes" in refused(image, tmp_path, memory[0x1000:], made.PHYSICAL + 0x1000)
    whole = core([(0, made.PHYSICAL, memory)])
    said = refused(image, tmp_path, whole[: len(whole) - len(memory) + 0x1234])
    assert f"its headers name {len(memory) - 0x1234} bytes more than it has" in said
    assert "past the end of the file" in refused(image, tmp_path, whole[:100])


PLACES: dict[str, Callable[[bytes], tuple[bytes, int | None]]] = {
    "bytes lost at the start, physical": lambda m: (m[100:], made.PHYSICAL),
    "bytes lost at the start, virtual": lambda m: (m[0x65:], made.TEXT),
    "bytes before the start": lambda m: (bytes(0x123) + m, made.PHYSICAL),
    "in a core": lambda m: (core([(0, made.PHYSICAL - 0x1000, bytes(0x1010) + m)]), None),
    "in a core by virtual addresses": lambda m: (
        core([(made.TEXT - 0x1000, 0xFFFFFFFF, bytes(0x107) + m)], bits=32),
        None,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_is_not_page_aligned(place: str, image: Image, tmp_path: Path) -> None:
    # Text before and behind, as in a machine's memory: that it is cut short is then no question.
    memory = random.Random(2).randbytes(0x1000) + bytes(Machine().bytes)
    data, base = PLACES[place](memory)
    if base is not None:
        base -= 0x1000
    said = refused(image, tmp_path, data, base)
    assert "not page-aligned: the kernel's text stands in it 0x" in said


def test_a_base_that_is_not_page_aligned(image: Image, tmp_path: Path) -> None:
    said = refused(image, tmp_path, bytes(Machine().bytes), made.PHYSICAL + 0x64)
    assert "not page-aligned" in said
    assert "0x1000064 lies 0x64 bytes past a page boundary" in said


def test_a_core_without_the_text(image: Image, tmp_path: Path) -> None:
    memory = bytes(Machine().bytes)
    behind = core([(0, made.PHYSICAL + TEXT_SIZE, memory[TEXT_SIZE:])])
    assert "the kernel's text is not in it (its banner is, its text is not)" in refused(image, tmp_path, behind)
    nothing = core([(0, 0x8000000, random.Random(3).randbytes(0x8000))])
    assert "the kernel's text is not in it (0xc1000000, 12288 bytes; no banner either)" in refused(
        image, tmp_path, nothing
    )
    assert "the kernel's text is not in it" in refused(image, tmp_path, core([]))


def test_what_is_no_core(image: Image, tmp_path: Path) -> None:
    assert "no core (e_type 2)" in refused(image, tmp_path, core([], kind=2))
    assert "another machine (e_machine 183)" in refused(image, tmp_path, core([], machine=183))
    assert "give --base" in refused(image, tmp_path, b"neither")
    assert "empty" in refused(image, tmp_path, b"", 0)
