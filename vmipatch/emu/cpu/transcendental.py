"""The x87's transcendental functions, in fixed point with enough guard bits to round rightly.

May import float80.  Results are rounded from about 160 bits: within the last
place the SDM (1, 8.3.10) promises, and the same on every host.  Trigonometric
arguments are reduced by the 66-bit pi that Intel's processors use (SDM 1, 8.3.8).
"""

from __future__ import annotations

from functools import cache

from vmipatch.emu.cpu.float80 import (
    INDEFINITE,
    INEXACT,
    INFINITY,
    INVALID,
    ONE,
    SIGN,
    ZERO_DIVIDE,
    Control,
    Result,
    check,
    denormals,
    finish,
    is_infinite,
    is_zero,
    split,
)

BITS = 200  # fixed-point fraction bits
UNIT = 1 << BITS
PI66 = 0xC90FDAA22168C234C << BITS - 66  # pi as the processor holds it: 66 bits after two


def _fixed(x: int) -> int:
    sign, m, e = split(x)
    value = m << BITS + e if BITS + e >= 0 else m >> -(BITS + e)
    return -value if sign else value


def _unfixed(value: int, control: Control, exact: bool = False) -> Result:
    if value == 0:
        return 0, 0 if exact else INEXACT
    return finish(int(value < 0), abs(value), -BITS, not exact, control)


def _exp_series(x: int) -> int:
    """e**x - 1 for small x."""
    term, total, n = x, 0, 2
    while term not in (0, -1):
        total += term
        term = (term * x >> BITS) // n
        n += 1
    return total


