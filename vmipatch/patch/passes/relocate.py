"""Moving a replacement with all its relative operands, as kernels do from 6.4 on (``apply_relocation``)."""

from __future__ import annotations

from functools import lru_cache

from vmipatch.errors import PatchError
from vmipatch.isa.decode import detailed
from vmipatch.isa.nops import NopTable

_INT3 = 0xCC


@lru_cache(maxsize=4096)
def join_runs(code: bytes, bits: int, nops: NopTable, *, branches: bool, more: bool = False) -> bytes:
    """The nops of a site that gets no replacement, runs of any length joined."""
    return apply(code, 0, 0, len(code), bits, nops, branches=branches, more=more)


def apply(
    buffer: bytes,
    address: int,
    source: int,
    size: int,
    bits: int,
    nops: NopTable,
    *,
    branches: bool,
    more: bool = False,
) -> bytes:
    """A replacement of ``size`` bytes from ``source``, padded to the site's length, as it stands at ``address``.

    Operands whose target lies inside the replacement or at its end stay (``need_reloc``);
    a long jump becomes short where it reaches; runs of nops are joined.  With ``branches``
    (6.4 to 6.8) a branch that only jumps over the run that follows it is joined with it; without
    (6.9 on) a nop that ends the site is left as it is.  ``more`` takes what 6.19 takes for a nop.

    Raises :class:`PatchError` where an operand cannot hold its new value: the kernel stops there with a BUG.
    """
    result = bytearray(buffer)
    shift = source - address
    position = previous = target = 0
    while position < len(buffer):
        instruction = detailed(bytes(result[position : position + 15]), bits)
        if instruction is None:
            return bytes(result)
        following = position + instruction.size
        if instruction.any_nop if more else instruction.nop:
            if not branches and following == len(buffer):
                break
            following = _skip_nops(result, following, bits, more)
            start = previous if branches and target and following == target else position
            result[start:following] = _fill(following - start, nops)
            position = following
            continue
        if instruction.branch:
            if instruction.opcode in (0xE8, 0xE9, 0xEB):
                previous, target = position, following + instruction.immediate
            if shift and not 0 <= following + instruction.immediate <= size:
                at, width = position + instruction.immediate_offset, instruction.immediate_size
                result[at : at + width] = _field(instruction.immediate + shift, width, address + position)
                if instruction.opcode == 0xE9:
                    short = instruction.immediate + shift + 3
                    if -128 <= short <= 127:
                        tail = bytes((_INT3,)) * (instruction.size - 2)
                        result[position:following] = bytes((0xEB, short & 0xFF)) + tail
        else:
            target = 0
        if instruction.rip_offset and shift:
            at = position + instruction.rip_offset
            value = int.from_bytes(result[at : at + 4], "little", signed=True)
            if not 0 <= following + value <= size:
                result[at : at + 4] = _field(value + shift, 4, address + position)
        position = following
    return bytes(result)


def _field(value: int, width: int, address: int) -> bytes:
    """A displacement of ``width`` bytes (``apply_reloc_n``); 32 bits wrap, as addresses of 32-bit kernels do."""
    if width < 4 and not -(1 << 8 * width - 1) <= value < 1 << 8 * width - 1:
        text = f"the replacement's branch would need a displacement of {value:#x}, and has {8 * width} bits for it"
        raise PatchError(text, address=address)
    return (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _skip_nops(code: bytearray, position: int, bits: int, more: bool) -> int:
    while position < len(code):
        instruction = detailed(bytes(code[position : position + 15]), bits)
        if instruction is None or not (instruction.any_nop if more else instruction.nop):
            break
        position += instruction.size
    return position


def _fill(length: int, nops: NopTable) -> bytes:
    """``add_nop``: what one table entry cannot cover is jumped over."""
    longest = len(nops.sequences)
    if length <= longest:
        return nops.fill(length)
    if length < 127:
        return bytes((0xEB, length - 2)) + bytes((_INT3,)) * (length - 2)
    return bytes((0xE9,)) + (length - 5).to_bytes(4, "little") + bytes((_INT3,)) * (length - 5)
