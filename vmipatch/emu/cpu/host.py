"""Calls out of the engine to the bus, in the middle of an instruction.

May import words, state and faults.  These are the only functions of the engine
that work on Python objects.  An exception of a device must not be lost in C
code: it is kept and raised again by ``Cpu.run``.
"""

from __future__ import annotations

from vmipatch.emu.cpu.pause import stop_after
from vmipatch.emu.cpu.state import Core
from vmipatch.emu.cpu.words import calls_python, i64, mask32, u32


@calls_python
def bus_read(c: Core, physical: i64, size: i64) -> u32:
    """A read of ``size`` bytes (1, 2, 4) that no backing page answers."""
    value: u32 = 0
    try:
        value = mask32(c.bus.memory_read(physical, size) & 0xFFFFFFFF)  # type: ignore[attr-defined]
    except Exception as error:
        note_error(c, error)
    return value


@calls_python
def bus_write(c: Core, physical: i64, size: i64, value: u32) -> None:
    """A write that no writable backing page takes; only the low ``size`` bytes of ``value`` count."""
    if size < 4:
        value &= 0xFF if size == 1 else 0xFFFF
    try:
        c.bus.memory_write(physical, size, value)  # type: ignore[attr-defined]
    except Exception as error:
        note_error(c, error)


@calls_python
def port_read(c: Core, port: i64, size: i64) -> u32:
    """IN."""
    value: u32 = 0
    try:
        value = mask32(c.bus.port_read(port, size) & 0xFFFFFFFF)  # type: ignore[attr-defined]
    except Exception as error:
        note_error(c, error)
    return value


@calls_python
def port_write(c: Core, port: i64, size: i64, value: u32) -> None:
    """OUT."""
    try:
        c.bus.port_write(port, size, value)  # type: ignore[attr-defined]
    except Exception as error:
        note_error(c, error)


@calls_python
def acknowledge(c: Core) -> i64:
    """The interrupt acknowledge cycle: the vector."""
    vector: i64 = 0xFF
    try:
        vector = c.bus.acknowledge() & 0xFF  # type: ignore[attr-defined]
    except Exception as error:
        note_error(c, error)
    return vector


@calls_python
def note_error(c: Core, error: object) -> None:
    """Keep a device's exception and stop after this instruction."""
    if c.host_error is None:
        c.host_error = error
    c.host_stop = 1
    stop_after(c)