@cache
def ln2() -> int:
    """ln 2 = 2 atanh(1/3)."""
    return 2 * _atanh(UNIT // 3)


def _atanh(y: int) -> int:
    square = y * y >> BITS
    term, total, n = y, 0, 1
    while term:
        total += term // n
        term = term * square >> BITS
        n += 2
    return total


def _ln(x: int) -> int:
    """Natural logarithm of a positive fixed-point number near 1 (0.5 to 2)."""
    y = (x - UNIT) * UNIT // (x + UNIT)
    return _atanh(y) * 2 if y >= 0 else -2 * _atanh(-y)


def _log2(m: int, e: int) -> int:
    """log2 of m * 2**e as fixed point."""
    leading = e + m.bit_length() - 1
    shift = BITS - (m.bit_length() - 1)
    fraction = m << shift if shift >= 0 else m >> -shift
    return (leading << BITS) + _ln(fraction) * UNIT // ln2()


def exp2_minus_1(a: int, control: Control) -> Result:
    """F2XM1: 2**a - 1 for -1 <= a <= 1; outside, where the result is undefined, a itself."""
    bad = check(a)
    if bad is not None:
        return bad
    if is_zero(a):
        return a, 0
    if is_infinite(a):
        return (SIGN | ONE, 0) if a >> 79 else (a, 0)
    sign, m, e = split(a)
    if e + m.bit_length() < -66:
        # 2**a - 1 = a ln 2 to more digits than there are
        result, flags = finish(sign, m * ln2(), e - BITS, True, control)
        return result, flags | INEXACT | denormals(a)
    if a & ~SIGN > ONE:
        return a, 0
    if a & ~SIGN == ONE:
        return (SIGN | ONE - (1 << 64), 0) if sign else (ONE, 0)
    result, flags = _unfixed(_exp_series(_fixed(a) * ln2() >> BITS), control)
    return result, flags | denormals(a)


def y_log2_x(x: int, y: int, control: Control) -> Result:
    """FYL2X: y * log2(x)."""
    bad = check(x, y)
    if bad is not None:
        return bad
    flags = denormals(x, y)
    if x >> 79 and not is_zero(x):
        return INDEFINITE, INVALID
    sign = y >> 79
    if is_zero(x):
        if is_zero(y):
            return INDEFINITE, INVALID
        if is_infinite(y):
            return (sign ^ 1) << 79 | INFINITY, flags
        return (sign ^ 1) << 79 | INFINITY, ZERO_DIVIDE | flags
    if is_infinite(x):
        return (INDEFINITE, INVALID) if is_zero(y) else (sign << 79 | INFINITY, flags)
    if x == ONE:
        return (INDEFINITE, INVALID) if is_infinite(y) else (sign << 79, flags)
    _, m, e = split(x)
    below = e + m.bit_length() - 1 < 0
    if is_infinite(y):
        return (sign ^ below) << 79 | INFINITY, flags
    if is_zero(y):
        return (sign ^ below) << 79, flags
    logarithm = _log2(m, e)
    _, my, ey = split(y)
    exact = m & m - 1 == 0
    result, more = finish(sign ^ (logarithm < 0), abs(logarithm) * my, ey - BITS, not exact, control)
    return result, flags | more


def y_log2_x_plus_1(x: int, y: int, control: Control) -> Result:
    """FYL2XP1: y * log2(x + 1)."""
    bad = check(x, y)
    if bad is not None:
        return bad
    flags = denormals(x, y)
    sign = (x ^ y) >> 79
    if is_infinite(x):
        return (INDEFINITE, INVALID) if x >> 79 or is_zero(y) else (sign << 79 | INFINITY, flags)
    if is_infinite(y):
        return (INDEFINITE, INVALID) if is_zero(x) else (sign << 79 | INFINITY, flags)
    if is_zero(x) or is_zero(y):
        return sign << 79, flags
    (_, mx, ex), (_, my, ey) = split(x), split(y)
    if ex + mx.bit_length() < -66:
        result, more = finish(sign, mx * my * UNIT // ln2(), ex + ey, True, control)
        return result, flags | more | INEXACT
    if ex + mx.bit_length() > BITS:  # so large that 1 more is nothing
        value = abs(_log2(mx, ex)) if not x >> 79 else 0
    else:
        argument = UNIT + _fixed(x)
        if argument <= 0:
            return INDEFINITE, INVALID
        near = UNIT >> 1 < argument < UNIT << 1
        value = abs(_ln(argument)) * UNIT // ln2() if near else abs(_log2(argument, -BITS))
    if value == 0:
        return INDEFINITE, INVALID
    result, more = finish(sign, value * my, ey - BITS, True, control)
    return result, flags | more | INEXACT


def _reduce(a: int) -> tuple[int, int]:
    """Quadrant and remainder in (-pi/4, pi/4] of a finite number, by the 66-bit pi."""
    sign, m, e = split(a)
    extra = max(-(BITS + e), 0)
    value = m << BITS + e if extra == 0 else m >> extra
    half = PI66 >> 1
    quadrant, rest = divmod(value, half)
    if rest > half >> 1:
        quadrant, rest = quadrant + 1, rest - half
    if sign:
        quadrant, rest = -quadrant, -rest
    return quadrant & 3, rest


def _sin_series(x: int) -> int:
    square = x * x >> BITS
    term, total, n = x, 0, 1
    while term not in (0, -1):
        total += term
        term = -(term * square >> BITS) // ((n + 1) * (n + 2))
        n += 2
    return total


def _cos_series(x: int) -> int:
    square = x * x >> BITS
    term, total, n = UNIT, 0, 0
    while term not in (0, -1):
        total += term
        term = -(term * square >> BITS) // ((n + 1) * (n + 2))
        n += 2
    return total


def out_of_range(a: int) -> bool:
    """Whether the argument is too large for the trigonometric instructions (C2)."""
    return not is_infinite(a) and a >> 64 & 0x7FFF >= 16383 + 63 and a >> 64 & 0x7FFF != 0x7FFF


def _trig(a: int, control: Control, offset: int) -> Result:
    bad = check(a)
    if bad is not None:
        return bad
    if is_infinite(a):
        return INDEFINITE, INVALID
    if is_zero(a):
        return (ONE, 0) if offset else (a, 0)
    sign, m, e = split(a)
    flags = denormals(a)
    if e + m.bit_length() < -68:  # sin a is a, cos a is 1, to all digits there are
        if offset:
            return finish(0, (1 << 130) - 1, -130, True, control)[0], INEXACT | flags
        result, more = finish(sign, (m << 70) - 1, e - 70, True, control)
        return result, more | INEXACT | flags
    quadrant, rest = _reduce(a)
    quadrant = quadrant + offset & 3
    value = _cos_series(rest) if quadrant & 1 else _sin_series(rest)
    result, more = _unfixed(-value if quadrant & 2 else value, control)
    return result, more | INEXACT | flags


def sine(a: int, control: Control) -> Result:
    """FSIN."""
    return _trig(a, control, 0)


def cosine(a: int, control: Control) -> Result:
    """FCOS."""
    return _trig(a, control, 1)


def tangent(a: int, control: Control) -> Result:
    """FPTAN."""
    bad = check(a)
    if bad is not None:
        return bad
    if is_infinite(a):
        return INDEFINITE, INVALID
    if is_zero(a):
        return a, 0
    sign, m, e = split(a)
    if e + m.bit_length() < -68:
        result, more = finish(sign, (m << 70) + 1, e - 70, True, control)
        return result, more | INEXACT | denormals(a)
    quadrant, rest = _reduce(a)
    up, down = _sin_series(rest), _cos_series(rest)
    if quadrant & 1:
        up, down = -down, up
    if down < 0:
        up, down = -up, -down
    result, more = finish(int(up < 0), (abs(up) << BITS) // down, -BITS, True, control)
    return result, more | INEXACT | denormals(a)


@cache
def true_pi() -> int:
    """pi by Machin's formula."""
    return 4 * (4 * _atan_inverse(5) - _atan_inverse(239))


def _atan_inverse(n: int) -> int:
    term = UNIT // n
    total, k, sign = 0, 1, 1
    while term:
        total += sign * (term // k)
        term //= n * n
        k, sign = k + 2, -sign
    return total


def _atan(x: int) -> int:
    """arctan of 0 <= x <= 1, fixed point; the argument is halved until the series is short."""
    halvings = 0
    root = x
    while root > UNIT >> 4:
        root = root * UNIT // (UNIT + _sqrt(UNIT + (root * root >> BITS)))
        halvings += 1
    square = root * root >> BITS
    term, total, n, sign = root, 0, 1, 1
    while term:
        total += sign * (term // n)
        term = term * square >> BITS
        n, sign = n + 2, -sign
    return total << halvings


def _sqrt(x: int) -> int:
    from math import isqrt

    return isqrt(x << BITS)


def arctangent(y: int, x: int, control: Control) -> Result:
    """FPATAN: the angle of the point (x, y)."""
    bad = check(y, x)
    if bad is not None:
        return bad
    sign = y >> 79
    flags = denormals(x, y)
    pi = true_pi()
    if is_infinite(y):
        angle = (3 * pi // 4 if x >> 79 else pi // 4) if is_infinite(x) else pi // 2
    elif is_infinite(x) or is_zero(y):
        if not x >> 79:
            return sign << 79, flags
        angle = pi
    elif is_zero(x):
        angle = pi // 2
    else:
        (_, my, ey), (_, mx, ex) = split(y), split(x)
        apart = ey + my.bit_length() - ex - mx.bit_length()
        if apart < -66 and not x >> 79:
            result, more = finish(sign, (my << 140) // mx, ey - ex - 140, True, control)
            return result, flags | more | INEXACT
        if abs(apart) > 66:
            angle = pi // 2 if apart > 0 else pi
        else:
            exponent = min(ey, ex)
            up, across = my << ey - exponent, mx << ex - exponent
            angle = _atan((up << BITS) // across) if up <= across else pi // 2 - _atan((across << BITS) // up)
            if x >> 79:
                angle = pi - angle
    result, more = finish(sign, angle, -BITS, True, control)
    return result, flags | more | INEXACT
