"""Guests of a few instructions, assembled with keystone (only forms that it gets right)."""

from __future__ import annotations

import struct

LOAD = 0x100000
ENTRY = LOAD + 32


def code(text: str, address: int = ENTRY, bits: int = 32) -> bytes:
    """Machine code; instructions separated by ``;``."""
    import keystone

    mode = keystone.KS_MODE_32 if bits == 32 else keystone.KS_MODE_16
    encoding, _ = keystone.Ks(keystone.KS_ARCH_X86, mode).asm(text, address)
    assert encoding, text
    return bytes(encoding)


def multiboot(program: bytes, flags: int = 0) -> bytes:
    """A flat Multiboot image at 1 MiB whose entry is ``program``."""
    flags |= 1 << 16
    checksum = -(0x1BADB002 + flags) & 0xFFFFFFFF
    header = struct.pack("<III", 0x1BADB002, flags, checksum)
    return header + struct.pack("<5I", LOAD, LOAD, 0, 0, ENTRY) + program


def say(text: str) -> str:
    """Instructions that print on the serial port."""
    lines = ["mov edx, 0x3f8"]
    for character in text:
        lines += [f"mov al, {ord(character)}", "out dx, al"]
    return "; ".join(lines)


def option_rom(init: bytes, units: int = 4) -> bytes:
    """An option ROM with ``init`` at its entry and a correct sum."""
    rom = bytearray(b"\x55\xaa" + bytes((units,)) + init)
    rom += bytes(units * 512 - len(rom))
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def bios(program: bytes) -> bytes:
    """A 64 KiB BIOS: ``program`` (16-bit) at F000:0000, a far jump to it at the reset vector."""
    rom = bytearray(b"\xf4" * 0x10000)
    rom[: len(program)] = program
    rom[0xFFF0:0xFFF5] = b"\xea\x00\x00\x00\xf0"
    return bytes(rom)
