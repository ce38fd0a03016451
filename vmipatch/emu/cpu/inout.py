"""Port input and output, with the I/O permission bitmap.

May import words, state, faults, host, access and operands.
"""

from __future__ import annotations

from vmipatch.emu.cpu.access import linear_read
from vmipatch.emu.cpu.faults import gp, leave
from vmipatch.emu.cpu.host import port_read, port_write
from vmipatch.emu.cpu.operands import get_register, put_register
from vmipatch.emu.cpu.state import CR0_PE, EAX, EDX, EXIT_PORT, TR, Core
from vmipatch.emu.cpu.words import i64, mask32, u32

DONE = 1  # a semantic function's result: the instruction is done, and so is the block


def check_port(c: Core, port: i64, size: i64, is_write: u32, value: u32) -> i64:
    """IOPL, else the bitmap in the TSS (SDM 1, 18.5.2); then the host's hooks. 0 or -1."""
    if c.cr[0] & CR0_PE and (c.vm or c.cpl > (c.flags >> 12) & 3) and check_bitmap(c, port, size) < 0:
        return -1
    if c.hooked_ports and (c.exit_ports[port >> 3] >> (port & 7)) & 1:
        c.exit_address = mask32(port)
        c.exit_size = size
        c.exit_write = is_write
        c.exit_value = value
        return leave(c, EXIT_PORT)
    return 0


def check_bitmap(c: Core, port: i64, size: i64) -> i64:
    """The I/O permission bitmap; a bit set, or a bitmap that ends too early, is #GP(0)."""
    if (c.attr[TR] & 0x89) != 0x89 or (c.attr[TR] & 8) == 0 or c.limit[TR] < 103:
        return gp(c, 0)
    base: i64 = linear_read(c, mask32(c.base[TR] + 102), 2, 0)
    if base < 0:
        return -1
    at: i64 = base + (port >> 3)
    if at + 1 > c.limit[TR]:
        return gp(c, 0)
    bits: i64 = linear_read(c, mask32(c.base[TR] + at), 2, 0)
    if bits < 0:
        return -1
    if (bits >> (port & 7)) & ((1 << size) - 1):
        return gp(c, 0)
    return 0


def port_number(c: Core, p: i64, immediate: i64) -> i64:
    """DX, or the immediate byte."""
    if immediate:
        return c.code[p + 4] & 0xFF
    return c.reg[EDX] & 0xFFFF


def op_in(c: Core, p: i64, size: i64, immediate: i64) -> i64:
    """IN."""
    port: i64 = port_number(c, p, immediate)
    if check_port(c, port, size, 0, 0) < 0:
        return -1
    value: u32 = port_read(c, port, size)
    put_register(c, EAX, value, size)
    return DONE


def op_out(c: Core, p: i64, size: i64, immediate: i64) -> i64:
    """OUT."""
    port: i64 = port_number(c, p, immediate)
    value: u32 = get_register(c, EAX, size)
    if check_port(c, port, size, 1, value) < 0:
        return -1
    port_write(c, port, size, value)
    return DONE
