"""Dumps as ELF cores, page tables and boot_cpu_data: each laid out here from its manual."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from tests.corewriter import core, note
from tests.explain import running as made
from vmipatch.errors import ImageError, VmipatchError
from vmipatch.explain import Memory, cpudata, explain, paging
from vmipatch.image import open_image

FORMS = {
    "QEMU without paging": lambda m: core([(0, made.PHYSICAL, bytes(m.bytes))]),
    "32-bit, physical": lambda m: core([(0, made.PHYSICAL, bytes(m.bytes))], bits=32),
    "kdump": lambda m: core([(made.TEXT, made.PHYSICAL, bytes(m.bytes))], bits=32),
    "kcore": lambda m: core([(made.TEXT, 0xFFFFFFFF, bytes(m.bytes))], bits=32),
    "two segments": lambda m: core(
        [(0, made.PHYSICAL + 0x1800, bytes(m.bytes[0x1800:])), (0, made.PHYSICAL, bytes(m.bytes[:0x1800]))]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_core_is_explained(form: str, tmp_path: Path) -> None:
    image = open_image(made.build(tmp_path))
    dump = tmp_path / "core"
    dump.write_bytes(FORMS[form](made.Machine()))
    found = explain(image, Memory(dump))
    assert found.unexplained == []
    assert found.by_cause["mcount"] == 5 * made.FUNCTIONS


@pytest.mark.parametrize("slide", [0x1000000, 0x3400000])
def test_a_moved_kernel_in_a_core_is_found_by_banner_and_by_vmcoreinfo(slide: int, tmp_path: Path) -> None:
    image = open_image(made.build(tmp_path))
    dump = tmp_path / "core"
    machine = made.Machine(slide=slide)
    memory = (0, made.PHYSICAL + slide, bytes(machine.bytes))
    info = note(b"VMCOREINFO", 0, f"OSRELEASE=6.1.0-99-686\nKERNELOFFSET={slide:x}\n".encode())
    hows = []
    for notes in (b"", info):
        dump.write_bytes(core([memory], notes))
        found = explain(image, Memory(dump))
        assert (found.slide, found.unexplained) == (slide, [])
        hows.append(found.evidence[0])
    assert "banner" in hows[0]
    assert "VMCOREINFO" in hows[1]


def test_notes_of_qemu_give_cr3(tmp_path: Path) -> None:
    # QEMUCPUState: version and size, 18 registers, 10 segments of 24 bytes, cr0 to cr4.
    state = struct.pack("<II", 1, 440) + bytes(18 * 8 + 240) + struct.pack("<5Q", 1, 0, 2, 0x1234000, 4) + bytes(8)
    dump = tmp_path / "core"
    dump.write_bytes(core([(0, 0, bytes(4096))], note(b"CORE", 1, bytes(144)) + note(b"QEMU", 0, state)))
    assert Memory(dump).cr3 == (0x1234000,)


def test_damaged_cores_are_refused_or_read(tmp_path: Path) -> None:
    image = open_image(made.build(tmp_path))
    whole = core([(0, made.PHYSICAL, bytes(made.Machine().bytes))])
    dump = tmp_path / "core"
    for size in (4, 40, 63, 100, 150, 180, 0x1000, 0x3000):
        dump.write_bytes(whole[:size])
        with pytest.raises(VmipatchError):
            explain(image, Memory(dump))
    # The text is whole, what comes behind it is not.
    dump.write_bytes(whole[: len(whole) // 2])
    found = explain(image, Memory(dump))
    assert any("cut short" in w for w in found.warnings)
    dump.write_bytes(core([], kind=2))
    with pytest.raises(ImageError, match="no core"):
        Memory(dump)
    dump.write_bytes(core([], machine=183))
    with pytest.raises(ImageError, match="another machine"):
        Memory(dump)
    dump.write_bytes(core([(0, 0x8000000, bytes(0x10000))]))
    with pytest.raises(ImageError, match=r"zeros|not in it"):
        explain(image, Memory(dump))


def tables(mode: str) -> tuple[dict[int, int], int, int]:
    """Entries by physical address for one page (virtual 0xC1234000 or the like) and one large page."""
    if mode == "32-bit":
        # SDM vol. 3, 4.3: bits 31:22 and 21:12.
        return {0x1000 + 0x304 * 4: 0x2001, 0x2000 + 0x234 * 4: 0x77001, 0x1000 + 0x305 * 4: 0x00C00081}, 4, 0xC1234ABC
    if mode == "PAE":
        # 4.4: bits 31:30, 29:21, 20:12; the pointer table has four entries.
        return {
            0x1020 + 3 * 8: 0x2001, 0x2000 + 9 * 8: 0x3001, 0x3000 + 0x34 * 8: 0x8000000000077001,
            0x2000 + 10 * 8: 0xA00081,
        }, 8, 0xC1234ABC  # fmt: skip
    # 4.5: bits 47:39, 38:30, 29:21, 20:12.
    return {
        0x1000 + 511 * 8: 0x2001, 0x2000 + 510 * 8: 0x3001, 0x3000 + 9 * 8: 0x4001, 0x4000 + 0x34 * 8: 0x77001,
        0x3000 + 10 * 8: 0xA00081,
    }, 8, 0xFFFFFFFF81234ABC  # fmt: skip


@pytest.mark.parametrize("name", ["32-bit", "PAE", "4 levels"])
def test_page_tables(name: str) -> None:
    entries, size, virtual = tables(name)
    mode = next(m for modes in paging.MODES.values() for m in modes if m.name == name)

    def read(physical: int, length: int) -> bytes | None:
        assert length == size
        return entries.get(physical, 0).to_bytes(size, "little")

    root = 0x1020 if name == "PAE" else 0x1000
    assert paging.walk(read, root, mode, virtual) == 0x77ABC
    large, base = (0x400000, 0xC00000) if name == "32-bit" else (0x200000, 0xA00000)
    in_large = (virtual & ~(large - 1)) + large + 0x12345
    assert paging.walk(read, root, mode, in_large) == base + 0x12345
    assert paging.walk(read, root, mode, virtual + 0x1000) is None
    assert paging.walk(lambda a, n: None, root, mode, virtual) is None
    # Bit 0 is the presence; the others mean nothing without it.
    entries[min(entries)] &= ~1
    assert paging.walk(read, root, mode, virtual) is None


def test_boot_cpu_data_of_32_and_64_bits() -> None:
    words = (0x078BFBFD, 0, 5, *range(6, 27))
    # i386: the array begins right behind cpuid_level; x86-64 may pad before it.
    for padding in (b"", bytes(4)):
        data = bytes((6, 0, 26, 3)) + bytes(24) + struct.pack("<Ii", 0x80000008, 11) + padding
        data += struct.pack("<24I", *words) + b"GenuineIntel" + bytes(64)
        found = cpudata.parse(data, (6, 1, 0))
        assert found is not None
        assert found.words == words
        assert (found.vendor, found.family, found.model, found.stepping) == ("GenuineIntel", 6, 26, 3)
    # From 6.10 the model stands first.
    found = cpudata.parse(bytes((26, 6, 0, 0, 3)) + data[5:], (6, 12, 0))
    assert found is not None
    assert (found.family, found.model, found.stepping) == (6, 26, 3)
    assert cpudata.parse(bytes(512), (6, 1, 0)) is None
    assert cpudata.parse(b"GenuineIntel" * 40, (6, 1, 0)) is None


def test_any_core_gives_a_result_or_an_error_of_ours(tmp_path: Path) -> None:
    """Random damage to the headers and notes: never a traceback."""
    image = open_image(made.build(tmp_path))
    info = note(b"VMCOREINFO", 0, b"KERNELOFFSET=0\nNUMBER(phys_base)=0\n")
    whole = core([(0, made.PHYSICAL, bytes(made.Machine().bytes))], info)
    chosen = random.Random(11)
    dump = tmp_path / "core"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chosen.randrange(1, 6)):
            at = chosen.randrange(320)
            damaged[at] = chosen.choice((0, 255, chosen.randrange(256), damaged[at] ^ (1 << chosen.randrange(8))))
        dump.write_bytes(damaged)
        try:
            found = explain(image, Memory(dump))
        except VmipatchError:
            continue
        assert found.pristine + found.explained + found.unexplained_bytes == found.total


def test_pages_that_are_mapped_more_than_once(tmp_path: Path) -> None:
    """QEMU with paging names a page once for each of its addresses: the file has it once."""
    body = random.Random(8).randbytes(0x8000)
    dump = tmp_path / "core"
    data = bytearray(core([(0xC0000000, 0, body), (0xF0001000, 0x2000, b""), (0xF0005000, 0x3000, b"")]))
    for row, size in ((2, 0x1000), (3, 0x2000)):
        at = 64 + 56 * row
        offset = len(data) - len(body) + (0x2000 if row == 2 else 0x3000)
        data[at + 8 : at + 16] = offset.to_bytes(8, "little")
        data[at + 32 : at + 48] = size.to_bytes(8, "little") * 2
    dump.write_bytes(data)
    memory = Memory(dump)
    assert memory.read_physical(0x1800, 0x5000) == body[0x1800:0x6800]
    assert memory.read_physical(0x6100, 0x100) == body[0x6100:0x6200]
    assert memory.read_virtual(0xC0001800, 0x5000) == body[0x1800:0x6800]
    assert memory.read_virtual(0xF0005000, 0x2000) == body[0x3000:0x5000]
    assert memory.read_virtual(0xF0005000, 0x2001) is None
    (hit,) = memory.find(body[0x3100:0x3140], 9)
    assert memory.addresses_of(memory.physical, hit) == 0x3100
    assert set(memory.all_addresses(memory.virtual, hit)) == {0xC0003100, 0xF0005100}


def test_segments_that_all_say_physical_zero_have_no_physical_address(tmp_path: Path) -> None:
    """Older kernels wrote 0 for every segment of /proc/kcore; one at 0 is where memory begins."""
    dump = tmp_path / "core"
    dump.write_bytes(core([(0xC0000000, 0, b"a" * 0x1000), (0xF8000000, 0, b"b" * 0x1000)]))
    assert Memory(dump).physical == []
    dump.write_bytes(core([(0xC0000000, 0, b"a" * 0x1000), (0xF8000000, (1 << 64) - 1, b"b" * 0x1000)]))
    assert [(r.start, r.size) for r in Memory(dump).physical] == [(0, 0x1000)]


def test_words_are_found_where_their_addresses_are_aligned(tmp_path: Path) -> None:
    """Whatever the segments' places in the file are; and a word that lies askew is none."""
    dump = tmp_path / "core"
    word = 0x11223344.to_bytes(4, "little")
    first = bytes(5) + word + bytes(3) + word + bytes(7)
    dump.write_bytes(core([(0, 0x1000, first), (0, 0x9003, bytes(1) + word + bytes(4))], b"odd"))
    memory = Memory(dump)
    places = [memory.addresses_of(memory.physical, x) for x in memory.find_words({0x11223344}, 4)[0x11223344]]
    assert places == [0x100C, 0x9004]


