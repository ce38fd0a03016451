"""BTF: offsets and sizes by name, from types that were encoded by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.explain.modules import made
from vmipatch.errors import ImageError
from vmipatch.explain.modules.btf import Btf, Types, read


def writer() -> made.BtfWriter:
    types = made.BtfWriter()
    integer, byte, pointer = types.integer("int", 4), types.integer("u8", 1), types.pointer(0)
    inner = types.structure("", 8, [("a", integer, 0), ("b", integer, 4)])
    either = types.structure("", 8, [("p", pointer, 0), ("", inner, 0)], union=True)
    named = types.add("inner_t", 8, types.add("", 10, inner))  # typedef of const
    types.structure(
        "outer",
        64,
        [
            ("first", byte, 0),
            ("", either, 8),
            ("many", types.array(named, integer, 4), 16),
            ("tail", types.array(byte, integer, 0), 48),
        ],
    )
    # kind_flag: bits 31:24 are the width of a bitfield.
    types.structure(
        "flags", 4, [("x", integer, 3 << 24 | 0), ("y", integer, 13 << 24 | 3), ("z", integer, 16)], bits=True
    )
    old = types.integer("bits5", 4, bits=5, offset=2)
    types.structure("old_flags", 4, [("f", old, 0), ("g", old, 1)])
    types.enum("kinds", {"TEXT": 0, "DATA": 1, "LAST": -1})
    return types


def test_members_nested_anonymous_arrays() -> None:
    types = Btf(writer().build())
    assert types.size("outer") == 64
    assert types.offset("outer", "first") == 0
    assert types.offset("outer", "p") == 8
    assert types.offset("outer", "b") == 12
    field = types.field("outer", "many")
    assert field is not None
    assert (field.offset, field.size, field.elements) == (16, 32, 4)
    assert types.offset("outer", "many[3].b") == 16 + 3 * 8 + 4
    assert types.offset("outer", "many[4].b") is None
    assert types.offset("outer", "tail") == 48
    assert types.offset("outer", "nothing") is None
    assert types.offset("outer", "first.x") is None
    assert types.offset("outer", "many]") is None
    assert types.size("absent") is None
    assert [(n, f.offset) for n, f in types.members("outer")] == [("first", 0), ("", 8), ("many", 16), ("tail", 48)]


def test_bitfields_of_both_encodings() -> None:
    types = Btf(writer().build())
    found = [types.field("flags", name) for name in "xyz"]
    assert [(f.bit, f.bits, f.offset, f.size) for f in found if f] == [(0, 3, 0, 1), (3, 13, 0, 2), (16, 0, 2, 4)]
    old = [types.field("old_flags", name) for name in "fg"]
    assert [(f.bit, f.bits) for f in old if f] == [(2, 5), (10, 5)]


def test_enumerators() -> None:
    types = Btf(writer().build())
    assert [types.enumerator("kinds", n) for n in ("TEXT", "DATA", "LAST", "NONE")] == [0, 1, 0xFFFFFFFF, None]
    assert types.enumerator("outer", "TEXT") is None


def test_pointers_are_as_wide_as_the_kernel() -> None:
    types = Btf(writer().build(), bits=32)
    field = types.field("outer", "p")
    assert field is not None
    assert field.size == 4


def test_a_kind_that_came_later_is_skipped_by_its_layout() -> None:
    types = made.BtfWriter()
    types.add("later", 21, 0, bytes(4 + 2 * 8), elements=2)
    integer = types.integer("int", 4)
    types.structure("after", 4, [("m", integer, 0)])
    layout = bytes(4 * 21) + bytes((4, 8, 0, 0))
    assert Btf(types.build(layout)).size("after") == 4
    with pytest.raises(ImageError, match="kind 21, which nobody knows"):
        Btf(types.build())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x9f\xeb", "cut short"),
        (bytes(24), "not BTF"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 400, 400, 10), "past its 24 bytes"),
        (writer().build()[:-40], "past its"),
        (
            struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 1) + struct.pack("<III", 0, 4 << 24 | 9, 0) + b"\0",
            "runs past the end",
        ),
    ],
)
def test_damage_is_one_line_with_its_place(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        Btf(data, file="k", offset=0x1000)
    assert caught.value.section == ".BTF"
    assert caught.value.offset is not None
    assert caught.value.offset >= 0x1000


def test_types_that_stand_for_themselves_end() -> None:
    types = made.BtfWriter()
    types.add("me", 8, 1)
    types.structure("s", 8, [("m", 1, 0), ("", 2, 0)])
    found = Btf(types.build())
    with pytest.raises(ImageError, match="stands for itself"):
        found.field("s", "m")


def test_a_structure_in_itself_ends() -> None:
    types = made.BtfWriter()
    types.structure("s", 8, [("", 1, 0), ("", 1, 0), ("", 1, 0)])
    assert Btf(types.build()).field("s", "nothing") is None


def test_read_of_an_image(tmp_path: Path) -> None:
    image, types = made.opened(tmp_path)
    assert types.offset("module", "mem[2].size") == made.MEM + 2 * 16 + 8
    found = read(image)
    assert found is not None
    assert found.size("module") == made.MODULE_SIZE


def test_damaged_types_of_an_image_are_said_once(tmp_path: Path) -> None:
    image, _ = made.opened(tmp_path, made.btf()[:100])
    types = Types(image)
    assert types.offset("module", "mem") is None
    assert types.error is not None
    assert ".BTF" in types.error
