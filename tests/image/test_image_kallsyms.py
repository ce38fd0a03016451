"""Kallsyms found and decoded in every layout that kernels have had."""

from __future__ import annotations

import itertools
import random

import pytest
from kallsyms_writer import Symbol, build, symbols

from vmipatch.image import kallsyms

BASE = {32: 0xC1000000, 64: 0xFFFFFFFF81000000}
# Where the first byte of the tables' surroundings is loaded: among the symbols, as a kernel's .rodata is.
LOADED = {32: 0xC1100000, 64: 0xFFFFFFFF81100000}
LAYOUTS = [
    (bits, addresses, era)
    for bits, addresses, era in itertools.product(
        (32, 64), ("absolute", "relative", "percpu", "self"), ("2.6", "4.20", "6.2", "6.4", "7.0")
    )
    if not (bits == 32 and addresses == "percpu") and (era == "7.0") == (addresses == "self")
] + [(32, "absolute", "7.0")]


def noisy(blob: bytes, seed: int = 1) -> bytes:
    """The tables between other constant data, some of it with digits that are no token table."""
    dice = random.Random(seed)
    front = b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0" + dice.randbytes(4075) + bytes(64)
    return front + bytes(-len(front) % 8) + blob + bytes(8) + dice.randbytes(4000)


def decode(rows: list[Symbol], bits: int, addresses: str, era: str) -> kallsyms.Kallsyms | None:
    front = len(noisy(b"")) - 4008
    data = noisy(build(rows, bits=bits, addresses=addresses, era=era, place=LOADED[bits] + front))
    return find(data, bits)


def find(data: bytes, bits: int) -> kallsyms.Kallsyms | None:
    return kallsyms.find(data, bits, [(0, len(data))], lambda offset: LOADED[bits] + offset)


@pytest.mark.parametrize(("bits", "addresses", "era"), LAYOUTS)
@pytest.mark.parametrize("count", [257, 511, 512, 513, 1500])
def test_every_layout_reads_back(bits: int, addresses: str, era: str, count: int) -> None:
    percpu = 30 if addresses == "percpu" else 0
    long_every = 50 if era in ("6.2", "6.4", "7.0") else 0
    rows = symbols(count, BASE[bits], seed=count, percpu=percpu, long_every=long_every)
    found = decode(rows, bits, addresses, era)
    assert found is not None
    assert list(zip(found.addresses, found.entries, strict=True)) == [(a, k + n) for a, k, n in rows]
    assert [found.entry(i) for i in range(len(found))] == found.entries


def test_long_names_are_really_long() -> None:
    rows = symbols(600, BASE[32], long_every=50)
    names = build(rows, bits=32, addresses="relative", era="6.2")
    found = decode(rows, 32, "relative", "6.2")
    assert found is not None
    assert max(len(e) for e in found.entries) > 400
    assert names.count(b"\x80") + names.count(b"\x81") > 0


def test_an_address_belongs_to_the_last_symbol_before_it_and_to_the_first_of_aliases() -> None:
    rows = [(0xC1000000 + 16 * (i // 2), "T", f"name{i:04}") for i in range(600)]
    found = decode(rows, 32, "relative", "4.20")
    assert found is not None
    assert found.entry(found.floor(0xC1000000)) == "Tname0000"
    assert found.entry(found.floor(0xC100000F)) == "Tname0000"
    assert found.entry(found.floor(0xC1000010)) == "Tname0002"
    assert found.entry(found.floor(0xFFFFFFFF)) == "Tname0598"
    assert found.floor(0xC0FFFFFF) == -1


def test_by_name_prefers_the_global_symbol() -> None:
    rows = [(0xC1000000 + 16 * i, "t", f"name{i:04}") for i in range(600)]
    rows[10] = (rows[10][0], "t", "twice")
    rows[20] = (rows[20][0], "T", "twice")
    rows[30] = (rows[30][0], "t", "static")
    rows[40] = (rows[40][0], "t", "static")
    found = decode(rows, 32, "relative", "6.4")
    assert found is not None
    assert found.lookup("twice") == rows[20][0]
    assert found.lookup("static") == rows[30][0]


@pytest.mark.parametrize("damage", ["index", "marker", "name", "count", "addresses"])
def test_tables_that_contradict_each_other_are_not_believed(damage: str) -> None:
    rows = symbols(600, BASE[32])
    data = bytearray(build(rows, bits=32, addresses="relative", era="4.20"))
    offsets = 4 * len(rows) + 4
    count = data.index((600).to_bytes(4, "little"), offsets)
    assert count == offsets
    if damage == "index":
        data[-100] ^= 1
    elif damage == "count":
        data[count : count + 4] = (601).to_bytes(4, "little")
    elif damage == "name":
        data[count + 4] ^= 1
    elif damage == "addresses":
        data[400:404] = b"\xff\xff\xff\x7f"
    else:
        tokens = kallsyms._token_table(bytes(data), data.index(b"0\0001\0002\0"))
        assert tokens is not None
        data[tokens[1] - 4 - tokens[1] % 4] ^= 1
    assert find(bytes(data), 32) is None


@pytest.mark.parametrize("addresses", ["absolute", "relative"])
@pytest.mark.parametrize("bits", [32, 64])
def test_addresses_that_do_not_rise_are_not_believed(addresses: str, bits: int) -> None:
    rows = symbols(600, BASE[bits])
    rows[300] = (rows[250][0], *rows[300][1:])
    assert decode(rows, bits, addresses, "4.20") is None


def test_names_that_end_before_the_markers_are_not_believed() -> None:
    for count in range(600, 640):
        rows = [(0xC1000000 + 16 * i, "T", f"name{i:04}" + "x" * (i % 3)) for i in range(count)]
        data = bytearray(build(rows, bits=32, addresses="relative", era="2.6"))
        tokens = kallsyms._token_table(bytes(data), data.index(b"0\0001\0002\0"))
        assert tokens is not None
        padding = tokens[1] - tokens[1] % 4 - 4 * ((count + 255) // 256) - 1
        if data[padding] == 0:
            data[padding] = 1
            assert find(bytes(data), 32) is None
            return
    pytest.fail("none of these tables has padding")


def test_nothing_in_nothing() -> None:
    assert find(b"", 32) is None
    assert find(bytes(100000), 64) is None
    digits = b"".join(b"%d\0" % (i % 10) for i in range(20000))
    assert find(digits, 32) is None


@pytest.mark.parametrize(("bits", "addresses", "era"), LAYOUTS)
def test_lookup_by_the_kernels_own_order_of_names(bits: int, addresses: str, era: str) -> None:
    percpu = 30 if addresses == "percpu" else 0
    rows = [
        (a, k, "twin" if 100 < i < 104 else n) for i, (a, k, n) in enumerate(symbols(700, BASE[bits], percpu=percpu))
    ]
    found = decode(rows, bits, addresses, era)
    assert found is not None
    assert (found._order is not None) == (tuple(map(int, era.split("."))) >= (6, 2))
    for name in {n for _, _, n in rows}:
        same = [(not k.isupper(), a) for a, k, n in rows if n == name]
        assert found.lookup(name) == min(same)[1], name
    assert found.lookup("no_such_name") is None
    assert found.lookup("") is None
    assert found.lookup("zzzz") is None
