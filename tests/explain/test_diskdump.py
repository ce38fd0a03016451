"""Compressed kdumps of a made-up kernel: what an ELF core of the same memory says, they say."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from tests.corewriter import LZO, PAGE, ZLIB, ZSTD, flattened, kdump, note
from tests.explain import running as made
from vmipatch.errors import ImageError, VmipatchError
from vmipatch.explain import Memory, explain
from vmipatch.image import Image, open_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return open_image(made.build(tmp_path_factory.mktemp("kernel")))


def pages(machine: made.Machine, physical: int = made.PHYSICAL) -> dict[int, bytes]:
    """The machine's memory by frame, without a hole of two pages; and some zeros before it."""
    memory = bytes(machine.bytes)
    memory = memory.ljust(-(-len(memory) // PAGE) * PAGE, b"\0")
    found = {(physical + i) // PAGE: memory[i : i + PAGE] for i in range(0, len(memory), PAGE)}
    hole = (made.END - made.TEXT + physical) // PAGE
    del found[hole], found[hole + 1]
    return {3: bytes(PAGE), 4: bytes(PAGE), 9: b"\x07" * PAGE} | found


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("how", [0, ZLIB, ZSTD])
@pytest.mark.parametrize("bitmaps", [1, 2])
def test_every_page_is_found(tmp_path: Path, bits: int, how: int, bitmaps: int) -> None:
    held = {1: bytes(PAGE), 2: b"a" * PAGE, 7: random.Random(1).randbytes(PAGE), 8: bytes(PAGE), 40000: b"b" * PAGE}
    dump = tmp_path / "dump"
    dump.write_bytes(kdump(held, b"OSRELEASE=6.1\nKERNELOFFSET=0\n", bits=bits, how=how, bitmaps=bitmaps))
    memory = Memory(dump)
    assert memory.info == {"OSRELEASE": "6.1", "KERNELOFFSET": "0"}
    assert [(r.start // PAGE, r.size // PAGE) for r in memory.physical] == [(1, 2), (7, 2), (40000, 1)]
    assert memory.virtual == []
    for frame, page in held.items():
        assert memory.read_physical(frame * PAGE, PAGE) == page
    assert memory.read_physical(2 * PAGE + 4000, 200) is None
    assert memory.read_physical(7 * PAGE + 4000, 200) == held[7][4000:] + bytes(104)
    assert memory.read_physical(1 * PAGE + 4000, 200) == bytes(96) + b"a" * 104
    assert memory.read_physical(3 * PAGE, 1) is None
    (hit,) = memory.find(held[7][100:140], 4)
    assert memory.addresses_of(memory.physical, hit) == 7 * PAGE + 100
    word = int.from_bytes(held[7][96:100], "little")
    assert [memory.addresses_of(memory.physical, x) for x in memory.find_words({word}, 4)[word]] == [7 * PAGE + 96]


def test_bits_behind_the_last_frame_mean_nothing(tmp_path: Path) -> None:
    data = bytearray(kdump({0: b"a" * PAGE} | dict.fromkeys(range(16, 21), b"b" * PAGE), bitmaps=1))
    # 21 frames: the third byte's bits from the sixth on, and all bytes behind it, are no frames.
    data[2 * PAGE + 2] |= 0xE0
    data[2 * PAGE + 3 : 2 * PAGE + 90] = b"\xff" * 87
    dump = tmp_path / "dump"
    dump.write_bytes(data)
    assert [(r.start // PAGE, r.size // PAGE) for r in Memory(dump).physical] == [(0, 1), (16, 5)]


def test_pieces_that_a_flattened_dump_leaves_out_are_zeros(tmp_path: Path) -> None:
    held = {frame: bytes(PAGE) if 3 < frame < 9 else bytes((frame,)) * PAGE for frame in range(1, 12)}
    dump = tmp_path / "dump"
    whole = kdump(held, how=0)
    dump.write_bytes(flattened(whole, 512))
    assert dump.stat().st_size < len(whole)
    memory = Memory(dump)
    assert all(memory.read_physical(frame * PAGE, PAGE) == page for frame, page in held.items())


def test_a_page_of_another_size_is_damage(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    data = kdump({1: b"x" * PAGE}, how=ZLIB)
    short = zlib.compress(b"x" * 100)
    at = data.index(zlib.compress(b"x" * PAGE))
    for body in (short, zlib.compress(b"x" * (PAGE + 1))):
        entry = data.index((at).to_bytes(8, "little"))
        changed = bytearray(data[:at] + body)
        changed[entry + 8 : entry + 12] = len(body).to_bytes(4, "little")
        dump.write_bytes(changed)
        with pytest.raises(ImageError, match=r"a page of \d+ bytes"):
            Memory(dump).read_physical(PAGE, 8)


@pytest.mark.parametrize("slide", [0, 0x1400000])
@pytest.mark.parametrize("flat", [False, True])
def test_a_kernel_is_explained(image: Image, tmp_path: Path, slide: int, flat: bool) -> None:
    machine = made.Machine(slide=slide)
    where = made.function(11) + made.OFF_TARGET
    machine.put(where, b"\xcc")
    data = kdump(pages(machine, made.PHYSICAL + slide), note(b"x", 0, b""))
    dump = tmp_path / "dump"
    dump.write_bytes(flattened(data) if flat else data)
    found = explain(image, Memory(dump))
    assert found.slide == slide
    assert [u.address for u in found.unexplained] == [where]
    assert found.by_cause["mcount"] == 5 * made.FUNCTIONS


def test_cr3_of_qemus_notes(tmp_path: Path) -> None:
    state = bytes(8 + 18 * 8 + 240) + (1).to_bytes(8, "little") + bytes(16) + (0x5678000).to_bytes(8, "little")
    dump = tmp_path / "dump"
    dump.write_bytes(kdump({1: b"x" * PAGE}, notes=note(b"QEMU", 0, state + bytes(64))))
    assert Memory(dump).cr3 == (0x5678000,)


def test_what_cannot_be_read_is_said(image: Image, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    data = kdump(pages(made.Machine()))

    def refused(content: bytes) -> str:
        dump.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            explain(image, Memory(dump))
        return str(caught.value)

    assert "compressed by LZO" in refused(kdump(pages(made.Machine()), how=LZO))
    assert "cut short: it ends within its header" in refused(data[:300])
    assert "bitmaps lie past the end" in refused(data[: 2 * PAGE])
    assert "cut short: its headers name" in refused(data[:-300])
    assert "cut short" in refused(flattened(data)[: 2 * PAGE])
    assert "without content" in refused(flattened(data)[:PAGE])
    assert "block size" in refused(data[:400] + bytes(112) + data[512:])
    assert "text is not in it" in refused(data[: 2 * PAGE] + bytes(2 * PAGE) + data[4 * PAGE :])  # no page at all
    broken = bytearray(data)
    broken[-600:-300] = bytes(300)
    assert "cannot be unpacked" in refused(bytes(broken))


def test_any_compressed_dump_gives_a_result_or_an_error_of_ours(image: Image, tmp_path: Path) -> None:
    chosen = random.Random(13)
    whole = kdump(pages(made.Machine()), b"KERNELOFFSET=0\n", note(b"QEMU", 0, bytes(500)))
    heads = [*range(400, 460), *range(PAGE, PAGE + 110), *range(2 * PAGE, 2 * PAGE + 300)]
    table = 2 * PAGE + 2 * PAGE
    dump = tmp_path / "dump"
    for turn in range(120):
        damaged = bytearray(whole)
        for _ in range(chosen.randrange(1, 6)):
            at = chosen.choice((chosen.choice(heads), table + chosen.randrange(24 * 24), chosen.randrange(len(whole))))
            damaged[at] = chosen.choice((0, 255, chosen.randrange(256)))
        dump.write_bytes(flattened(bytes(damaged)) if turn % 4 == 0 else damaged)
        try:
            found = explain(image, Memory(dump))
        except VmipatchError:
            continue
        assert found.pristine + found.explained + found.unexplained_bytes == found.total
