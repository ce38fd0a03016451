"""80-bit arithmetic: bounded on every operand, and the transcendental functions against the host.

The four operations, square root, comparisons and conversions are compared
with SoftFloat in test_unicorn.py; here the host's libm is the oracle for what
Unicorn does not compute exactly.
"""

from __future__ import annotations

import math
import random
import struct
import time
from collections.abc import Callable

import pytest

from vmipatch.emu.cpu import float80 as f
from vmipatch.emu.cpu import transcendental as t


def pattern(x: float) -> int:
    return f.from_float(struct.unpack("<Q", struct.pack("<d", x))[0], 64)[0]


def number(x: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", f.to_float(x, 64, f.EXTENDED)[0]))[0])


@pytest.mark.parametrize(
    ("ours", "libm", "low", "high"),
    [
        (t.sine, math.sin, -3.0, 3.0),
        (t.cosine, math.cos, -3.0, 3.0),
        (t.tangent, math.tan, -1.5, 1.5),
        (t.exp2_minus_1, lambda x: math.expm1(x * math.log(2)), -1.0, 1.0),
        (lambda x, c: t.y_log2_x(x, f.ONE, c), math.log2, 0.001, 1000.0),
        (lambda x, c: t.y_log2_x_plus_1(x, f.ONE, c), lambda x: math.log1p(x) / math.log(2), -0.29, 0.41),
        (lambda x, c: t.arctangent(x, f.ONE, c), math.atan, -100.0, 100.0),
        (lambda x, c: t.arctangent(f.ONE, x, c), lambda x: math.atan2(1.0, x), -100.0, 100.0),
        (f.square_root, math.sqrt, 0.0, 1e9),
    ],
)
def test_functions_are_libms(
    ours: Callable[[int, f.Control], f.Result], libm: Callable[[float], float], low: float, high: float
) -> None:
    rng = random.Random(1)
    for _ in range(300):
        x = rng.uniform(low, high)
        result, flags = ours(pattern(x), f.EXTENDED)
        assert math.isclose(number(result), libm(x), rel_tol=4e-16, abs_tol=1e-18), x
        assert flags & ~f.UP in (0, f.INEXACT)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-300, 5e-324, 1.0, -1.0])
def test_small_and_exact_arguments(x: float) -> None:
    assert number(t.sine(pattern(x), f.EXTENDED)[0]) == math.sin(x)
    assert number(t.cosine(pattern(x), f.EXTENDED)[0]) == math.cos(x)
    assert math.copysign(1.0, number(t.exp2_minus_1(pattern(x), f.EXTENDED)[0])) == math.copysign(1.0, x)


def test_exact_values() -> None:
    assert t.exp2_minus_1(f.ONE, f.EXTENDED) == (f.ONE, 0)
    assert number(t.exp2_minus_1(f.SIGN | f.ONE, f.EXTENDED)[0]) == -0.5
    assert t.y_log2_x(pattern(8.0), f.ONE, f.EXTENDED) == (pattern(3.0), 0)
    assert t.y_log2_x(f.ONE, pattern(5.0), f.EXTENDED) == (0, 0)
    assert number(t.arctangent(pattern(0.0), pattern(-1.0), f.EXTENDED)[0]) == math.pi
    assert f.remainder(pattern(7.5), pattern(2.0), f.EXTENDED, nearest=False)[:3] == (pattern(1.5), 0, 3)
    assert f.remainder(pattern(7.5), pattern(2.0), f.EXTENDED, nearest=True)[:3] == (pattern(-0.5), 0, 4)
    assert f.scale(pattern(3.0), pattern(-4.75), f.EXTENDED)[0] == pattern(3.0 / 16)
    assert f.from_bcd(0x80000000000000001234) == pattern(-1234.0)
    assert f.to_bcd(pattern(-1234.4), f.EXTENDED)[0] == 0x80000000000000001234


def test_fprem_is_fmod() -> None:
    rng = random.Random(3)
    for _ in range(400):
        a, b = rng.uniform(-1e9, 1e9), rng.uniform(-1e3, 1e3)
        result, _, _, partial = f.remainder(pattern(a), pattern(b), f.EXTENDED, nearest=False)
        assert not partial
        assert number(result) == math.fmod(a, b)
        result, _, _, _ = f.remainder(pattern(a), pattern(b), f.EXTENDED, nearest=True)
        assert number(result) == math.remainder(a, b)


def test_fprem_of_numbers_far_apart_ends() -> None:
    a, b, steps = 0x7FFE << 64 | f.TOP | 12345, 1, 0
    partial = True
    while partial:
        a, _, _, partial = f.remainder(a, b, f.EXTENDED, nearest=False)
        steps += 1
        assert steps < 2000
    assert f.is_zero(a)


def test_no_operand_takes_long() -> None:
    rng = random.Random(9)
    operations: list[Callable[[int, int], object]] = [
        lambda a, b: f.add(a, b, f.EXTENDED),
        lambda a, b: f.divide(a, b, f.EXTENDED),
        lambda a, b: f.scale(a, b, f.EXTENDED),
        lambda a, b: f.remainder(a, b, f.EXTENDED, nearest=False),
        lambda a, b: f.round_to_integer(a, f.EXTENDED),
        lambda a, b: f.to_bcd(a, f.EXTENDED),
        lambda a, b: t.exp2_minus_1(a, f.EXTENDED),
        lambda a, b: t.y_log2_x(a, b, f.EXTENDED),
        lambda a, b: t.y_log2_x_plus_1(a, b, f.EXTENDED),
        lambda a, b: t.arctangent(a, b, f.EXTENDED),
        lambda a, b: t.out_of_range(a) or t.sine(a, f.EXTENDED),
        lambda a, b: t.out_of_range(a) or t.tangent(a, f.EXTENDED),
    ]
    values = [rng.getrandbits(80) for _ in range(60)]
    values += [0x7FFE << 64 | f.MASK64, 1, f.SIGN | 1, f.INFINITY, f.INDEFINITE, 0, 0x403E << 64 | f.TOP]
    values += [sign << 79 | exponent << 64 | f.TOP for sign in (0, 1) for exponent in (0x3FFE, 0x3FFF, 0x4000, 0x40C8)]
    for operation in operations:
        for a in values:
            begun = time.process_time()
            for b in values[::5]:
                operation(a, b)
            assert time.process_time() - begun < 1.0, hex(a)
