"""Integer arithmetic: each operation once, for operands of 8, 16 or 32 bits.

May import words, state and flags.  Operands and results are zero-extended
words of ``bits`` bits; ``bits`` is a literal at every call, so that the C
compiler makes one version per size.  Flags as in the Intel SDM volume 2;
those it leaves undefined are set as the hardware that Unicorn and Bochs model
sets them where that is known, and are masked in tests by the opcode table.
"""

from __future__ import annotations

from vmipatch.emu.cpu.flags import get_cf, set_cf_of
from vmipatch.emu.cpu.state import Core
from vmipatch.emu.cpu.words import cast, i64, inline, mask32, signed8, signed16, signed32, u32, u64


@inline
def width_mask(bits: i64) -> u32:
    if bits == 8:
        return 0xFF
    if bits == 16:
        return 0xFFFF
    return mask32(-1)


@inline
def sign_extend(value: u32, bits: i64) -> i64:
    """A word of ``bits`` bits as a signed number."""
    if bits == 8:
        return signed8(value)
    if bits == 16:
        return signed16(value)
    return signed32(value)


@inline
def set_carries(c: Core, vector: u32, bits: i64) -> None:
    """Keep the vector of carries out of each bit of an operation."""
    if bits == 32:
        c.aux = vector
    else:
        c.aux = mask32(cast(u64, vector) << (32 - bits)) | (vector & 8)


@inline
def alu_add(c: Core, a: u32, b: u32, bits: i64) -> u32:
    r: u32 = mask32(a + b) & width_mask(bits)
    c.res = sign_extend(r, bits)
    set_carries(c, (a & b) | ((a | b) & ~r), bits)
    return r


@inline
def alu_adc(c: Core, a: u32, b: u32, bits: i64) -> u32:
    r: u32 = mask32(a + b + get_cf(c)) & width_mask(bits)
    c.res = sign_extend(r, bits)
    set_carries(c, (a & b) | ((a | b) & ~r), bits)
    return r


@inline
def alu_sub(c: Core, a: u32, b: u32, bits: i64) -> u32:
    r: u32 = mask32(a - b) & width_mask(bits)
    c.res = sign_extend(r, bits)
    set_carries(c, (~a & b) | ((~a | b) & r), bits)
    return r


@inline
def alu_sbb(c: Core, a: u32, b: u32, bits: i64) -> u32:
    r: u32 = mask32(a - b - get_cf(c)) & width_mask(bits)
    c.res = sign_extend(r, bits)
    set_carries(c, (~a & b) | ((~a | b) & r), bits)
    return r


@inline
def set_logic(c: Core, r: u32, bits: i64) -> u32:
    """Flags of a logical operation: CF, OF and AF clear."""
    c.res = sign_extend(r, bits)
    c.aux = 0
    return r


@inline
def alu_and(c: Core, a: u32, b: u32, bits: i64) -> u32:
    return set_logic(c, a & b, bits)


@inline
def alu_or(c: Core, a: u32, b: u32, bits: i64) -> u32:
    return set_logic(c, a | b, bits)


@inline
def alu_xor(c: Core, a: u32, b: u32, bits: i64) -> u32:
    return set_logic(c, a ^ b, bits)


@inline
def alu_inc(c: Core, a: u32, bits: i64) -> u32:
    r: u32 = mask32(a + 1) & width_mask(bits)
    c.res = sign_extend(r, bits)
    carry: u32 = get_cf(c)
    over: u32 = ((~a & r) >> (bits - 1)) & 1
    c.aux = cast(u32, carry) << 31 | cast(u32, carry ^ over) << 30 | ((a ^ r) & 0x10) >> 1
    return r


@inline
def alu_dec(c: Core, a: u32, bits: i64) -> u32:
    r: u32 = mask32(a - 1) & width_mask(bits)
    c.res = sign_extend(r, bits)
    carry: u32 = get_cf(c)
    over: u32 = ((a & ~r) >> (bits - 1)) & 1
    c.aux = cast(u32, carry) << 31 | cast(u32, carry ^ over) << 30 | ((a ^ r) & 0x10) >> 1
    return r


@inline
def alu_neg(c: Core, a: u32, bits: i64) -> u32:
    return alu_sub(c, 0, a, bits)


@inline
def alu_not(c: Core, a: u32, bits: i64) -> u32:
    return ~a & width_mask(bits)


@inline
def set_shift(c: Core, r: u32, carry: u32, over: u32, bits: i64) -> u32:
    c.res = sign_extend(r, bits)
    c.aux = cast(u32, carry) << 31 | cast(u32, (carry ^ over) & 1) << 30
    return r


