"""Arithmetic on 80-bit floating point numbers, exact to the last bit, on whole numbers.

May import nothing of the package.  A number is the 80-bit pattern as one
integer: sign, 15 bits of exponent, 64 bits of significand with its leading 1.
Every operation takes a :class:`Control` and returns the result's pattern and
the exceptions it raised (SDM 1, chapter 8), with ``UP`` where rounding made the
magnitude larger (condition code C1).  C's ``long double`` would be faster, but
is not 80 bits everywhere and would leave the uncompiled engine without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

INVALID, DENORMAL, ZERO_DIVIDE, OVERFLOW, UNDERFLOW, INEXACT = 1, 2, 4, 8, 16, 32
STACK = 64
UP = 0x200
BEFORE = INVALID | DENORMAL | ZERO_DIVIDE  # found before the operation: if unmasked, nothing is stored

BIAS = 16383
TOP = 1 << 63
SIGN = 1 << 79
INFINITY = 0x7FFF << 64 | TOP
INDEFINITE = SIGN | 0x7FFF << 64 | 3 << 62
ONE = BIAS << 64 | TOP
MASK64 = (1 << 64) - 1
WRAP = 24576  # exponent adjustment of an unmasked overflow or underflow

NEAREST, DOWN, UPWARD, CHOP = range(4)

Result = tuple[int, int]


@dataclass(frozen=True)
class Control:
    """Precision in bits (24, 53, 64), rounding (0 nearest, 1 down, 2 up, 3 chop), exception masks."""

    precision: int = 64
    rounding: int = NEAREST
    masks: int = 0x3F


EXTENDED = Control()


def is_nan(x: int) -> bool:
    return x >> 64 & 0x7FFF == 0x7FFF and x & MASK64 > TOP and bool(x & TOP)


def is_signalling(x: int) -> bool:
    return is_nan(x) and not x & 1 << 62


def is_infinite(x: int) -> bool:
    return x & ~SIGN == INFINITY


def is_zero(x: int) -> bool:
    return x & ~SIGN == 0


def is_denormal(x: int) -> bool:
    return x >> 64 & 0x7FFF == 0 and x & MASK64 != 0


def is_unsupported(x: int) -> bool:
    """Pseudo-NaN, pseudo-infinity or unnormal: no operand since the 387."""
    return x >> 64 & 0x7FFF != 0 and not x & TOP


def split(x: int) -> tuple[int, int, int]:
    """Sign, significand and exponent of a finite number: significand * 2**exponent."""
    return x >> 79, x & MASK64, max(x >> 64 & 0x7FFF, 1) - BIAS - 63


def quiet(x: int) -> int:
    return x | 1 << 62


def propagate(a: int, b: int) -> Result:
    """The NaN that an operation with a NaN operand gives (SDM 1, table 4-7)."""
    flags = INVALID if is_signalling(a) or is_signalling(b) else 0
    if not is_nan(b):
        return quiet(a), flags
    if not is_nan(a):
        return quiet(b), flags
    if is_signalling(a) != is_signalling(b):
        return (b, flags) if is_signalling(a) else (a, flags)
    left, right = a & MASK64, b & MASK64
    if left == right:
        return quiet(min(a, b)), flags
    return quiet(a if left > right else b), flags


def check(*operands: int) -> Result | None:
    """The result that bad operands force, or None."""
    if any(is_unsupported(x) for x in operands):
        return INDEFINITE, INVALID
    if any(is_nan(x) for x in operands):
        return propagate(operands[0], operands[-1])
    return None


def denormals(*operands: int) -> int:
    return DENORMAL if any(is_denormal(x) for x in operands) else 0


def round_bits(magnitude: int, shift: int, sticky: bool, sign: int, rounding: int) -> tuple[int, bool, bool]:
    """Drop ``shift`` low bits: the rounded magnitude, whether inexact, whether it grew."""
    if shift <= 0:
        kept, rest, half = magnitude << -shift, 0, 1
    else:
        kept, rest, half = magnitude >> shift, magnitude & (1 << shift) - 1, 1 << shift - 1
    inexact = bool(rest) or sticky
    if not inexact:
        return kept, False, False
    if rounding == NEAREST:
        grow = shift > 0 and (rest > half or (rest == half and (sticky or bool(kept & 1))))
    elif rounding == CHOP:
        grow = False
    else:
        grow = bool(sign) == (rounding == DOWN)
    return kept + grow, True, grow


def finish(sign: int, magnitude: int, exponent: int, sticky: bool, control: Control) -> Result:
    """Round ``magnitude * 2**exponent`` (not zero) to the control's precision and pack it."""
    leading = exponent + magnitude.bit_length() - 1
    flags = 0
    precision = control.precision
    # Tiny is decided after rounding as if the exponent had no limit.
    kept, inexact, grew = round_bits(magnitude, leading - (precision - 1) - exponent, sticky, sign, control.rounding)
    after = leading + (kept.bit_length() > precision)
    if after < 1 - BIAS:
        if not control.masks & UNDERFLOW:
            flags |= UNDERFLOW
            return _pack(sign, kept, leading - (precision - 1) + WRAP), flags | _rounding(inexact, grew)
        lowest = 1 - BIAS - (precision - 1)
        kept, inexact, grew = round_bits(magnitude, lowest - exponent, sticky, sign, control.rounding)
        if inexact:
            flags |= UNDERFLOW
        return _pack(sign, kept, lowest), flags | _rounding(inexact, grew)
    if after > BIAS:
        if not control.masks & OVERFLOW:
            return _pack(sign, kept, leading - (precision - 1) - WRAP), OVERFLOW | _rounding(inexact, grew)
        away = control.rounding == NEAREST or (control.rounding != CHOP and bool(sign) == (control.rounding == DOWN))
        largest = 0x7FFE << 64 | ((1 << precision) - 1) << (64 - precision)
        return sign << 79 | (INFINITY if away else largest), OVERFLOW | INEXACT | (UP if away else 0)
    return _pack(sign, kept, leading - (precision - 1)), flags | _rounding(inexact, grew)


