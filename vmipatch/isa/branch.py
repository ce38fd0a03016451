"""Relative branches: ``E8`` call, ``E9`` jmp, ``EB`` jmp short (Intel SDM vol. 2, CALL and JMP)."""

from __future__ import annotations

from collections.abc import Sequence

from vmipatch.errors import PatchError

CALL, JMP, JMP_SHORT = 0xE8, 0xE9, 0xEB
CALL_SIZE = 5


def signed32(value: int) -> int:
    """The low 32 bits of ``value`` as a signed number."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def near(opcode: int, address: int, target: int, bits: int) -> bytes:
    """A five-byte call or jump at virtual ``address`` to virtual ``target``.

    32-bit displacements wrap; a 64-bit target out of reach raises :class:`PatchError`.
    """
    distance = target - address - CALL_SIZE
    if bits == 64 and signed32(distance) != distance:
        raise PatchError(f"the target {target:#x} is out of reach of a near branch", address=address)
    return bytes((opcode,)) + (distance & 0xFFFFFFFF).to_bytes(4, "little")


def near_all(opcode: int, addresses: Sequence[int], target: int, bits: int) -> list[bytes]:
    """What :func:`near` gives at each of many addresses."""
    if addresses:
        for farthest in (min(addresses), max(addresses)):
            near(opcode, farthest, target, bits)
    first, end = bytes((opcode,)), target - CALL_SIZE
    return [first + (end - address & 0xFFFFFFFF).to_bytes(4, "little") for address in addresses]


def target_of(code: bytes, address: int, bits: int) -> int | None:
    """Where the relative branch that ``code`` starts with goes, or None if it is none."""
    if len(code) >= CALL_SIZE and code[0] in (CALL, JMP):
        distance = int.from_bytes(code[1:5], "little", signed=True)
        return (address + CALL_SIZE + distance) & ((1 << bits) - 1)
    if len(code) >= 2 and code[0] == JMP_SHORT:
        return (address + 2 + int.from_bytes(code[1:2], "little", signed=True)) & ((1 << bits) - 1)
    return None