def test_what_lies_across_two_pieces_of_a_search_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmipatch.explain.memory.CHUNK", 256)
    body = bytearray(4096)
    for place in (250, 510, 1000):
        body[place : place + 12] = b"here it is.."
    dump = tmp_path / "dump"
    dump.write_bytes(body)
    memory = Memory(dump, 0)
    assert list(memory.find(b"here it is..", 9)) == [250, 510, 1000]
    assert list(memory.find(b"here", 2)) == [250, 510]
    assert list(memory.find(b"here", 9, step=8)) == [1000]


def test_address_space_without_memory_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/kcore names tens of terabytes for vmalloc: nobody has the time to look for anything there."""
    data = bytearray(core([(0xC0000000, 0x1000, b"needle".ljust(0x1000)), (0xF0000000, (1 << 64) - 1, b"")]))
    row = 64 + 56 * 2
    data[row + 32 : row + 48] = (1 << 36).to_bytes(8, "little") * 2
    dump = tmp_path / "core"
    with dump.open("wb") as file:
        file.write(data)
        file.truncate(1 << 36)
    memory = Memory(dump)
    asked: list[int] = []
    read = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        asked.append(length)
        assert sum(asked) <= 0x2000, "more is searched than the segment that has memory"
        return read(descriptor, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pread", counted)
        assert len(list(memory.find(b"needle", 9))) == 1
    assert sum(asked) >= 0x1000, "the search does not read by os.pread: nothing was counted"
    assert memory.read_virtual(0xF0001000, 4) == bytes(4)