def _rounding(inexact: bool, grew: bool) -> int:
    return (INEXACT if inexact else 0) | (UP if grew else 0)


def _pack(sign: int, magnitude: int, exponent: int) -> int:
    """The pattern of a number that fits exactly."""
    if magnitude == 0:
        return sign << 79
    shift = 64 - magnitude.bit_length()
    top = exponent - shift + 63 + BIAS
    if top >= 1:
        significand = magnitude << shift if shift >= 0 else magnitude >> -shift
        return sign << 79 | top << 64 | significand
    return sign << 79 | magnitude << (exponent + BIAS - 1 + 63)


def add(a: int, b: int, control: Control, subtract: bool = False) -> Result:
    """a + b, or a - b."""
    bad = check(a, b)
    if bad is not None:
        return bad
    if subtract:
        b ^= SIGN
    flags = denormals(a, b)
    if is_infinite(a) or is_infinite(b):
        if is_infinite(a) and is_infinite(b) and a != b:
            return INDEFINITE, INVALID
        return (a if is_infinite(a) else b), flags
    (sa, ma, ea), (sb, mb, eb) = split(a), split(b)
    if ma == 0 and mb == 0:
        sign = sa if sa == sb else int(control.rounding == DOWN)
        return sign << 79, flags
    exponent = min(ea, eb) if ma and mb else ea if ma else eb
    total = (-1) ** sa * (ma << ea - exponent if ma else 0) + (-1) ** sb * (mb << eb - exponent if mb else 0)
    if total == 0:
        return int(control.rounding == DOWN) << 79, flags
    result, more = finish(int(total < 0), abs(total), exponent, False, control)
    return result, flags | more


def multiply(a: int, b: int, control: Control) -> Result:
    """a * b."""
    bad = check(a, b)
    if bad is not None:
        return bad
    sign = (a ^ b) >> 79
    flags = denormals(a, b)
    if is_infinite(a) or is_infinite(b):
        if is_zero(a) or is_zero(b):
            return INDEFINITE, INVALID
        return sign << 79 | INFINITY, flags
    (_, ma, ea), (_, mb, eb) = split(a), split(b)
    if ma == 0 or mb == 0:
        return sign << 79, flags
    result, more = finish(sign, ma * mb, ea + eb, False, control)
    return result, flags | more


def divide(a: int, b: int, control: Control) -> Result:
    """a / b."""
    bad = check(a, b)
    if bad is not None:
        return bad
    sign = (a ^ b) >> 79
    flags = denormals(a, b)
    if is_infinite(a):
        return (INDEFINITE, INVALID) if is_infinite(b) else (sign << 79 | INFINITY, flags)
    if is_infinite(b):
        return sign << 79, flags
    if is_zero(b):
        return (INDEFINITE, INVALID) if is_zero(a) else (sign << 79 | INFINITY, ZERO_DIVIDE | flags)
    (_, ma, ea), (_, mb, eb) = split(a), split(b)
    if ma == 0:
        return sign << 79, flags
    shift = 130
    quotient, rest = divmod(ma << shift, mb)
    result, more = finish(sign, quotient, ea - eb - shift, rest != 0, control)
    return result, flags | more