@inline
def alu_shl(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = count & 31
    if n == 0:
        return a
    wide: u64 = cast(u64, a) << n
    r: u32 = mask32(wide) & width_mask(bits)
    carry: u32 = mask32(wide >> bits) & 1
    return set_shift(c, r, carry, (r >> (bits - 1)) ^ carry, bits)


@inline
def alu_shr(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = count & 31
    if n == 0:
        return a
    r: u32 = a >> n
    return set_shift(c, r, (a >> (n - 1)) & 1, (a >> (bits - 1)) if n == 1 else (r >> (bits - 2)) & 1, bits)


@inline
def alu_sar(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = count & 31
    if n == 0:
        return a
    wide: i64 = sign_extend(a, bits)
    r: u32 = mask32(wide >> n) & width_mask(bits)
    return set_shift(c, r, mask32((wide >> (n - 1)) & 1), 0, bits)


@inline
def alu_rol(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = count & (bits - 1)
    if (count & 31) == 0:
        return a
    r: u32 = a
    if n != 0:
        r = (mask32(cast(u64, a) << n) | a >> (bits - n)) & width_mask(bits)
    set_cf_of(c, r & 1, (r >> (bits - 1)) ^ (r & 1))
    return r


@inline
def alu_ror(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = count & (bits - 1)
    if (count & 31) == 0:
        return a
    r: u32 = a
    if n != 0:
        r = (a >> n | mask32(cast(u64, a) << (bits - n))) & width_mask(bits)
    set_cf_of(c, r >> (bits - 1), ((r >> (bits - 1)) ^ (r >> (bits - 2))) & 1)
    return r


@inline
def alu_rcl(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = (count & 31) % (bits + 1)
    if n == 0:
        return a
    wide: u64 = cast(u64, get_cf(c)) << bits | a
    turned: u64 = wide << n | wide >> (bits + 1 - n)
    r: u32 = mask32(turned) & width_mask(bits)
    carry: u32 = mask32(turned >> bits) & 1
    set_cf_of(c, carry, (r >> (bits - 1)) ^ carry)
    return r


@inline
def alu_rcr(c: Core, a: u32, count: u32, bits: i64) -> u32:
    n: u32 = (count & 31) % (bits + 1)
    if n == 0:
        return a
    wide: u64 = cast(u64, get_cf(c)) << bits | a
    turned: u64 = wide >> n | wide << (bits + 1 - n)
    r: u32 = mask32(turned) & width_mask(bits)
    carry: u32 = mask32(turned >> bits) & 1
    set_cf_of(c, carry, ((r >> (bits - 1)) ^ (r >> (bits - 2))) & 1)
    return r


@inline
def alu_shld(c: Core, a: u32, b: u32, count: u32, bits: i64) -> u32:
    """SHLD; a 16-bit one with a count above 16 is undefined: shifts a:b:a, as Pentium-class parts do."""
    n: u32 = count & 31
    if n == 0:
        return a
    wide: u64
    carry: u32
    if bits == 32:
        wide = cast(u64, a) << 32 | b
        carry = (a >> (32 - n)) & 1
        r: u32 = mask32(wide >> (32 - n))
    else:
        wide = cast(u64, a) << 32 | cast(u64, b) << 16 | a
        carry = mask32(wide >> (48 - n)) & 1
        r = mask32(wide >> (32 - n)) & 0xFFFF
    return set_shift(c, r, carry, ((r ^ a) >> (bits - 1)) & 1, bits)


@inline
def alu_shrd(c: Core, a: u32, b: u32, count: u32, bits: i64) -> u32:
    """SHRD; the undefined 16-bit counts above 16 shift a:b:a."""
    n: u32 = count & 31
    if n == 0:
        return a
    wide: u64
    wide = cast(u64, b) << 32 | a if bits == 32 else cast(u64, a) << 32 | cast(u64, b) << 16 | a
    r: u32 = mask32(wide >> n) & width_mask(bits)
    return set_shift(c, r, mask32(wide >> (n - 1)) & 1, ((r ^ a) >> (bits - 1)) & 1, bits)


@inline
def alu_imul(c: Core, a: u32, b: u32, bits: i64) -> u32:
    """Two and three operand IMUL; CF and OF say that the product did not fit."""
    product: i64 = sign_extend(a, bits) * sign_extend(b, bits)
    r: u32 = mask32(product) & width_mask(bits)
    lost: u32 = 0 if sign_extend(r, bits) == product else 1
    c.res = sign_extend(r, bits)
    c.aux = cast(u32, lost) << 31
    return r


@inline
def bit_result(c: Core, a: u32, position: u32) -> None:
    """BT and its kin change CF alone."""
    carry: u32 = (a >> position) & 1
    over: u32 = ((c.aux >> 31) ^ (c.aux >> 30)) & 1
    set_cf_of(c, carry, over)


@inline
def alu_bt(c: Core, a: u32, position: u32, bits: i64) -> u32:
    bit_result(c, a, position & (bits - 1))
    return a


@inline
def alu_bts(c: Core, a: u32, position: u32, bits: i64) -> u32:
    bit_result(c, a, position & (bits - 1))
    return a | cast(u32, 1) << (position & (bits - 1))


@inline
def alu_btr(c: Core, a: u32, position: u32, bits: i64) -> u32:
    bit_result(c, a, position & (bits - 1))
    return a & ~(cast(u32, 1) << (position & (bits - 1)))


@inline
def alu_btc(c: Core, a: u32, position: u32, bits: i64) -> u32:
    bit_result(c, a, position & (bits - 1))
    return a ^ cast(u32, 1) << (position & (bits - 1))
