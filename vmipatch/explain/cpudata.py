"""The CPU of a running kernel, out of the bytes of its own ``boot_cpu_data``.

struct cpuinfo_x86 of arch/x86/include/asm/processor.h.  Imports patch.cpu.
"""

from __future__ import annotations

import struct

from vmipatch.patch.cpu import Cpu

SIZE = 512
"""How much of it is looked at: the vendor's name stands well before its end."""

VENDORS = (
    b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine", b"CentaurHauls", b"  Shanghai  ", b"CyrixInstead",
    b"GenuineTMx86", b"TransmetaCPU", b"NexGenDriven", b"UMC UMC UMC ", b"Geode by NSC", b"Vortex86 SoC",
)  # fmt: skip
"""CPUID's vendor strings that kernels know."""

_MOST_LEVELS = 0x40


def parse(data: bytes, version: tuple[int, ...]) -> Cpu | None:
    """The CPU that the bytes describe, or None where they describe none.

    x86_capability ends where the vendor's name begins, and begins behind
    extended_cpuid_level and cpuid_level; its first word is CPUID leaf 1's EDX.
    """
    at = min((found for vendor in VENDORS if (found := data.find(vendor)) >= 0), default=-1)
    if at < 0:
        return None
    words = struct.unpack(f"<{at // 4}I", data[at % 4 : at])
    for extended_known in (True, False):
        for start in range(len(words) - 3):
            extended, level = words[start], words[start + 1]
            fits = extended >> 16 == 0x8000 if extended_known else extended == 0
            if not fits or not (0 < level <= _MOST_LEVELS or level == 0xFFFFFFFF):
                continue
            # x86-64 aligns the array to eight bytes: a word of padding may stand before it.
            first = start + 2 if words[start + 2] else start + 3
            if words[first] & 1:
                family, model, stepping = _identity(data, version)
                vendor = data[at : at + 12].decode("ascii")
                return Cpu("boot_cpu_data", vendor, family, model, stepping, words[first:])
    return None


def _identity(data: bytes, version: tuple[int, ...]) -> tuple[int, int, int]:
    """Family, model, stepping: the first, third and fourth byte; from 6.10 on the second, first and fifth."""
    if version >= (6, 10):
        return data[1], data[0], data[4]
    return data[0], data[2], data[3]