def square_root(a: int, control: Control) -> Result:
    """The square root of a."""
    bad = check(a)
    if bad is not None:
        return bad
    if is_zero(a):
        return a, 0
    if a >> 79:
        return INDEFINITE, INVALID
    if is_infinite(a):
        return a, 0
    _, m, e = split(a)
    shift = 130 + (e & 1)
    root = isqrt(m << shift)
    result, more = finish(0, root, (e - shift) // 2, root * root != m << shift, control)
    return result, denormals(a) | more


def compare(a: int, b: int, *, unordered_is_quiet: bool) -> tuple[int, int]:
    """-1, 0, 1, or 2 for unordered; and the exceptions."""
    if is_unsupported(a) or is_unsupported(b):
        return 2, INVALID
    if is_nan(a) or is_nan(b):
        quiet_only = unordered_is_quiet and not (is_signalling(a) or is_signalling(b))
        return 2, 0 if quiet_only else INVALID
    flags = denormals(a, b)
    if is_zero(a) and is_zero(b):
        return 0, flags
    left = -(a & ~SIGN) if a >> 79 else a
    right = -(b & ~SIGN) if b >> 79 else b
    left, right = _ordered(left), _ordered(right)
    return (left > right) - (left < right), flags


def _ordered(x: int) -> int:
    """A pattern (negative for negative) such that patterns compare as numbers; a pseudo-denormal has exponent 1."""
    magnitude = abs(x)
    if magnitude >> 64 == 0 and magnitude & TOP:
        magnitude |= 1 << 64
    return -magnitude if x < 0 else magnitude


def round_to_integer(a: int, control: Control) -> Result:
    """FRNDINT."""
    bad = check(a)
    if bad is not None:
        return bad
    if is_infinite(a) or is_zero(a):
        return a, 0
    sign, m, e = split(a)
    if e >= 0:
        return a, denormals(a)
    kept, inexact, grew = round_bits(m, -e, False, sign, control.rounding)
    return _pack(sign, kept, 0), denormals(a) | _rounding(inexact, grew)


def scale(a: int, b: int, control: Control) -> Result:
    """FSCALE: a * 2**trunc(b)."""
    bad = check(a, b)
    if bad is not None:
        return bad
    flags = denormals(a, b)
    if is_infinite(b):
        if b >> 79:
            return (INDEFINITE, INVALID) if is_infinite(a) else (a & SIGN, flags)
        return (INDEFINITE, INVALID) if is_zero(a) else (a & SIGN | INFINITY, flags)
    if is_infinite(a) or is_zero(a):
        return a, flags
    sign, m, e = split(b)
    # Beyond 2**16 in either direction every number overflows or underflows.
    amount = m >> -e if -64 < e < 0 else 0 if e < 0 else 1 << 16
    amount = min(amount, 1 << 16) * (-1 if sign else 1)
    s, significand, exponent = split(a)
    result, more = finish(s, significand, exponent + amount, False, Control(64, control.rounding, control.masks))
    return result, flags | more


def extract(a: int) -> tuple[int, int, int]:
    """FXTRACT: exponent, significand, exceptions."""
    bad = check(a)
    if bad is not None:
        return bad[0], bad[0], bad[1]
    if is_zero(a):
        return SIGN | INFINITY, a, ZERO_DIVIDE
    if is_infinite(a):
        return INFINITY, a, 0
    sign, m, e = split(a)
    exponent, _ = from_integer(e + m.bit_length() - 1)
    return exponent, _pack(sign, m, 1 - m.bit_length()), denormals(a)


def remainder(a: int, b: int, control: Control, *, nearest: bool) -> tuple[int, int, int, bool]:
    """FPREM and FPREM1: result, exceptions, low bits of the quotient, whether it is only partial."""
    bad = check(a, b)
    if bad is not None:
        return *bad, 0, False
    if is_infinite(a) or is_zero(b):
        return INDEFINITE, INVALID, 0, False
    flags = denormals(a, b)
    if is_infinite(b) or is_zero(a):
        return a, flags, 0, False
    (sa, ma, ea), (_, mb, eb) = split(a), split(b)
    apart = ea + ma.bit_length() - eb - mb.bit_length()
    if apart >= 64:
        # SDM: reduce by between 32 and 63 bits and say that it is not done.
        amount = apart - (32 + apart % 32)
        rest = (ma << max(ea - eb - amount, 0)) % (mb << max(eb + amount - ea, 0))
        exponent = min(ea, eb + amount)
        return _pack(sa, rest, exponent), flags, 0, True
    exponent = min(ea, eb)
    left, right = ma << ea - exponent, mb << eb - exponent
    quotient, rest = divmod(left, right)
    if nearest and (2 * rest > right or (2 * rest == right and quotient & 1)):
        quotient, rest, sa = quotient + 1, right - rest, sa ^ 1
    if rest == 0:
        return (a >> 79) << 79, flags, quotient & 7, False
    result, more = finish(sa, rest, exponent, False, Control(64, control.rounding, control.masks))
    return result, flags | more, quotient & 7, False


def from_integer(value: int) -> Result:
    """An integer of at most 64 bits; exact."""
    if value == 0:
        return 0, 0
    return _pack(int(value < 0), abs(value), 0), 0


def to_integer(a: int, bits: int, control: Control) -> Result:
    """A two's complement integer of ``bits`` bits; the integer indefinite where it does not fit."""
    bad = 1 << bits - 1
    if is_unsupported(a) or is_nan(a) or is_infinite(a):
        return bad, INVALID
    sign, m, e = split(a)
    if m and e + m.bit_length() > bits + 1:
        return bad, INVALID
    kept, inexact, grew = round_bits(m, -e, False, sign, control.rounding)
    value = -kept if sign else kept
    if not -bad <= value < bad:
        return bad, INVALID
    return value & (1 << bits) - 1, _rounding(inexact, grew)


def from_float(pattern: int, bits: int, *, load: bool = True) -> Result:
    """A 32 or 64 bit number as 80 bits; a load makes a signalling NaN quiet, and is INVALID."""
    width, most = (23, 0xFF) if bits == 32 else (52, 0x7FF)
    sign, exponent, fraction = pattern >> bits - 1, pattern >> width & most, pattern & (1 << width) - 1
    if exponent == most:
        significand = TOP | fraction << 63 - width
        result = sign << 79 | 0x7FFF << 64 | significand
        return (quiet(result), INVALID) if load and is_signalling(result) else (result, 0)
    if exponent == 0:
        if fraction == 0:
            return sign << 79, 0
        return _pack(sign, fraction, 1 - (most >> 1) - width), DENORMAL
    return _pack(sign, fraction | 1 << width, exponent - (most >> 1) - width), 0


def to_float(a: int, bits: int, control: Control) -> Result:
    """Round to a 32 or 64 bit pattern."""
    width, most = (23, 0xFF) if bits == 32 else (52, 0x7FF)
    bias = most >> 1
    indefinite = (most << width | 1 << width - 1) | 1 << bits - 1
    if is_unsupported(a):
        return indefinite, INVALID
    sign = a >> 79
    if is_nan(a):
        flags = INVALID if is_signalling(a) else 0
        return sign << bits - 1 | most << width | (quiet(a) & TOP - 1) >> 63 - width, flags
    if is_infinite(a):
        return sign << bits - 1 | most << width, 0
    _, m, e = split(a)
    if m == 0:
        return sign << bits - 1, 0
    leading = e + m.bit_length() - 1
    kept, inexact, grew = round_bits(m, leading - width - e, False, sign, control.rounding)
    after = leading + (kept.bit_length() > width + 1)
    if after < 1 - bias:
        if not control.masks & UNDERFLOW:
            return 0, UNDERFLOW
        kept, inexact, grew = round_bits(m, 1 - bias - width - e, False, sign, control.rounding)
        flags = UNDERFLOW if inexact else 0
        return sign << bits - 1 | kept, flags | _rounding(inexact, grew)
    if after > bias:
        if not control.masks & OVERFLOW:
            return 0, OVERFLOW
        away = control.rounding == NEAREST or (control.rounding != CHOP and bool(sign) == (control.rounding == DOWN))
        magnitude = most << width if away else (most << width) - 1
        return sign << bits - 1 | magnitude, OVERFLOW | INEXACT | (UP if away else 0)
    if kept.bit_length() > width + 1:
        kept >>= 1
    return sign << bits - 1 | after + bias << width | kept & (1 << width) - 1, _rounding(inexact, grew)


def from_bcd(pattern: int) -> int:
    """A packed decimal of 80 bits."""
    value = 0
    for digit in range(17, -1, -1):
        value = value * 10 + (pattern >> 4 * digit & 15)
    result, _ = from_integer(value)
    return result | (pattern >> 79) << 79


def to_bcd(a: int, control: Control) -> Result:
    """A packed decimal; the packed indefinite where it does not fit."""
    indefinite = 0xFFFFC000000000000000
    if is_unsupported(a) or is_nan(a) or is_infinite(a):
        return indefinite, INVALID
    sign, m, e = split(a)
    if m and e + m.bit_length() > 64:
        return indefinite, INVALID
    kept, inexact, grew = round_bits(m, -e, False, sign, control.rounding)
    if kept >= 10**18:
        return indefinite, INVALID
    pattern = 0
    for digit in range(18):
        kept, low = divmod(kept, 10)
        pattern |= low << 4 * digit
    return sign << 79 | pattern, _rounding(inexact, grew)
