"""Thunks against Indirect Target Selection: where ``its_allocate_thunk`` puts them, worked out by hand."""

from __future__ import annotations

import struct

import pytest

from vmipatch.patch.passes import its

CODE = {
    0: "FFE0CC", 3: "FFE3CC", 7: "FFE7CC", 8: "41FFE0CC", 11: "41FFE3CC", 15: "41FFE7CC",
}  # fmt: skip
PAGES = (0xFFFFFFFFC0200000, 0xFFFFFFFFC0300000)


class Finder:
    """Tells where pages are, one after the other; ``silent`` sites tell nothing."""

    def __init__(self, silent: int = 0) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.silent = silent

    def __call__(self, site: int, begins: int, entered: int) -> int | None:
        self.asked.append((site, begins, entered))
        return PAGES[len(self.asked) - self.silent - 1] if len(self.asked) > self.silent else None


def test_thunks_fill_the_upper_halves_of_cache_lines() -> None:
    thunks = its.Thunks(None, find=Finder())
    # Three bytes each: ten fit into the 32 bytes of an upper half, the eleventh would reach into the next line.
    at = [thunks.target(0x1000, 0) for _ in range(12)]
    assert at == [PAGES[0] + 32 + 3 * i for i in range(10)] + [PAGES[0] + 96, PAGES[0] + 99]
    page = bytes(thunks.pages[0])
    assert page[:32] == b"\xcc" * 32
    assert page[32:65] == bytes.fromhex("FFE0CC") * 10 + b"\xcc" * 3
    assert page[96:102] == bytes.fromhex("FFE0CCFFE0CC")
    assert set(page[102:]) == {0xCC}


@pytest.mark.parametrize(("register", "code"), CODE.items())
def test_a_thunk_is_a_jump_and_int3(register: int, code: str) -> None:
    assert its.code_of(register) == bytes.fromhex(code)
    assert its.code_of(register, bytes.fromhex("D675FD")) == bytes.fromhex("D675FD" + code)


def test_a_full_page_is_followed_by_another() -> None:
    thunks = its.Thunks(None, find=Finder())
    # r11: four bytes, eight in each of 64 upper halves.
    at = [thunks.target(0x1000, 11) for _ in range(64 * 8 + 1)]
    assert at[511] == PAGES[0] + 4096 - 4
    assert at[512] == PAGES[1] + 32
    assert len(thunks.pages) == 2


def test_under_paranoid_fineibt_the_branch_enters_behind_the_undefined_instruction() -> None:
    thunks = its.Thunks(None, bytes.fromhex("EA75FD"), Finder())
    # Seven bytes each: 32, 39, 46, 53 (its last byte is 59), then 60 would end at 66.
    assert [thunks.target(0, 11) for _ in range(5)] == [PAGES[0] + at + 1 for at in (32, 39, 46, 53, 96)]
    assert bytes(thunks.pages[0][32:39]) == bytes.fromhex("EA75FD41FFE3CC")


def test_a_site_that_tells_nothing_leaves_the_next_to_be_asked() -> None:
    finder = Finder(silent=1)
    thunks = its.Thunks(0x2000, find=finder)
    # The first site is in code that is gone: nobody can see where its branch went.
    assert [thunks.target(site, 0) for site in (0x10, 0x20, 0x30)] == [0x2000, PAGES[0] + 35, PAGES[0] + 38]
    assert finder.asked == [(0x10, 32, 32), (0x20, 35, 35)]


def test_the_images_own_thunks_serve_where_no_page_is_known() -> None:
    assert its.Thunks(0x2000).target(0, 11) == 0x2000 + 64 * 11
    assert its.Thunks(0x2000, bytes.fromhex("D675FD")).target(0, 11) == 0x2000 + 64 * 11 - 2
    assert its.Thunks(None).target(0, 11) is None


@pytest.mark.parametrize(
    ("address", "register", "wanted"),
    # The last byte of FF E0 stands one behind its address, of 41 FF E0 two.
    [
        (0x1F, 0, False), (0x1E, 0, True), (0x1E, 8, False), (0x1D, 8, True), (0x3F, 0, True), (0x3E, 8, True),
        (0x20, 0, False),
    ],
)  # fmt: skip
def test_the_last_byte_of_the_branch_decides(address: int, register: int, wanted: bool) -> None:
    assert its.wanted_at(0xFFFFFFFF81000000 + address, register) is wanted


@pytest.mark.parametrize("start", ["E8", "E9", "2EE8", "0F84"])
def test_a_branch_keeps_its_kind(start: str) -> None:
    old = bytes.fromhex(start) + b"\x11\x22\x33\x44"
    new = its.led(old, 0x1000, 0x900)
    assert new[:-4] == old[:-4]
    assert struct.unpack("<i", new[-4:])[0] == 0x900 - 0x1000 - len(old)
