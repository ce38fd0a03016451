"""Machine words that mean the same compiled and uncompiled.

Imports nothing of the package.  Every part of the engine is ordinary Python
whose annotations (``u32``, ``i64``, ``p8`` ...) become C types when the parts
are compiled as one unit (:mod:`vmipatch.emu.cpu.amalgam`).  Python integers do
not wrap: whatever may leave its word goes through :func:`mask32`, which costs
nothing in C.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, MutableSequence
from typing import Any, TypeVar

COMPILED = False

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

fetch32: Any = None
deposit32: Any = None
move_bytes: Any = None
set_bytes: Any = None
calloc: Any = None

u8 = int
u32 = int
u64 = int
i64 = int
p8 = MutableSequence[int]
p32 = MutableSequence[int]
p64 = MutableSequence[int]


s8 = int
s16 = int
s32 = int


def inline(function: F) -> F:
    """Marks a function that the C compiler shall inline."""
    return function


def calls_python(function: F) -> F:
    """Marks a function that works on Python objects; all others run without the interpreter lock."""
    return function


def exported(function: F) -> F:
    """Marks a function that Python code outside the engine calls."""
    return function


def cast(kind: type[T], value: Any) -> T:
    """A C cast; uncompiled, the value itself."""
    same: T = value
    return same


@inline
def mask32(value: i64) -> u32:
    """The low 32 bits."""
    if COMPILED:
        low: u32 = cast(u32, value)
        return low
    return value & 0xFFFFFFFF


@inline
def mask64(value: u64) -> u64:
    """The low 64 bits."""
    if COMPILED:
        return value
    return value & 0xFFFFFFFFFFFFFFFF


@inline
def signed8(value: u32) -> i64:
    """The low 8 bits of a value below 256, sign extended."""
    if COMPILED:
        result: i64 = cast(s8, value)
        return result
    return (value ^ 0x80) - 0x80


@inline
def signed16(value: u32) -> i64:
    """A value below 65536 as 16 bits, sign extended."""
    if COMPILED:
        result: i64 = cast(s16, value)
        return result
    return (value ^ 0x8000) - 0x8000


@inline
def signed32(value: u32) -> i64:
    """A 32-bit value, sign extended."""
    if COMPILED:
        result: i64 = cast(s32, value)
        return result
    return (value ^ 0x80000000) - 0x80000000


@inline
def load8(host: p8, at: i64) -> u32:
    """One byte of a byte buffer."""
    return host[at]


@inline
def load16(host: p8, at: i64) -> u32:
    """Two bytes, little endian, at any alignment."""
    return host[at] | host[at + 1] << 8


@inline
def load32(host: p8, at: i64) -> u32:
    """Four bytes, little endian, at any alignment."""
    if COMPILED:
        value: u32 = fetch32(host, at)
        return value
    return int.from_bytes(bytes(host[at : at + 4]), "little")


@inline
def store8(host: p8, at: i64, value: u32) -> None:
    """Store one byte."""
    host[at] = value & 0xFF


@inline
def store16(host: p8, at: i64, value: u32) -> None:
    """Store two bytes, little endian."""
    host[at] = value & 0xFF
    host[at + 1] = (value >> 8) & 0xFF


@inline
def store32(host: p8, at: i64, value: u32) -> None:
    """Store four bytes, little endian."""
    if COMPILED:
        deposit32(host, at, value)
        return
    host[at : at + 4] = value.to_bytes(4, "little")


@inline
def load64(host: p8, at: i64) -> u64:
    """Eight bytes, little endian."""
    return cast(u64, load32(host, at)) | cast(u64, load32(host, at + 4)) << 32


@inline
def store64(host: p8, at: i64, value: u64) -> None:
    """Store eight bytes, little endian."""
    store32(host, at, mask32(value & 0xFFFFFFFF))
    store32(host, at + 4, mask32(value >> 32))


def copy_bytes(host: p8, to: i64, source: i64, length: i64) -> None:
    """Copy bytes inside one buffer upwards in single bytes, as REP MOVSB does.

    Where the destination starts inside the source this repeats the pattern
    between them.
    """
    i: i64
    if COMPILED and (to <= source or to >= source + length):
        move_bytes(host, to, source, length)
        return
    if not COMPILED and (to <= source or to >= source + length):
        host[to : to + length] = host[source : source + length]
        return
    for i in range(length):
        host[to + i] = host[source + i]


def fill_bytes(host: p8, to: i64, length: i64, value: u32, size: i64) -> None:
    """Store a pattern of ``size`` bytes over ``length`` bytes (a multiple of it)."""
    i: i64
    if not COMPILED:
        host[to : to + length] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little") * (length // size)
        return
    if size == 4:
        for i in range(0, length, 4):
            store32(host, to + i, value)
    elif size == 2:
        for i in range(0, length, 2):
            store16(host, to + i, value)
    else:
        set_bytes(host, to, value & 0xFF, length)


def zeros8(count: i64) -> p8:
    """A buffer of ``count`` zero bytes."""
    if COMPILED:
        made: p8 = cast(p8, calloc(count, 1))  # type: ignore[type-abstract]
        return made
    return bytearray(count)


def zeros32(count: i64) -> p32:
    """A buffer of ``count`` zero 32-bit words."""
    if COMPILED:
        made: p32 = cast(p32, calloc(count, 4))  # type: ignore[type-abstract]
        return made
    return array("I", bytes(4 * count))


def zeros64(count: i64) -> p64:
    """A buffer of ``count`` zero signed 64-bit words."""
    if COMPILED:
        made: p64 = cast(p64, calloc(count, 8))  # type: ignore[type-abstract]
        return made
    return array("q", bytes(8 * count))


def bytes_of(words: p32) -> p8:
    """The same buffer seen as bytes."""
    if COMPILED:
        seen: p8 = cast(p8, words)  # type: ignore[type-abstract]
        return seen
    return memoryview(words).cast("B")  # type: ignore[arg-type,return-value]
