"""Moving replacements: displacements by hand, for the rules of ``need_reloc`` and ``apply_reloc`` (6.4 to 7.3)."""

from __future__ import annotations

import pytest

from vmipatch.errors import PatchError
from vmipatch.isa import nops
from vmipatch.patch.passes import relocate

SITE, SOURCE = 0xFFFFFFFF81000000, 0xFFFFFFFF83000000
"""The replacement stands 0x2000000 bytes above its site."""


def moved(code: str, size: int | None = None, *, site: int = SITE, source: int = SOURCE, bits: int = 64) -> str:
    body = bytes.fromhex(code)
    table = nops.table("p6-11" if bits == 64 else "generic-atomic")
    return relocate.apply(body, site, source, size or len(body), bits, table, branches=False).hex()


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("7202" "cccc", "7202" "cccc"),  # to the very end of the replacement: stays
        ("7200" "cccc", "7200" "cccc"),  # inside
        ("cccc" "72fc", "cccc" "72fc"),  # to its first byte
        ("770d" + "cc" * 13, "770d" + "cc" * 13),
        ("e8fbffffff", "e8fbffffff"),  # a call of itself
        ("e800000000", "e800000000"),  # of what follows: the end
        ("e801000000", "e801000002"),  # one byte beyond it
        ("e8faffffff", "e8faffff01"),  # one byte before it
        ("0f8400000000", "0f8400000000"),
        ("0f8401000000", "0f8401000002"),
        ("488d05f9ffffff", "488d05f9ffffff"),  # lea rax, [rip - 7]: the replacement's first byte
        ("488d0500000000", "488d0500000000"),  # its end
        ("488d0501000000", "488d0501000002"),
    ],
)  # fmt: skip
def test_targets_inside_and_at_the_end_stay(code: str, wanted: str) -> None:
    assert moved(code) == wanted


def test_padding_does_not_lengthen_the_replacement() -> None:
    """Two bytes behind the replacement's end, in its site's padding, is outside."""
    assert moved("e8020000009090", 5) == "e8020000026690"


def test_long_jumps_become_short_where_they_reach() -> None:
    # From 0x40 bytes above the site to 0x21 bytes behind the replacement's jump: 0x61 from the site's.
    assert moved("e921000000", site=SITE, source=SITE + 0x40) == "eb64cccccc"


@pytest.mark.parametrize("code", ["7203cccc", "eb70", "72fd"])
def test_a_short_branch_that_cannot_reach_is_refused(code: str) -> None:
    """The kernel stops with a BUG there; half a displacement would be another branch."""
    with pytest.raises(PatchError, match="displacement") as caught:
        moved(code)
    assert caught.value.address == SITE


@pytest.mark.parametrize(("code", "wanted"), [("7203cccc", "7213cccc"), ("72eccccc", "72fccccc")])
def test_short_branches_move_a_little(code: str, wanted: str) -> None:
    assert moved(code, source=SITE + 0x10) == wanted


def test_32_bit_displacements_wrap() -> None:
    assert moved("e800000080", source=SITE - 0x10) == "e8f0ffff7f"


def test_pause_stays_on_i386() -> None:
    """The loop of 6.5's cpu_relax alternatives: PAUSE between single nops is no part of a run."""
    assert moved("f3909090f390", bits=32) == "f39089f6f390"
